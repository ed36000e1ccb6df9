# SPDX-License-Identifier: Apache-2.0
"""Files and folders complete or not at all: written under a hidden name beside the place, then renamed."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from samda.errors import InputError

__all__ = ["check_room", "new_folder", "plain", "replacing", "try_writing", "write_json", "write_text"]


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
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
