# SPDX-License-Identifier: Apache-2.0
"""Provenance of results: sha256 of files, tensors and plain values, versions, times, and pseudonyms."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from samda.data.dicom_files import series_files
from samda.io import Image, file_sha256, files_of, plain
from samda.version import __version__


def canonical_json(value: Any) -> str:
    """One line of JSON with sorted keys; NaN and infinity become null."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_of(value: Any) -> str:
    """sha256 of bytes, an array (dtype, shape and content) or plain values (their canonical JSON)."""
    if isinstance(value, np.ndarray):
        head = canonical_json([str(value.dtype), list(value.shape)]).encode()
        digest = hashlib.sha256(head)
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)  # without a copy: maps are large
        return digest.hexdigest()
    data = value if isinstance(value, bytes) else canonical_json(value).encode()
    return hashlib.sha256(data).hexdigest()


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """sha256 of named tensors (names, shapes and values), sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{sha256_of(tensors[name].detach().cpu().numpy())}\n".encode())
    return digest.hexdigest()


def path_sha256(image: Image) -> str:
    """sha256 of a file, or of the content of a folder's files (a DICOM series), sorted by hash.

    Names and times are not included, so the hash of a series does not change when it is exported under other names. For
    several channel files it is the hash of their hashes, in the order of the channels.
    """
    paths = files_of(image)
    if len(paths) > 1:
        return hashlib.sha256("\n".join(map(path_sha256, paths)).encode()).hexdigest()
    path = paths[0]
    if path.is_file():
        return file_sha256(path)
    files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    hashes = sorted(map(file_sha256, files if path.is_dir() else series_files(path)))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def pseudonym(input_sha256: str) -> str:
    """A name of a case that does not identify the patient and is the same for the same scan."""
    return f"case-{input_sha256[:12]}"


def now() -> str:
    """Time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def versions() -> dict[str, str]:
    """Versions that affect numerical results."""
    import monai
    import torch

    return {"samda": __version__, "torch": str(torch.__version__), "monai": str(monai.__version__)}


def conceal(value: Any, names: Mapping[str, str]) -> Any:
    """Replace names (name -> replacement) in all texts of plain values: files and cases may be named after patients.

    A name matches if no letter or digit is adjacent. Names of one or two characters may be words of a message and match
    only in quotes, after "case ", and as the whole text.
    """
    if isinstance(value, Mapping):
        return {conceal(key, names): conceal(entry, names) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [conceal(entry, names) for entry in value]
    if not isinstance(value, str) or value in names:
        return names.get(value, value) if isinstance(value, str) else value
    patterns = []
    for name in sorted(filter(None, names), key=len, reverse=True):  # a path before its file name
        whole = rf"(?<![^\W_]){re.escape(name)}(?![^\W_])"
        patterns.append(whole if len(name) > 2 else rf"""(?:(?<=['"])|(?<=\bcase )){whole}""")
    return re.sub("|".join(patterns), lambda found: names[found.group()], value) if patterns else value
