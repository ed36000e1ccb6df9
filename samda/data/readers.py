# SPDX-License-Identifier: Apache-2.0
"""Files to arrays with their geometry: NIfTI, NRRD, MetaImage, DICOM series folders and pictures.

NIfTI is read by nibabel, because its rule for the affine (sform, then qform) is the one viewers and our writer follow,
and because it also reads affines that ITK refuses. Everything else is read by SimpleITK. All affines are voxel index to
RAS millimeters.
"""

from __future__ import annotations

import dataclasses
import gzip
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from monai.data import ImageReader
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from samda.errors import InputError

__all__ = [
    "PICTURE_SUFFIXES",
    "SCAN_SUFFIXES",
    "Scan",
    "SimpleITKReader",
    "has_dicom",
    "read_geometry",
    "read_scan",
    "stem",
]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", *PICTURE_SUFFIXES)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
NIFTI_ERRORS = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)
POSITION, SERIES_NAME = (
    "0020|0032",
    "0008|103e",
)  # DICOM: position of a slice's first voxel (LPS mm), series description


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan as it lies in its file.

    Attributes:
        array: (X, Y, Z), or (X, Y, Z, C) with more than one channel; in the file's own axis order and number type.
        affine: (4, 4) voxel index to RAS mm.
    """

    array: np.ndarray
    affine: np.ndarray


class SimpleITKReader(ImageReader):
    """MONAI image reader for every format samda knows, refusing in one line what it cannot read as declared.

    MONAI's `LoadImage` falls back to other readers when its reader raises; :class:`samda.data.transforms.LoadScand`
    does not.

    Args:
        channels: number of channels a voxel must have.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels

    def verify_suffix(self, filename: Any) -> bool:
        """Can this reader read `filename`, by its name?"""
        names = [filename] if isinstance(filename, str | Path) else list(filename)
        return len(names) == 1 and (Path(names[0]).is_dir() or str(names[0]).lower().endswith(SCAN_SUFFIXES))

    def read(self, data: Any, **kwargs: Any) -> Scan:
        """Read the scan at path `data` (a file, or the folder of a DICOM series)."""
        paths: Sequence[Any] = [data] if isinstance(data, str | Path) else list(data)
        if len(paths) != 1:
            names = ", ".join(map(str, paths))
            raise InputError(f"one scan is one file, got {len(paths)} ({names}); merge the channels into one file")
        return read_scan(paths[0], self.channels)

    def get_data(self, img: Scan) -> tuple[np.ndarray, dict[str, Any]]:
        """The array and the metadata MONAI's transforms need: affine, spatial shape and place of the channels."""
        meta = {
            "affine": img.affine.copy(),
            "original_affine": img.affine.copy(),
            "spatial_shape": np.asarray(img.array.shape[:3]),
            "original_channel_dim": -1 if img.array.ndim == 4 else float("nan"),
            "space": "RAS",
        }
        return img.array, meta


def read_scan(path: str | Path, channels: int = 1) -> Scan:
    """Read a scan with its geometry.

    NIfTI affines need not be orthogonal: sheared ones are kept as the header states them. Pictures lie in the LPS
    plane with 1 mm pixels, so that their first row is anterior and their first column is right. An opaque alpha channel
    is dropped, and a colored picture whose channels are equal counts as gray.

    Args:
        path: a file, or the folder of one DICOM series.
        channels: number of channels a voxel must have.

    Raises:
        InputError: the path is missing, no scan, damaged, or has other channels than declared; a folder holds no
            series, several, or one with uneven slice positions.
    """
    path = _existing(path)
    if path.is_dir():
        array, affine = _read_dicom(path)
    elif path.name.lower().endswith(NIFTI_SUFFIXES):
        array, affine = _read_nifti(path)
    else:
        array, affine = _read_itk(path)
    _check_affine(affine, path)
    if 0 in array.shape:
        raise InputError(f"{path} has {' x '.join(map(str, array.shape))} voxels: it is empty; give a complete scan")
    return Scan(_native(_fit_channels(array, channels, path), path), affine)


