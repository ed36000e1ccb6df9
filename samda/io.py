# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files and folders: written under a hidden name in the same folder, then renamed.

Where a command has opened an output folder (:mod:`samda.output`), what it did not write is not replaced.

Also: YAML 1.2 (:func:`load_yaml`), verified downloads, and paths of packaged configs and bundles (in the wheel or the
checkout) and of the cache.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from samda.errors import InputError, UsageError, WeightsError, printable
from samda.output import file_sha256 as file_sha256
from samda.output import output_of, remove

CGROUP = Path("/sys/fs/cgroup")
MOST_NODES, LONGEST_YAML, DEEPEST_YAML = 100_000, 1_000_000, 100  # values, characters, brackets of a YAML document
DOWNLOAD_TIMEOUT = 10  # seconds without data

# PyYAML implements YAML 1.1, which parses `1e-3`, `1.5e3` and `-.5` as strings; in YAML 1.2 and JSON they are numbers
FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")

# what spreadsheets take for a formula, behind spaces, too; a plain number is none
FORMULA = re.compile(r"(?!\s*[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?$)(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")

UNFINISHED = re.compile(r"\.(\d+)-[0-9a-f]{8}-")  # head of the name of an unfinished file: the process that writes it
UNTOUCHED = 2.0  # seconds after which an unfinished file of no process is left over; another machine may write it

Image = str | Path | Sequence[str | Path]  # one file or DICOM folder, or one file per channel


def files_of(image: Image) -> list[Path]:
    """The files (or DICOM folder) of an image, one per channel; the first defines its name and grid."""
    return [Path(image)] if isinstance(image, str | Path) else [Path(path) for path in image]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden file with the suffix of `path` in the same folder, renamed to `path` at the end of the block.

    Readers never see a partial file, and two processes do not write to the same file. Parent folders are created. The
    mode is that of any new file (umask), whatever the writer makes of it.

    Raises:
        UsageError: an output folder is open, and samda did not write the file at `path`.
    """
    path = Path(path)
    output = output_of(path)
    if output is not None:
        output.refuse_foreign([path.absolute()])
    else:
        _sweep(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        if output is not None:
            output.note(path, temporary)
        os.replace(temporary, path)
        if output is not None:
            output.written(path)
    except OSError as error:  # name the target instead of the hidden file
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    """The name of an unfinished file or folder; long names, which may be at the file system's limit, are cut."""
    head = f".{os.getpid()}-{secrets.token_hex(4)}-"
    return path.with_name(head + path.name[max(0, len(head) + len(path.name.encode()) - 255) :])


def _sweep(path: Path) -> None:
    """Remove what a killed process of this machine left of `path`, unfinished; in an output folder all is removed."""
    for other in path.parent.glob(f".*-{glob.escape(path.name)}"):
        found = UNFINISHED.fullmatch(other.name.removesuffix(path.name))
        if found and time.time() - other.lstat().st_mtime > UNTOUCHED:
            try:
                os.kill(int(found[1]), 0)
            except (ProcessLookupError, OverflowError):
                remove(other)
            except OSError:  # of another user
                continue


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy the content of a file."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def regular_file(path: str | Path, root: str | Path | None = None) -> Path:
    """`path`, if it is a regular file that fits into memory: a pipe or device may never end.

    Args:
        root: folder that it must lie in, links followed: those of a folder from others may lead to any file.

    Raises:
        OSError: it is not.
    """
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if root is not None and not path.resolve().is_relative_to(Path(root).resolve()):
        raise OSError(errno.EINVAL, f"a link out of the folder, to {path.resolve()}", str(path))
    if status.st_size > free_memory():
        raise OSError(errno.EFBIG, f"{status.st_size / 1e9:.1f} GB, more than the free memory", str(path))
    return path


def parse_json(text: str | bytes, **settings: Any) -> Any:
    """`json.loads`, which raises only ValueError, also for a key that an object has twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique, **settings)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def free_memory() -> float:
    """Free main memory in bytes, within the limits of the process (ulimit -v) and of its container (cgroup)."""
    free = [math.inf]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text("utf-8")) for name in ("memory.max", "memory.current"))
        cache = (CGROUP / "memory.stat").read_text("utf-8").split()  # counts as used, but makes room
        free.append(limit - used + int(cache[cache.index("file") + 1]))
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
            free.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def check_room(folder: str | Path, needed: float) -> None:
    """Raise InputError if the disk of `folder` has less than `needed` bytes free.

    For writers that kill the process on a full disk.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {free / 1e6:.0f} MB left where {needed / 1e6:.0f} MB are needed; make room, or "
            "choose another folder"
        )


