# SPDX-License-Identifier: Apache-2.0
"""Output folders: which files samda wrote there, which command writes there now, and what a killed one left.

An output folder holds `.samda/manifest.jsonl`, a line with the sha256 for every file that samda writes, and lock files.
A file is samda's own while its content is that of one of its lines; every other file is foreign and never replaced. A
line is appended before its file is moved into place, so a kill cannot make an own file foreign, and processes that
share the cases of one folder append to one manifest. :func:`samda.io.replacing` and :func:`samda.io.new_folder` look
for the open folder above their path, so whatever is written through them is guarded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from samda.errors import UsageError
from samda.processes import Shard

logger = logging.getLogger(__name__)

HIDDEN = ".samda"
LITTER = re.compile(r"\.\d+-[0-9a-f]{8}-.+|\.last\.pt\.tmp", re.DOTALL)  # unfinished files, see samda.io.replacing
WAIT = 10.0  # seconds that a part waits for another one to start
DAMAGED = (ValueError, TypeError, KeyError, RecursionError)  # what lines of a damaged manifest raise
NAMED = 5  # foreign files that a message names

_open: dict[Path, OutputFolder] = {}  # of this process, by resolved path


class OutputFolder:
    """A folder with its manifest; open it by :func:`open_output`, which also locks it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.place = self.path.resolve()
        self.manifest = self.place / HIDDEN / "manifest.jsonl"
        self.users = 0
        self._locks: list[Any] = []
        self._whole = False
        self._states: dict[Path, tuple[int, int]] = {}  # size and time of files that were found or made own
        self._lines = self._read()

    def _read(self) -> dict[str, set[str | None]]:
        """File -> the sha256 of its lines (None: any content); a line that a kill cut short is passed over."""
        lines: dict[str, set[str | None]] = {}
        if not self.manifest.is_file() or self.manifest.is_symlink():  # a pipe would never end
            return lines
        with contextlib.suppress(OSError):
            for line in self.manifest.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(*DAMAGED):
                    entry = json.loads(line)
                    lines.setdefault(entry["file"], set()).add(entry["sha256"])
        return lines

    def owns(self, path: Path) -> bool:
        """Is nothing at `path`, or only what samda wrote? A folder is own if all files in it are."""
        path = path.parent.resolve() / path.name
        if not os.path.exists(path):  # also where the name is too long for a file
            return not os.path.islink(path)  # a broken link is somebody's
        if path.is_dir():
            return all(self.owns(file) for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
        if not path.is_file() or not path.is_relative_to(self.place):  # behind a linked folder
            return False
        state = _state(path)
        if self._states.get(path) == state:
            return True
        name = path.relative_to(self.place).as_posix()
        if name not in self._lines:
            self._lines = self._read()  # another process may have written it
        known = self._lines.get(name, set())
        own = None in known or (bool(known) and file_sha256(path) in known)
        if not own and known:
            self._lines = self._read()
            own = file_sha256(path) in self._lines.get(name, set())
        if own:
            self._states[path] = state
        return own

    def refuse_links(self) -> None:
        """Raise UsageError unless the hidden folder holds regular files only: through a link, others are written."""
        hidden = self.place / HIDDEN
        inside = [hidden, *(hidden.iterdir() if hidden.is_dir() else ())] if os.path.lexists(hidden) else []
        for path in inside:
            if path.is_symlink() or not (path.is_dir() if path == hidden else path.is_file()):
                raise UsageError(f"{path} was not made by samda (a link, or no regular file); remove it")

    def refuse_foreign(self, files: Iterable[str | Path]) -> None:
        """Raise UsageError if one of `files`, relative to the folder, exists and is not samda's own."""
        foreign = [os.path.relpath(self.place / file, self.place) for file in files if not self.owns(self.place / file)]
        if foreign:
            more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
            raise UsageError(
                f"{self.path} holds files that would be replaced and that samda did not write, or that were changed "
                f"since: {', '.join(foreign[:NAMED])}{more}; choose another output folder, or move them away (to go on "
                f"in a copy of a folder, copy its hidden {HIDDEN}, too)"
            )

    def note(self, path: Path, content: Path | None) -> None:
        """Append the line of `path`, which is about to receive `content`; None makes it own with any content."""
        name = (path.parent.resolve() / path.name).relative_to(self.place).as_posix()
        entry = {"file": name, "sha256": None if content is None else file_sha256(content)}
        self.manifest.parent.mkdir(exist_ok=True)
        with self.manifest.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry)}")  # the line break first: the line before may be cut short
        self._lines.setdefault(name, set()).add(entry["sha256"])

    def written(self, path: Path) -> None:
        """A noted file is in place."""
        with contextlib.suppress(OSError):
            path = path.parent.resolve() / path.name
            self._states[path] = _state(path)

    def lock(self, part: Shard | None = None) -> None:
        """Refuse the folder if another command writes there: any, or with `part` one that is not another part.

        Then remove what killed commands left, unless other parts are at work.
        """
        own = f"part-{part.index}-of-{part.count}.lock" if part else "lock"
        main = self._acquire("lock", WAIT if part else 0)  # parts hold it only while they start
        try:
            names = [path.name for path in (self.place / HIDDEN).glob("part-*.lock") if path.name != own]
            busy = [name for name in names if not self._is_free(name)]
            if busy and part is None:
                raise self._in_use()
            if part is not None:
                self._locks = [self._acquire(own)]
            if not busy:
                self._sweep()
        except BaseException:
            _release(main)
            raise
        if part is None:
            self._whole, self._locks = True, [main]
        else:
            _release(main)

    def _is_free(self, name: str) -> bool:
        try:
            _release(self._acquire(name))
        except UsageError:
            return False
        return True

    def _acquire(self, name: str, wait: float = 0) -> Any:
        from filelock import FileLock, Timeout

        lock = FileLock(self.place / HIDDEN / name, timeout=wait, mode=0o666, thread_local=False)
        try:
            (self.place / HIDDEN).mkdir(exist_ok=True)
            lock.acquire()
        except Timeout:
            raise self._in_use() from None
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s); do not start two commands for it", self.path, error)
            return None
        return lock

    def _in_use(self) -> UsageError:
        return UsageError(
            f"{self.path} is already in use by another samda command; wait for its end, or choose another folder"
        )

    def unlock(self) -> None:
        """Let other commands write."""
        for lock in self._locks:
            _release(lock)
        self._locks = []

    def _sweep(self) -> None:
        """Remove unfinished files and folders of killed commands."""
        for pattern in (".*", "*/.*"):
            for path in list(self.place.glob(pattern)):
                if LITTER.fullmatch(path.name) and not path.parent.is_symlink():
                    remove(path)

    def _compact(self) -> None:
        """Keep the last line of each file: what was written again and again (the curve of a training)."""
        with contextlib.suppress(OSError, *DAMAGED):
            lines = [json.loads(line) for line in self.manifest.read_text(encoding="utf-8").splitlines() if line]
            last = {entry["file"]: entry for entry in lines}
            if len(last) < len(lines):
                temporary = self.manifest.with_suffix(".new")
                temporary.write_text("\n".join(json.dumps(entry) for entry in last.values()), encoding="utf-8")
                os.replace(temporary, self.manifest)

    def close(self) -> None:
        """Release the folder, once all its users have."""
        self.users -= 1
        if self.users == 0:
            _open.pop(self.place, None)
            if self._whole:
                self._compact()
            self.unlock()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_output(folder: str | Path, files: Iterable[str | Path] = (), part: Shard | None = None) -> OutputFolder:
    """Lock an output folder for this process, made with its parents if missing; `with` or `close` releases it.

    Args:
        folder: the folder; may be open in this process already.
        files: what will be written, relative to `folder`, as far as known.
        part: the share of the cases, where other processes write the others.

    Raises:
        UsageError: one of `files` is foreign, another command writes there, or the folder is not writable.
    """
    output = _open.get(Path(folder).expanduser().resolve())
    if output is None:
        output = OutputFolder(folder)
        output.refuse_links()
        output.refuse_foreign(files)  # before anything is made
        check_output_folder(folder)
        output.lock(part)
        _open[output.place] = output
    else:
        output.refuse_foreign(files)
    output.users += 1
    return output


def hold_output(folder: str | Path) -> None:
    """As :func:`open_output`, until :func:`release_output` or the end of the process, unless it is open already."""
    if Path(folder).expanduser().resolve() not in _open:
        open_output(folder)


def release_output(folder: str | Path) -> None:
    """End :func:`hold_output`."""
    output = _open.get(Path(folder).expanduser().resolve())
    if output is not None:
        output.close()


def output_of(path: str | Path) -> OutputFolder | None:
    """The open output folder that holds `path`; None if there is none."""
    if not _open:
        return None
    place = Path(path).absolute().parent.resolve()
    for parent in (place, *place.parents):
        if parent in _open:
            return _open[parent]
        if LITTER.fullmatch(parent.name):  # an unfinished folder is noted as a whole
            return None
    return None


def check_output_folder(folder: str | Path) -> Path:
    """The folder, created with its parents if missing; UsageError if it is not writable."""
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); choose another output folder") from error
    return folder


def try_writing(folder: str | Path) -> None:
    """Write an anonymous file into `folder`, to detect before the job that it is not writable (OSError)."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def remove(path: Path) -> None:
    """Remove a file or a folder, if possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _release(lock: Any) -> None:
    if lock is not None:
        lock.release()


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
