# SPDX-License-Identifier: Apache-2.0
"""File formats: suffixes, NRRD and MetaImage (by SimpleITK), 2-D images (by Pillow), and scans in memory.

Affines map voxel indices to RAS mm. A nibabel image is accepted in place of the path of a scan. A file
that is cut short or that its reader warns of is refused.
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import SimpleITK as sitk
from nibabel.spatialimages import SpatialImage

from samda.errors import InputError, SamdaError
from samda.io import Image, files_of

NIFTI_SUFFIXES = (".nii", ".nii.gz")
NIBABEL_SUFFIXES = (*NIFTI_SUFFIXES, ".mgz", ".mgh", ".hdr", ".img")  # MGH of FreeSurfer, and NIfTI as two files
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUME_SUFFIXES = (*NIBABEL_SUFFIXES[:-1], ".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = (*VOLUME_SUFFIXES, ".dcm", *PICTURE_SUFFIXES)
ORIENTATION = 274  # tag of EXIF and TIFF


def stem(path: str | Path) -> str:
    """Name of a scan without folder and suffix: `a/liver_0.nii.gz` -> `liver_0`."""
    name = Path(path).name
    for suffix in sorted(SCAN_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def not_a_scan(path: Path, error: BaseException) -> InputError:
    """The error for a file that its reader cannot read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1].replace(str(path), path.name)
    if reason.startswith("Reason:"):  # of ITK: an error of the system, from any time before
        reason = "its data are cut short, or not what its header states"
    known = ", ".join(SCAN_SUFFIXES)
    return InputError(f"{path} cannot be read as a scan ({reason}); give a complete file ({known}) or a DICOM folder")


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
T = TypeVar("T")


# --------------------------------------------------------------------------------------------------- NRRD and MetaImage


class _Messages(sitk.LoggerBase):  # type: ignore[misc]
    """Collects ITK's warnings, which would be printed over several lines."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def DisplayText(self, text: str) -> None:
        """Collect a message of any kind."""
        self.texts.append(text)

    DisplayWarningText = DisplayErrorText = DisplayGenericOutputText = DisplayText

    def DisplayDebugText(self, text: str) -> None:
        """Leave out a debug message."""


def _refusing_warnings(path: Path, read: Callable[[], T]) -> T:
    """The result of an ITK reader; its errors and warnings are InputErrors."""
    messages = _Messages()
    before = messages.SetAsGlobalITKLogger()
    try:
        result = read()
    except RuntimeError as error:
        raise not_a_scan(path, error) from error
    finally:
        before.SetAsGlobalITKLogger()
    if messages.texts:
        raise not_a_scan(path, RuntimeError(" ".join(messages.texts[0].split("): ", 1)[-1].split())))
    return result


def itk_image(path: Path) -> sitk.Image:
    """An image read by ITK."""
    return _refusing_warnings(path, lambda: sitk.ReadImage(str(path)))


def read_itk(path: Path, pixels: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z[, C]) and affine of a NRRD or MetaImage; zeros (X, Y[, Z ...]) without `pixels`."""
    if pixels:
        image = itk_image(path)
        return _itk_array(image), _itk_affine(image)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    _refusing_warnings(path, reader.ReadImageInformation)
    return np.broadcast_to(np.int16(0), reader.GetSize()), _itk_affine(reader)


def _itk_array(image: sitk.Image) -> np.ndarray:
    """The voxels as (X, Y, Z[, C]); ITK returns ([T,] Z, Y, X[, C])."""
    array = sitk.GetArrayFromImage(image)
    axes = list(range(image.GetDimension()))[::-1]
    array = array.transpose(axes + list(range(len(axes), array.ndim)))
    if image.GetDimension() == 2:
        array = array[:, :, None]
    return array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array