def read_geometry(path: str | Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (X, Y, Z) and affine (voxel index to RAS mm) of a scan, without its voxels where the format allows it.

    Raises:
        InputError: the file cannot be read.
    """
    path = _existing(path)
    if path.is_file() and path.name.lower().endswith(NIFTI_SUFFIXES):
        image = _load_nifti(path)
        shape, affine = (*image.shape, 1, 1)[:3], image.affine
    elif path.is_file():
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise _not_a_scan(path, error) from error
        shape, affine = (*reader.GetSize(), 1)[:3], _itk_affine(reader, path)
    else:
        scan = _read_dicom(path)
        shape, affine = scan[0].shape[:3], scan[1]
    return tuple(int(n) for n in shape), np.asarray(affine, float)  # type: ignore[return-value]


def has_dicom(folder: str | Path) -> bool:
    """Does `folder` itself hold a DICOM series?"""
    return bool(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def stem(path: str | Path) -> str:
    """Name of a scan without folder and known suffix: `a/liver_0.nii.gz` -> `liver_0`."""
    name = Path(path).name
    for suffix in sorted(SCAN_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    return path


def _not_a_scan(path: Path, error: BaseException) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1].replace(str(path), path.name)
    known = ", ".join(SCAN_SUFFIXES)
    return InputError(f"{path} cannot be read as a scan ({reason}); give a complete file ({known}) or a DICOM folder")


# ------------------------------------------------------------------------------------------------------------- NIfTI


def _load_nifti(path: Path) -> Any:
    try:
        image = nib.load(path, mmap=False)  # a mapped file could change under the array
        unit = image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"
    except NIFTI_ERRORS as error:
        raise _not_a_scan(path, error) from error
    if unit in ("meter", "micron"):
        raise InputError(f"{path} states its voxel size in {unit}; samda reads mm: convert the header")
    return image


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = _load_nifti(path)
    _warn_of_form_codes(image, path)
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                array = _nifti_voxels(type(image).from_stream(stream))
                while stream.read(1 << 20):  # to the end, where gzip compares its checksum
                    pass
        else:
            array = _nifti_voxels(image)
    except NIFTI_ERRORS as error:
        raise _not_a_scan(path, error) from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 4 and array.shape[3] == 1:  # a vector image has its channels in the fifth dimension
        array = array[:, :, :, 0]
    return array.reshape(array.shape + (1,) * (3 - array.ndim)), np.asarray(image.affine, float)


def _nifti_voxels(image: Any) -> np.ndarray:
    proxy = image.dataobj
    if proxy.slope == 1 and proxy.inter == 0:
        return np.asanyarray(proxy)
    return image.get_fdata(dtype=np.float32, caching="unchanged")  # its default float64 takes twice the memory


def _warn_of_form_codes(image: Any, path: Path) -> None:
    """Say it where the header leaves the orientation open: no code at all, or two that differ."""
    sform, qform = image.get_sform(coded=True), _qform(image)
    if sform[1] == 0 and qform[1] == 0:
        warnings.warn(f"{path}: neither sform nor qform is set; left and right follow a convention only", stacklevel=4)
    elif sform[1] and qform[1]:
        corners = _corners(image.shape[:3] + (1,) * (3 - len(image.shape)))
        shift = np.abs((sform[0] - qform[0]) @ corners).max()
        if shift > 0.5 * min(image.header.get_zooms()[:3]):
            warnings.warn(f"{path}: sform and qform differ by up to {shift:.1f} mm; the sform is used", stacklevel=4)


def _qform(image: Any) -> tuple[np.ndarray | None, int]:
    try:
        return image.get_qform(coded=True)
    except HeaderDataError:  # an impossible quaternion, which the sform outranks
        return None, 0


def _corners(shape: Sequence[int]) -> np.ndarray:
    """(4, 8) homogeneous voxel indices of the corners of a volume."""
    return np.stack([*np.meshgrid(*[(0, n - 1) for n in shape[:3]], indexing="ij"), np.ones((2, 2, 2))]).reshape(4, 8)


# ---------------------------------------------------------------------------------------------------------- SimpleITK


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise _not_a_scan(path, error) from error
    return _itk_array(image), _itk_affine(image, path)


def _itk_array(image: sitk.Image) -> np.ndarray:
    """The voxels as (X, Y, Z[, C]); ITK hands them out as ([T,] Z, Y, X[, C])."""
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


def _read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
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
        raise _not_a_scan(folder, error) from error
    affine = _itk_affine(image, folder)
    if len(files[0]) > 1:
        # the positions decide, not ITK's step between the first two slices: it knows neither gaps nor a tilted gantry
        positions = np.array([_position(reader, i, folder) for i in range(len(files[0]))])
        affine[:3, 2] = LPS_TO_RAS[:3, :3] @ _slice_step(positions, folder)
        affine[:3, 3] = LPS_TO_RAS[:3, :3] @ positions[0]
    return _itk_array(image), affine


def _refuse_left_out(folder: Path, used: set[str]) -> None:
    """ITK passes over DICOM files that it cannot parse: a damaged slice would vanish without a word."""
    left = [p for p in sorted(folder.iterdir()) if p.is_file() and str(p) not in used and p.name != "DICOMDIR"]
    for path in left:
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                raise InputError(
                    f"{path} is a damaged DICOM file or no image; replace it, or move it out of the folder"
                )


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


# ------------------------------------------------------------------------------------------------------------- checks


def _fit_channels(array: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """The array with exactly `channels` channels, or a refusal."""
    if array.ndim == 4 and array.shape[3] in (2, 4) and path.name.lower().endswith(PICTURE_SUFFIXES):
        if np.ptp(array[..., -1]):
            raise InputError(f"{path} is partly transparent; save the picture without an alpha channel")
        array = array[..., :-1]
    if array.ndim == 4 and array.shape[3] == 3 and channels == 1 and (array == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    found = array.shape[3] if array.ndim == 4 else 1
    if array.ndim > 4 or found != channels:
        size = " x ".join(map(str, array.shape))
        expected = "one channel" if channels == 1 else f"{channels} channels"
        raise InputError(
            f"{path} ({size}) has {found if array.ndim <= 4 else 'several'} channel(s) or time points where {expected} "
            "is declared; extract what you need, or set the task's in_channels"
        )
    return array


def _native(array: np.ndarray, path: Path) -> np.ndarray:
    """The array in a number type that torch computes with, no wider than needed."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path} has voxels of type {array.dtype}; save it with plain numbers")
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    wider = {"b": np.uint8, "u2": np.int32, "u4": np.int64, "u8": np.int64}
    target = wider.get(array.dtype.kind) or wider.get(array.dtype.str[1:]) or array.dtype.newbyteorder("=")
    return array.astype(target, copy=False)


def _check_affine(affine: np.ndarray, path: Path) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or sizes.min() <= 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * sizes.prod():
        raise InputError(f"{path} has an unusable affine {np.round(affine[:3], 4).tolist()}; repair its header")
