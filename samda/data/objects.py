# SPDX-License-Identifier: Apache-2.0
"""Scans in memory: a nibabel image stands wherever the path of a scan does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
from nibabel.spatialimages import SpatialImage

from samda.data.formats import Image, files_of, stem
from samda.errors import SamdaError

__all__ = ["copy_of", "name_of", "scan_path", "source_of"]


@contextmanager
def scan_path(scan: Image | SpatialImage) -> Iterator[str | list[str]]:
    """A path to read a scan from, or one a channel; a nibabel image lies in a temporary file while the block lasts.

    By way of a file, so that an object is read, and refused, exactly as `nibabel.save` and the path would be.
    """
    if not isinstance(scan, SpatialImage):
        yield str(scan) if isinstance(scan, str | Path) else [str(path) for path in scan]
        return
    with tempfile.TemporaryDirectory(prefix="samda-") as folder:
        path = Path(folder) / "image.nii"
        nib.save(copy_of(scan), path)
        try:
            yield str(path)
        except SamdaError as error:  # the file is nothing that the user knows
            raise type(error)(str(error).replace(str(path), f"the nibabel image {name_of(scan)!r}")) from error


def copy_of(scan: SpatialImage) -> SpatialImage:
    """The same voxels under a header of its own, which agrees with the affine; saving it renames nothing."""
    return type(scan)(scan.dataobj, scan.affine, scan.header)


def source_of(scan: Image | SpatialImage) -> Path | SpatialImage:
    """What gives a label map its grid and its headers: the first file of a scan, or the object that it is."""
    return scan if isinstance(scan, SpatialImage) else files_of(scan)[0]


def name_of(scan: Image | SpatialImage) -> str:
    """Name of the case: the file's without folder and suffix, "image" for an object that came from none."""
    if isinstance(scan, SpatialImage):
        file = scan.get_filename()
        return stem(file) if file else "image"
    return stem(files_of(scan)[0])
