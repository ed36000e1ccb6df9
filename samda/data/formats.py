# SPDX-License-Identifier: Apache-2.0
"""File formats: suffixes, reading by SimpleITK, and scans in memory.

SimpleITK reads NRRD, MetaImage, 2-D images and DICOM series folders; affines map voxel indices to RAS mm. A nibabel
image is accepted in place of the path of a scan.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.spatialimages import SpatialImage

from samda.errors import InputError, SamdaError
from samda.io import Image, files_of

NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = (*VOLUME_SUFFIXES, ".dcm", *PICTURE_SUFFIXES)


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
    known = ", ".join(SCAN_SUFFIXES)
    return InputError(f"{path} cannot be read as a scan ({reason}); give a complete file ({known}) or a DICOM folder")


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
POSITION = "0020|0032"  # DICOM: position of a slice's first voxel (LPS mm)
SERIES_NAME = "0008|103e"  # series description
MODALITY = "0008|0060"


def has_dicom(folder: str | Path) -> bool:
    """Does `folder` directly contain a DICOM series?"""
    return bool(_series_of(folder))


def _series_of(folder: str | Path) -> tuple[str, ...]:
    """The UIDs of the DICOM series in a folder."""
    if re.search("[\ud800-\udfff]", str(folder)):  # no UTF-8, on which ITK aborts
        return ()
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK warns about every folder without series
    try:
        return sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def itk_geometry(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Size and affine of a file from its header."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise not_a_scan(path, error) from error
    return reader.GetSize(), _itk_affine(reader, path)


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z[, C]) and affine of a file."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise not_a_scan(path, error) from error
    return _itk_array(image), _itk_affine(image, path)


def _itk_array(image: sitk.Image) -> np.ndarray:
    """The voxels as (X, Y, Z[, C]); ITK returns ([T,] Z, Y, X[, C])."""
    array = sitk.GetArrayFromImage(image)
    axes = list(range(image.GetDimension()))[::-1]
    array = array.transpose(axes + list(range(len(axes), array.ndim)))
    if image.GetDimension() == 2:
        array = array[:, :, None]
    return array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array


def _itk_affine(image: sitk.Image | sitk.ImageFileReader, path: Path) -> np.ndarray:
    affine = np.eye(4)
    if path.name.lower().endswith(PICTURE_SUFFIXES):
        return LPS_TO_RAS @ affine  # 2-D images have no physical size: pixels of 1 mm
    dims = image.GetDimension()
    n = min(dims, 3)
    direction = np.reshape(image.GetDirection(), (dims, dims))[:n, :n]
    affine[:n, :n] = direction * np.asarray(image.GetSpacing())[:n]
    affine[:n, 3] = image.GetOrigin()[:n]
    return LPS_TO_RAS @ affine


def read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z[, C]) and affine of the one DICOM series in a folder."""
    series = _series_of(folder)
    if not series:
        raise InputError(f"{folder} contains no DICOM series; give a scan, or the folder of one series")
    files = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name) for name in series]
    if len(series) > 1:
        names = ", ".join(f"{_series_name(names[0])!r} ({len(names)} files)" for names in files)
        raise InputError(f"{folder} contains {len(series)} DICOM series: {names}; use one folder per series")
    _refuse_left_out(folder, set(files[0]))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files[0])
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise not_a_scan(folder, error) from error
    affine = _itk_affine(image, folder)
    if len(files[0]) > 1:
        # ITK uses the step between the first two slices only, which ignores gaps and a tilted gantry
        positions = np.array([_position(reader, i, folder) for i in range(len(files[0]))])
        affine[:3, 2] = LPS_TO_RAS[:3, :3] @ _slice_step(positions, folder)
        affine[:3, 3] = LPS_TO_RAS[:3, :3] @ positions[0]
    return _itk_array(image), affine


def _refuse_left_out(folder: Path, used: set[str]) -> None:
    """Refuse DICOM files that ITK cannot parse and skips silently: a damaged slice would be missing."""
    left = [p for p in sorted(folder.iterdir()) if p.is_file() and str(p) not in used and p.name != "DICOMDIR"]
    for path in left:
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                raise InputError(f"{path} is a damaged DICOM file or not an image; replace or remove it")


def _series_name(file: str) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader.GetMetaData(SERIES_NAME).strip() if reader.HasMetaDataKey(SERIES_NAME) else Path(file).name


def _position(reader: sitk.ImageSeriesReader, index: int, folder: Path) -> list[float]:
    if not reader.HasMetaDataKey(index, POSITION):
        raise InputError(f"{folder}: a DICOM file has no slice position; convert the series to NIfTI first")
    return [float(value) for value in reader.GetMetaData(index, POSITION).split("\\")]


def _slice_step(positions: np.ndarray, folder: Path) -> np.ndarray:
    """Mean step (mm, LPS) between slices at positions (n, 3); uneven steps are refused."""
    steps = np.diff(positions, axis=0)
    mean = steps.mean(axis=0)
    if np.abs(steps - mean).max() > 0.1 * np.linalg.norm(mean):
        sizes = np.linalg.norm(steps, axis=1)
        raise InputError(
            f"{folder}: the slices are unevenly spaced ({sizes.min():.2f} to {sizes.max():.2f} mm); "
            "add missing slices or remove duplicates"
        )
    return mean


def dicom_modality(folder: Path) -> str | None:
    """The modality in the header of the DICOM series in a folder: "CT", "MR", "PT", ..."""
    series = _series_of(folder)
    if not series:
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])[0])
    reader.ReadImageInformation()
    return reader.GetMetaData(MODALITY).strip() or None if reader.HasMetaDataKey(MODALITY) else None


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
