# SPDX-License-Identifier: Apache-2.0
"""Files and folders complete or not at all: written under a hidden name beside the place, then renamed.

Also: YAML by the rules of version 1.2 (:func:`load_yaml`), downloads checked by their hash, and where files lie:
packaged configs and bundles (in the wheel or the checkout), and the cache of what is fetched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from samda.errors import InputError, WeightsError

DOWNLOAD_TIMEOUT = 10  # seconds without an answer

# PyYAML follows YAML 1.1, which reads `1e-3`, `1.5e3` and `-.5` as words; YAML 1.2 and JSON read numbers
FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")


Image = str | Path | Sequence[str | Path]  # one file or DICOM folder, or one file per channel


def files_of(image: Image) -> list[Path]:
    """The files (or DICOM folder) of an image, one per channel; the first gives it its name and its grid."""
    return [Path(image)] if isinstance(image, str | Path) else [Path(path) for path in image]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden name of the same type beside `path`, renamed to `path` when the block ends well.

    A reader never meets half a file, and two processes do not write into one another. Folders above it are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a writer's hidden name, or none, tells a person nothing
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def try_writing(folder: str | Path) -> None:
    """Write a file without a name into `folder`, to learn before the work whether anything can be written there.

    Raises:
        OSError: what the results would meet, too.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_room(folder: str | Path, needed: float) -> None:
    """Refuse a disk without room for `needed` bytes, for writers that end the whole process there.

    Args:
        folder: an existing folder on the disk.
        needed: bytes.

    Raises:
        InputError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {free / 1e6:.0f} MB left where {needed / 1e6:.0f} MB are needed; make room, or "
            "choose another folder"
        )


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path`, renamed to `path` when the block ends well; else nothing is left of it.

    Raises:
        OSError: `path` is a file, or a folder that holds something.
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
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as JSON, see :func:`plain`."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """JSON's own types: arrays as lists, numpy numbers as numbers, paths as texts, what is not finite as None."""
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
        """The mapping; PyYAML alone would keep the last of several equal keys and say nothing."""
        seen: list[Any] = []  # of YAML keys, which a set may not take
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text.

    Raises:
        yaml.YAMLError: it is none, or a key stands twice in a mapping.

    Example:
        >>> load_yaml("{rate: 1e-3, name: 'e1'}")
        {'rate': 0.001, 'name': 'e1'}
    """
    return yaml.load(text, Loader=_Loader)


def packaged(*parts: str) -> Path:
    """Path of a packaged file or folder, for instance `packaged("bundles", "sam_segmentation")`.

    Raises:
        FileNotFoundError: neither the wheel nor the checkout holds it.
    """
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"{'/'.join(parts)} is not part of this installation of samda; reinstall it")


def shipped_tasks() -> dict[str, Path]:
    """The task files that come with samda, by their names."""
    return {path.stem: path for path in packaged("configs", "tasks").glob("*.yaml")}


def cache_dir() -> Path:
    """Folder of everything samda fetches: `SAMDA_CACHE`, else `XDG_CACHE_HOME/samda`, else `~/.cache/samda`."""
    chosen = os.environ.get("SAMDA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samda"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, found: str | None = None) -> None:
    """Refuse a file whose SHA-256 (`found`, if known already) is not the expected one.

    Raises:
        WeightsError: naming the file and both hashes.
    """
    found = found or file_sha256(path)
    if found != expected:
        raise WeightsError(f"{path} has sha256 {found}, expected {expected}; delete the file and fetch it again")


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path` and check it.

    Raises:
        WeightsError: the address cannot be reached, or what came is not the expected file; nothing is left then.
    """
    import http.client  # here, as `samda --help` must be fast
    import urllib.request

    with replacing(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(f"{url}: {error}") from error
        found = file_sha256(temporary)
        if found != sha256:
            raise WeightsError(f"{url} brought a file with sha256 {found}, expected {sha256}")
