# SPDX-License-Identifier: Apache-2.0
"""File formats by name, and the files that make up one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samda.errors import InputError

__all__ = [
    "NIFTI_SUFFIXES",
    "PICTURE_SUFFIXES",
    "SCAN_SUFFIXES",
    "VOLUME_SUFFIXES",
    "Image",
    "files_of",
    "not_a_scan",
    "stem",
]

Image = str | Path | Sequence[str | Path]  # one file or DICOM folder, or one file a channel

NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = (*VOLUME_SUFFIXES, ".dcm", *PICTURE_SUFFIXES)


def files_of(image: Image) -> list[Path]:
    """The files (or DICOM folder) of an image, one a channel; the first gives it its name and its grid."""
    return [Path(image)] if isinstance(image, str | Path) else [Path(path) for path in image]


def stem(path: str | Path) -> str:
    """Name of a scan without folder and known suffix: `a/liver_0.nii.gz` -> `liver_0`."""
    name = Path(path).name
    for suffix in sorted(SCAN_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def not_a_scan(path: Path, error: BaseException) -> InputError:
    """The refusal of a file that its reader cannot read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1].replace(str(path), path.name)
    known = ", ".join(SCAN_SUFFIXES)
    return InputError(f"{path} cannot be read as a scan ({reason}); give a complete file ({known}) or a DICOM folder")
