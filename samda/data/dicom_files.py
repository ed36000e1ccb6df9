# SPDX-License-Identifier: Apache-2.0
"""DICOM files: which there are, which of them are the slices of one series, and their headers, by pydicom."""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import os
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from samda.errors import InputError, SamdaError

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # SEG, also as label map
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"  # RTSTRUCT
PREAMBLE = 128  # bytes before the mark "DICM"
OTHER_FILES = ("DICOMDIR",)
USED = ("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "PhotometricInterpretation")
CLASS = re.compile(r"[0-9]+(\.[0-9]+)+")
LONGEST_REASON = 200  # characters; damaged lengths make one value of all that follows, patient data included
UID_NAME = re.compile(r"[\w-][\w. -]{0,63}")  # anonymizers write letters, too


# -------------------------------------------------------------------------------------------------------------- headers


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's remarks on the spelling of values, which may quote patient data."""
    logger = logging.getLogger("pydicom")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


@contextmanager
def refusing_damage(path: Path, what: str) -> Iterator[None]:
    """pydicom's errors as InputErrors."""
    try:
        with quiet():
            yield
    except (SamdaError, MemoryError):
        raise
    except Exception as error:  # pydicom raises all kinds of errors for damaged files
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...") or type(error).__name__
        raise InputError(f"{path} is a damaged DICOM file: {what} ({reason}); replace or remove it") from error


def read_dataset(path: Path, **settings: Any) -> Dataset:
    """The file; mapped, as reading so many bytes as a damaged length states would take the memory for them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return pydicom.dcmread(content, force=True, **settings)  # type: ignore[arg-type]  # it reads, seeks and tells


def dicom_header(path: Path, tags: list[str] | None = None) -> Dataset:
    """The header of a file, or these tags of it; InputError if it is damaged."""
    header = _header(path, tags)
    if not _has_class(header):
        raise InputError(f"{path} is a damaged DICOM file: its SOPClassUID is no UID; replace or remove it")
    return header


def _header(path: Path, tags: list[str] | None = None) -> Dataset:
    with refusing_damage(path, "its header cannot be read"):
        header = read_dataset(path, stop_before_pixels=True, specific_tags=tags)
        for tag in USED:  # pydicom converts a value, and finds damage, when it is asked for
            header.get(tag)
        return header


def _has_class(header: Dataset) -> bool:
    """Is the class of an object a UID, or not stated?"""
    kind = str(header.get("SOPClassUID") or "").strip()
    return not kind or (len(kind) <= 64 and CLASS.fullmatch(kind) is not None)


def is_dicom(path: Path) -> bool:
    """Does a file begin as a DICOM file, with or without preamble?"""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            head = file.read(PREAMBLE + 4)
    except OSError:
        return False
    plain = head[:2] in (b"\x02\0", b"\x08\0") and head[2:4] in (b"\0\0", b"\x01\0", b"\x05\0", b"\x08\0", b"\x16\0")
    return head[PREAMBLE:] == b"DICM" or plain


def _is_image(path: Path) -> bool:
    try:
        return _shows_image(dicom_header(path))
    except InputError:
        return True


def _kind(header: Dataset) -> str:
    """The name of the class of an object; empty for none that the standard has."""
    return UID(str(header.get("SOPClassUID", ""))).name


def _claims_image(header: Dataset) -> bool:
    """Should this be an image by its class, or does it state none, as damaged files do?"""
    kind = _kind(header)
    return not kind or "Image Storage" in kind or not _has_class(header)


def _shows_image(header: Dataset) -> bool:
    """Is this an image? A segmentation has pixels, too, but is a label."""
    return "Rows" in header and header.get("SOPClassUID") not in SEGMENTATIONS


def dicom_modality(path: Path) -> str | None:
    """The modality in the header of a DICOM file or series: "CT", "MR", "PT", ..."""
    return next((str(dicom_header(file).get("Modality", "")).strip() or None for file in series_files(path)), None)


# --------------------------------------------------------------------------------------------------------------- series


def has_dicom(folder: str | Path) -> bool:
    """Does `folder` directly contain DICOM images? A damaged file counts, so that reading the folder names it."""
    return any(_is_image(path) for path in _files(Path(folder)) if is_dicom(path))


def series_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The series of a folder, a path for each, and its files that are no images.

    One series is the folder itself. Of several, each is FOLDER/UID (its SeriesInstanceUID; readers take that for a
    path), or its file if it has but one. The folder stands for files without a usable UID, which its reader refuses.
    """
    uids = _series_uids(folder)
    groups: dict[str, list[Path]] = {}
    for path, (uid, image) in uids.items():
        groups.setdefault(uid, []).extend([path] if image else [])
    if len([files for files in groups.values() if files]) < 2:
        return [folder], []
    found = [
        path
        for uid, files in groups.items()
        for path in (files if len(files) < 2 else [folder / uid if UID_NAME.fullmatch(uid) else folder])
    ]
    return found, [path for path, (uid, image) in uids.items() if not image and folder / uid not in found]


def no_images(folder: Path) -> list[Path]:
    """The DICOM files in a folder that are no images."""
    return [path for path, (_, image) in _series_uids(folder).items() if not image]


def is_series(path: Path) -> bool:
    """Is this a folder, or FOLDER/UID of :func:`series_in`?"""
    return path.is_dir() or bool(_files_of_uid(path))


def series_files(path: Path) -> list[Path]:
    """The DICOM files of a folder or of FOLDER/UID; a file itself."""
    if path.is_file():
        return [path]
    return [file for file in _files(path) if is_dicom(file)] if path.is_dir() else _files_of_uid(path)


def _files_of_uid(path: Path) -> list[Path]:
    if not UID_NAME.fullmatch(path.name) or os.path.lexists(path) or not path.parent.is_dir():
        return []
    uids = _series_uids(path.parent)
    return [file for file, (uid, _) in uids.items() if uid == path.name]


def _series_uids(folder: Path) -> dict[Path, tuple[str, bool]]:
    """SeriesInstanceUID of each DICOM file in a folder, and whether it is an image (or damaged)."""
    return _read_uids(folder, folder.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_uids(folder: Path, _changed: int) -> dict[Path, tuple[str, bool]]:
    found, lost = {}, []
    for path in filter(is_dicom, _files(folder)):
        found[path], sound = ("", True), False
        with contextlib.suppress(InputError):
            header = _header(path, ["SeriesInstanceUID", "SOPClassUID", "Rows"])
            image = _shows_image(header) or _claims_image(header)
            found[path] = str(header.get("SeriesInstanceUID", "")), image
            sound = not image or (_shows_image(header) and _has_class(header))
        lost += [] if sound or found[path][0] else [path]
    uids = {uid for uid, image in found.values() if image and uid}
    return found | {path: (uid, True) for path in lost for uid in uids if len(uids) == 1}  # a slice of the only series


def one_series(folder: Path) -> dict[Path, Dataset]:
    """The headers of the files of the one series in a folder, or of FOLDER/UID.

    A file that cannot be parsed is refused, as it may be a slice; DICOM objects other than images are passed over.
    """
    found = {path: dicom_header(path) for path in series_files(folder)}
    other = {path: header for path, header in found.items() if not _shows_image(header)}
    images = {path: header for path, header in found.items() if path not in other}
    if not images:
        raise InputError(f"{folder} contains no DICOM series; give a scan, or the folder of one series")
    for path, header in other.items():
        if _claims_image(header):
            raise InputError(f"{path} is a damaged DICOM file or not an image; replace or remove it")
        warnings.warn(f"{path} is no image ({_kind(header)}) and is passed over", stacklevel=2)
    endings = {path.suffix.lower() for path in images}
    for path in _files(folder):
        if path not in found and path.suffix.lower() in endings:
            raise InputError(f"{path} is a damaged DICOM file or not an image; replace or remove it")
    series: dict[str, dict[Path, Dataset]] = {}
    for path, header in images.items():
        with refusing_damage(path, "its header cannot be read"):
            series.setdefault(str(header.get("SeriesInstanceUID", "")), {})[path] = header
    if len(series) > 1:
        names = ", ".join(
            f"{_series_name(files)!r} ({len(files)} files, UID {uid:.64})" for uid, files in series.items()
        )
        remedy = f"use one folder per series, or give one as {folder}/UID"
        raise InputError(f"{folder} contains {len(series)} DICOM series: {names}; {remedy}")
    return images


def _series_name(files: dict[Path, Dataset]) -> str:
    path, header = next(iter(files.items()))
    return str(header.get("SeriesDescription", "")).strip()[:64] or path.name


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files and folders; nothing if it is none."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _files(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.name not in OTHER_FILES and path.is_file()]
