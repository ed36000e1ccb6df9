# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files and folders: written under a hidden name in the same folder, then renamed.

Also: YAML 1.2 (:func:`load_yaml`), verified downloads, and paths of packaged configs and bundles (in the wheel or the
checkout) and of the cache.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from samda.errors import InputError, WeightsError, printable

DOWNLOAD_TIMEOUT = 10  # seconds without data

# PyYAML implements YAML 1.1, which parses `1e-3`, `1.5e3` and `-.5` as strings; in YAML 1.2 and JSON they are numbers
FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")

# what spreadsheets take for a formula, behind spaces, too; a plain number is none
FORMULA = re.compile(r"(?!\s*[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?$)(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")

Image = str | Path | Sequence[str | Path]  # one file or DICOM folder, or one file per channel


def files_of(image: Image) -> list[Path]:
    """The files (or DICOM folder) of an image, one per channel; the first defines its name and grid."""
    return [Path(image)] if isinstance(image, str | Path) else [Path(path) for path in image]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden file with the suffix of `path` in the same folder, renamed to `path` at the end of the block.

    Readers never see a partial file, and two processes do not write to the same file. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # name the target instead of the hidden file
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def try_writing(folder: str | Path) -> None:
    """Write an anonymous file into `folder`, to detect before the job that it is not writable (OSError)."""
    with tempfile.TemporaryFile(dir=folder):
        pass


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


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder next to `path`, renamed to `path` at the end of the block and removed on failure.

    Raises:
        OSError: `path` is a file or a folder that is not empty.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, with an error for duplicate keys, of which PyYAML keeps the last."""
        seen: list[Any] = []  # a list, because keys may not be hashable
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text.

    Raises:
        yaml.YAMLError: invalid YAML or duplicate keys.

    Example:
        >>> load_yaml("{rate: 1e-3, name: 'e1'}")
        {'rate': 0.001, 'name': 'e1'}
    """
    return yaml.load(text, Loader=_Loader)


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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samda"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
