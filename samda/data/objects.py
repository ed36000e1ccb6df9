# SPDX-License-Identifier: Apache-2.0
"""Scans in memory: a nibabel image stands wherever the path of a scan does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
from nibabel.spatialimages import SpatialImage

from samda.data.readers import stem
from samda.errors import SamdaError

__all__ = ["copy_of", "name_of", "scan_path"]


@contextmanager
def scan_path(scan: str | Path | SpatialImage) -> Iterator[Path]:
    """A path to read a scan from; a nibabel image lies in a temporary file while the block lasts.

    By way of a file, so that an object is read, and refused, exactly as `nibabel.save` and the path would be.
    """
    if not isinstance(scan, SpatialImage):
        yield Path(scan)
        return
    with tempfile.TemporaryDirectory(prefix="samda-") as folder:
        path = Path(folder) / "image.nii"
        nib.save(copy_of(scan), path)
        try:
            yield path
        except SamdaError as error:  # the file is nothing that the user knows
            raise type(error)(str(error).replace(str(path), f"the nibabel image {name_of(scan)!r}")) from error


def copy_of(scan: SpatialImage) -> SpatialImage:
    """The same voxels under a header of its own, which agrees with the affine; saving it renames nothing."""
    return type(scan)(scan.dataobj, scan.affine, scan.header)


def name_of(scan: str | Path | SpatialImage) -> str:
    """Name of the case: the file's without folder and suffix, "image" for an object that came from none."""
    if isinstance(scan, SpatialImage):
        file = scan.get_filename()
        return stem(file) if file else "image"
    return stem(scan)
