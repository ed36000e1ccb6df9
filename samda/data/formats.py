# SPDX-License-Identifier: Apache-2.0
"""File formats: their suffixes, what SimpleITK reads, and scans in memory.

SimpleITK reads NRRD, MetaImage, pictures and DICOM series folders; affines are voxel index to RAS mm. A nibabel image
may be given wherever the path of a scan is.
"""

from __future__ import annotations

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


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
POSITION = "0020|0032"  # DICOM: position of a slice's first voxel (LPS mm)
SERIES_NAME = "0008|103e"  # series description
MODALITY = "0008|0060"


def has_dicom(folder: str | Path) -> bool:
    """Does `folder` itself hold a DICOM series?"""
    return bool(_series_of(folder))


def _series_of(folder: str | Path) -> tuple[str, ...]:
    """The UIDs of the DICOM series in a folder."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK would warn of every folder without
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
        return LPS_TO_RAS @ affine  # a picture has pixels, not millimeters: one picture, one grid
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
        raise InputError(f"{folder} holds no DICOM series; give a scan, or the folder of one series")
    files = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name) for name in series]
    if len(series) > 1:
        names = ", ".join(f"{_series_name(names[0])!r} ({len(names)} files)" for names in files)
        raise InputError(f"{folder} holds {len(series)} DICOM series: {names}; give each a folder of its own")
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
        # the positions decide, not ITK's step between the first two slices: it knows neither gaps nor a tilted gantry
        positions = np.array([_position(reader, i, folder) for i in range(len(files[0]))])
        affine[:3, 2] = LPS_TO_RAS[:3, :3] @ _slice_step(positions, folder)
        affine[:3, 3] = LPS_TO_RAS[:3, :3] @ positions[0]
    return _itk_array(image), affine


def _refuse_left_out(folder: Path, used: set[str]) -> None:
    """ITK skips DICOM files that it cannot parse: a damaged slice would be missing without a message."""
    left = [p for p in sorted(folder.iterdir()) if p.is_file() and str(p) not in used and p.name != "DICOMDIR"]
    for path in left:
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                raise InputError(f"{path} is a damaged DICOM file or not an image; replace it, or move it away")


def _series_name(file: str) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader.GetMetaData(SERIES_NAME).strip() if reader.HasMetaDataKey(SERIES_NAME) else Path(file).name


def _position(reader: sitk.ImageSeriesReader, index: int, folder: Path) -> list[float]:
    if not reader.HasMetaDataKey(index, POSITION):
        raise InputError(f"{folder}: a DICOM file states no slice position; convert the series to NIfTI first")
    return [float(value) for value in reader.GetMetaData(index, POSITION).split("\\")]


def _slice_step(positions: np.ndarray, folder: Path) -> np.ndarray:
    """Mean step (mm, LPS) from slice to slice, refusing uneven ones; positions: (n, 3)."""
    steps = np.diff(positions, axis=0)
    mean = steps.mean(axis=0)
    if np.abs(steps - mean).max() > 0.1 * np.linalg.norm(mean):
        sizes = np.linalg.norm(steps, axis=1)
        raise InputError(
            f"{folder}: the slices are unevenly spaced ({sizes.min():.2f} to {sizes.max():.2f} mm); "
            "add the missing slices or remove the doubled ones"
        )
    return mean


def dicom_modality(folder: Path) -> str | None:
    """The modality that the DICOM series in a folder states: "CT", "MR", "PT", ..."""
    series = _series_of(folder)
    if not series:
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])[0])
    reader.ReadImageInformation()
    return reader.GetMetaData(MODALITY).strip() or None if reader.HasMetaDataKey(MODALITY) else None


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
