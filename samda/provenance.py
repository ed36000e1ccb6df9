# SPDX-License-Identifier: Apache-2.0
"""The audit record: one JSON object per case, without pixel data and without names.

`record.schema.json` beside this file is its published schema. A record names the input, the model and the configuration
by sha256, so that adapting the same files again gives the same label map (`labels_sha256`), whoever does it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from samda.errors import InputError
from samda.io import Image, file_sha256, files_of, plain, write_text
from samda.version import __version__

RECORD_VERSION = 1


def schema() -> dict[str, Any]:
    """The JSON schema of a record (draft 2020-12)."""
    return json.loads(Path(__file__).with_name("record.schema.json").read_text(encoding="utf-8"))


def validate_record(record: Mapping[str, Any]) -> None:
    """Check a record against the published schema.

    Raises:
        InputError: naming the field and what is wrong with it.
    """
    import jsonschema

    try:
        jsonschema.validate(dict(record), schema())
    except jsonschema.ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "the record"
        raise InputError(f"record of case {record.get('case_id')!r}: {place}: {error.message}") from error


def canonical_json(value: Any) -> str:
    """One line of JSON, keys sorted; numbers that are not finite become null, since JSON has no NaN."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_of(value: Any) -> str:
    """sha256 of bytes, an array (dtype, shape and content) or plain values (their canonical JSON)."""
    if isinstance(value, np.ndarray):
        head = canonical_json([str(value.dtype), list(value.shape)]).encode()
        return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()
    data = value if isinstance(value, bytes) else canonical_json(value).encode()
    return hashlib.sha256(data).hexdigest()


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """sha256 of named tensors: names, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{sha256_of(tensors[name].detach().cpu().numpy())}\n".encode())
    return digest.hexdigest()


def path_sha256(image: Image) -> str:
    """sha256 of a file, or of a folder's files (a DICOM series): each file's content, in the order of their hashes.

    Neither names nor times enter, so a series keeps its hash when it is exported again under other file names. Of
    several channel files it is that of their hashes, in the order of the channels.
    """
    paths = files_of(image)
    if len(paths) > 1:
        return hashlib.sha256("\n".join(map(path_sha256, paths)).encode()).hexdigest()
    path = paths[0]
    if not path.is_dir():
        return file_sha256(path)
    hashes = sorted(file_sha256(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def pseudonym(input_sha256: str) -> str:
    """A name for a case that says nothing about the patient and is the same wherever the same scan is adapted."""
    return f"case-{input_sha256[:12]}"


def now() -> str:
    """Time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    import monai
    import torch

    return {"samda": __version__, "torch": str(torch.__version__), "monai": str(monai.__version__)}


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record of a case.

    Raises:
        InputError: not JSON, or not a record.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable record ({error}); delete its folder and run again") from error
    if not isinstance(value, dict) or "record_version" not in value:
        raise InputError(f"{path}: not a record of samda adapt; delete its folder and run again")
    return value


def write_lines(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per record."""
    write_text(path, "".join(canonical_json(record) + "\n" for record in records))


def conceal(value: Any, names: Mapping[str, str]) -> Any:
    """Plain values with every name in their texts replaced: files and cases may be named after patients.

    Args:
        value: texts, alone or in mappings and lists; anything else stays.
        names: name -> what stands for it. One of one or two letters is replaced only where it is the whole text.
    """
    if isinstance(value, Mapping):
        return {conceal(key, names): conceal(entry, names) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [conceal(entry, names) for entry in value]
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            if value == name or (len(name) > 2 and name in value):
                value = value.replace(name, names[name])
    return value