def _itk_affine(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    affine = np.eye(4)
    dims = image.GetDimension()
    n = min(dims, 3)
    direction = np.reshape(image.GetDirection(), (dims, dims))[:n, :n]
    affine[:n, :n] = direction * np.asarray(image.GetSpacing())[:n]
    affine[:n, 3] = image.GetOrigin()[:n]
    return LPS_TO_RAS @ affine


# ----------------------------------------------------------------------------------------------------------- 2-D images


def read_picture(path: Path, indices: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (X, Y, 1[, C]) and affine of a 2-D image, upright as viewers show it (EXIF and TIFF orientation).

    2-D images have no physical size: pixels are 1 mm. With `indices`, an image with a palette has its indices instead
    of its colors.
    """
    try:
        with any_size(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # remarks on damaged files
            image: Any = PIL.Image.open(path)
            _refuse_pages(path, getattr(image, "n_frames", 1))
            wide = image.mode.startswith("RGB") and any("16" in str(tile[3]) for tile in image.tile)
            ends = [(tile[1][2], tile[1][3]) for tile in image.tile if tile[0] == "raw"]
            if image.format == "TIFF" and ends and max(ends) == image.size[::-1]:
                image._size = max(ends)  # Pillow takes rows for columns in a plain TIFF that lies on its side
            image.load()  # turns a TIFF and removes its tag
            orientation = image.getexif().get(ORIENTATION, 1)
            array = None if wide else _pixels(image, path, indices)
    except (PIL.UnidentifiedImageError, KeyError) as error:
        if not path.name.lower().endswith((".tif", ".tiff")):
            raise not_a_scan(path, error) from error
        array, orientation = None, _tiff_orientation(path)
    except (OSError, ValueError, SyntaxError, UserWarning, EOFError) as error:
        raise not_a_scan(path, error) from error
    if array is None:  # Pillow has no colors of 16 bits
        volume = _itk_array(itk_image(path))
        _refuse_pages(path, volume.shape[2])
        array = volume[:, :, 0].swapaxes(0, 1)
    if orientation in range(5, 9):
        array = array.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    array = np.flip(array, flips)
    return np.ascontiguousarray(array.swapaxes(0, 1)[:, :, None]), LPS_TO_RAS.copy()


def _refuse_pages(path: Path, count: int) -> None:
    if count > 1:
        raise InputError(f"{path} contains {count} pages; save each as a 2-D image, or the stack as NIfTI")


def _pixels(image: Any, path: Path, indices: bool) -> np.ndarray:
    """Rows x columns[ x channels]; Pillow refuses files that are cut short."""
    if image.mode in ("P", "PA"):
        if indices:
            colors = np.reshape(image.getpalette("RGB"), (-1, 3))
            array = np.asarray(image if image.mode == "P" else image.getchannel(0))
            used = np.unique(array)
            grays = colors[used[used < len(colors)]]
            if (grays == grays[:, :1]).all() and (grays[:, 0] != used[used < len(colors)]).any():
                warnings.warn(
                    f"{path} has a palette of grays; its indices are taken as ids", RuntimeWarning, stacklevel=4
                )
            return array
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")  # CMYK, YCbCr, LAB
    array = np.asarray(image)
    return array * np.uint8(255) if array.dtype == bool else array


@contextmanager
def any_size() -> Iterator[None]:
    """Without Pillow's own limit of pixels: it does not know the memory, and slides of microscopes exceed it."""
    before = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = before


def _tiff_orientation(path: Path) -> int:
    """The orientation of a TIFF that Pillow cannot read otherwise."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(8) if head[2:4] in (b"\x2b\0", b"\0\x2b") else b""  # BigTIFF
            tags = PIL.TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(tags.next)
            tags.load(file)
            return int(tags.get(ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, TypeError, struct.error) as error:
        raise not_a_scan(path, error) from error


# ------------------------------------------------------------------------------------------------------ scans in memory


@contextmanager
def scan_path(scan: Image | SpatialImage) -> Iterator[str | list[str]]:
    """A path of a scan, or one per channel; a nibabel image is written to a temporary file for the block.

    The file ensures that an object is read, and refused, exactly as a saved one.
    """
    if not isinstance(scan, SpatialImage):
        yield str(scan) if isinstance(scan, str | Path) else [str(path) for path in scan]
        return
    with tempfile.TemporaryDirectory(prefix="samda-") as folder:
        path = Path(folder) / "image.nii"
        nib.save(copy_of(scan), path)
        try:
            yield str(path)
        except SamdaError as error:  # the temporary file is unknown to the user
            raise type(error)(str(error).replace(str(path), f"the nibabel image {name_of(scan)!r}")) from error


def copy_of(scan: SpatialImage) -> SpatialImage:
    """The same voxels with a copy of the header that agrees with the affine; saving it does not rename the original."""
    return type(scan)(scan.dataobj, scan.affine, scan.header)


def source_of(scan: Image | SpatialImage) -> Path | SpatialImage:
    """The source of grid and header of a label map: the first file of a scan, or the nibabel image."""
    return scan if isinstance(scan, SpatialImage) else files_of(scan)[0]


def name_of(scan: Image | SpatialImage) -> str:
    """Name of the case: that of the file without folder and suffix; "image" for an image without file."""
    if isinstance(scan, SpatialImage):
        file = scan.get_filename()
        return stem(file) if file else "image"
    return stem(files_of(scan)[0])
