# SPDX-License-Identifier: Apache-2.0
"""Hashes and downloads of weight files."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import urllib.request
from pathlib import Path

from samda.errors import WeightsError
from samda.io import replacing

TIMEOUT = 10  # seconds without an answer


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, found: str | None = None) -> None:
    """Refuse a file that is not the expected one.

    Args:
        path: the file.
        expected: its sha256.
        found: the sha256 it has, if known already.

    Raises:
        WeightsError: naming the file and both hashes.
    """
    found = found or sha256_of(path)
    if found != expected:
        raise WeightsError(f"{path} has sha256 {found}, expected {expected}; delete the file and fetch it again")


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path` and check it.

    Raises:
        WeightsError: the address cannot be reached, or what came is not the expected file; nothing is left then.
    """
    with replacing(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(f"{url}: {error}") from error
        found = sha256_of(temporary)
        if found != sha256:
            raise WeightsError(f"{url} brought a file with sha256 {found}, expected {sha256}")