def refuse_full(folder: Path) -> None:
    """Refuse an output that is a file, or a folder that holds something."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"output {folder} exists and is not an empty folder; choose another name")


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder next to `path`, renamed to `path` at the end of the block and removed on failure.

    With `overwrite`, it takes the place of the folder that is there, which stays until then.

    Raises:
        OSError: `path` is a file or, without `overwrite`, a folder that is not empty.
        UsageError: an output folder is open, and samda did not write the folder at `path`.
    """
    path = Path(path)
    output = output_of(path)
    if output is not None:
        output.refuse_foreign([path.absolute()])
    else:
        _sweep(path)
    temporary, before = _hidden(path), _hidden(path)
    temporary.mkdir()
    try:
        yield temporary
        files = [file for file in temporary.rglob("*") if file.is_file()]
        if output is not None:
            for file in files:
                output.note(path / file.relative_to(temporary), file)
        if overwrite and path.is_dir():
            os.rename(path, before)
        elif path.is_dir():
            path.rmdir()
        os.rename(temporary, path)
    finally:
        remove(temporary)
        remove(before)


def save_tensors(value: Any, path: str | Path) -> None:
    """`torch.save`, with equal bytes for equal values: given a path, PyTorch writes its name into the file."""
    import torch

    with Path(path).open("wb") as file:
        torch.save(value, file)


def write_text(path: str | Path, text: str) -> None:
    """Write a text (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as JSON, see :func:`plain`."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV. Texts that a spreadsheet would take for a formula get an apostrophe in front; numbers do not."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_no_formula(cell) for cell in row] for row in rows])
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    return f"'{printable(cell)}" if FORMULA.match(cell) else printable(cell)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return lines


def plain(value: Any) -> Any:
    """JSON types: arrays become lists, numpy numbers numbers, paths strings, and NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # arrays and numbers of numpy, which is not imported here: --help must be fast
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


class _Loader(yaml.SafeLoader):
    """Plain values only, as `yaml.safe_load`."""

    def get_single_node(self) -> Any:
        """The document, refused if its aliases make it large or endless: 500 bytes may stand for gigabytes."""
        node = super().get_single_node()
        _count_nodes(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, with an error for duplicate keys, of which PyYAML keeps the last."""
        seen: list[Any] = []  # a list, because keys may not be hashable
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """Nodes of a document with every alias replaced by what it stands for."""
    if id(node) in known:
        if not known[id(node)]:  # within itself
            raise yaml.composer.ComposerError(None, None, "an alias contains itself", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    value = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = [part for entry in value for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = count = 1 + sum(_count_nodes(part, known) for part in parts)
    if count > MOST_NODES:
        raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES} values", node.start_mark)
    return count


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text.

    Raises:
        yaml.YAMLError: invalid YAML, duplicate keys, values that do not fit their tag, too many or too nested values.

    Example:
        >>> load_yaml("{rate: 1e-3, name: 'e1'}")
        {'rate': 0.001, 'name': 'e1'}
    """
    depth = itertools.accumulate(("[{".count(c) - "]}".count(c) for c in text if c in "[]{}"), initial=0)
    if len(text) > LONGEST_YAML or max(depth) > DEEPEST_YAML:  # PyYAML takes minutes for these
        raise yaml.YAMLError(f"longer than {LONGEST_YAML} characters, or nested too deeply")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:  # `!!int x`, `? {}`
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from error


def packaged(*parts: str) -> Path:
    """Path of a packaged file or folder, for example `packaged("bundles", "sam_segmentation")`."""
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"{'/'.join(parts)} is not part of this installation of samda; reinstall it")


def shipped_tasks() -> dict[str, Path]:
    """The task files of samda by name."""
    return {path.stem: path for path in packaged("configs", "tasks").glob("*.yaml")}


def cache_dir() -> Path:
    """Folder of downloads: `SAMDA_CACHE`, else `XDG_CACHE_HOME/samda`, else `~/.cache/samda`."""
    chosen = os.environ.get("SAMDA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samda"
    except RuntimeError as error:  # containers run under user ids without a name and a home
        raise UsageError("this user has no home folder for downloads; set SAMDA_CACHE to a folder") from error


def check_sha256(path: Path, expected: str, found: str | None = None) -> None:
    """Raise WeightsError if the SHA-256 of a file (`found`, if already known) is not the expected one."""
    found = found or file_sha256(path)
    if found != expected:
        raise WeightsError(f"{path} has sha256 {found}, expected {expected}; delete the file and fetch it again")


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path` and verify it; on failure, raise WeightsError and leave no file."""
    import http.client  # keeps `samda --help` fast
    import urllib.request

    with replacing(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(f"{url}: {error}") from error
        found = file_sha256(temporary)
        if found != sha256:
            raise WeightsError(f"{url}: the file has sha256 {found}, expected {sha256}")
