# SPDX-License-Identifier: Apache-2.0
"""Read files to arrays with geometry: NIfTI, MGH, NRRD, MetaImage, DICOM and 2-D images; scans and labels.

NIfTI (also as two files) and MGH are read by nibabel, which uses the same rule for the affine as viewers and the writer
(sform, then qform) and accepts affines that ITK refuses. Affines map voxel indices to RAS mm.
"""

from __future__ import annotations

import dataclasses
import gzip
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from samda.data.dicom import read_dicom
from samda.data.dicom_files import is_dicom, is_series
from samda.data.dicom_labels import Grid, is_dicom_label, read_dicom_label
from samda.data.formats import NIBABEL_SUFFIXES, PICTURE_SUFFIXES, not_a_scan, read_itk, read_picture
from samda.data.headers import INFLATION, check_file, check_request, text_fields
from samda.data.labels import whole_ids
from samda.errors import InputError, SamdaError
from samda.io import Image, files_of
from samda.progress import phase

PACKED = (".gz", ".mgz")
MOST_NOTES = 1000  # of nibabel about one header
LONGEST_REST = 64  # MiB behind the voxels of a compressed NIfTI
VOXEL_SIDES = 1e-6, 1e6  # mm
NRRD_SPACES = ("right anterior superior", "left anterior superior", "left posterior superior", "ras", "las", "lps")
NRRD_TIME_SPACES = ("left posterior superior time", "lpst")  # the others with time are refused
SAME_SIZE = 0.01  # tolerance between voxel sizes in one header, relative
SAME_PLACE = 0.1  # tolerance between corners of the same grid in two files, relative to the smallest voxel side


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan with the geometry of its file."""

    array: np.ndarray  # (X, Y, Z), or (X, Y, Z, C) with more than one channel; axis order and type of the file
    affine: np.ndarray  # (4, 4) voxel index to RAS mm


@phase("reading")
def read_scan(image: Image, channels: int | None = 1) -> Scan:
    """Read a scan with its geometry.

    NIfTI affines need not be orthogonal: shears are kept. 2-D images are in the LPS plane with pixels of 1 mm, so the
    first row is anterior and the first column is right. An opaque alpha channel is dropped, and a color image with
    equal channels is gray. Channels of a volume are not merged, because they may be time points.

    Args:
        image: a file, the folder of one DICOM series (of one among several: FOLDER/SeriesInstanceUID), or several of
            them, one per channel, on the same grid.
        channels: required number of channels; None accepts any.
    """
    paths = [_existing(path) for path in files_of(image)]
    if len(paths) == 1:
        return _read_file(paths[0], channels)
    if channels not in (None, len(paths)):
        names = ", ".join(path.name for path in paths)
        raise InputError(
            f"{paths[0]} comes with {len(paths)} channel files ({names}) where {_number_of(channels)} declared; set "
            "in_channels of the task, or list fewer files"
        )
    return _stack([_read_file(path, 1) for path in paths], paths)


@phase("reading")
def read_label(path: Image, image: Image | Grid | None = None, wanted: Collection[int] | None = None) -> Scan:
    """Read a label file: one integer id per voxel; for the other arguments, which DICOM labels need, see
    :func:`samda.data.dicom_labels.read_dicom_label`.

    A 2-D image with a palette has its indices as ids. Values within 0.001 of integers, which scaled headers make of
    them, are rounded with a warning.
    """
    path = files_of(path)[0]
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(f"{path} is a label in JPEG format, which changes ids; save labels as PNG or NIfTI")
    if is_dicom_label(_existing(path)):
        source = image if image is None or isinstance(image, tuple) else files_of(image)[0]
        return Scan(*read_dicom_label(path, source, wanted))
    array, affine = _load(path.expanduser(), label=True)
    array = _fit_channels(array, 1, path, label=True)
    return Scan(whole_ids(_native(array, path), str(path)), affine)


def _read_file(path: Path, channels: int | None) -> Scan:
    array, affine = _load(path)
    return Scan(_native(_fit_channels(array, channels, path), path), affine)


def _load(path: Path, label: bool = False, pixels: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z[, C]) and affine as the file states them; without `pixels`, zeros if the header has the shape."""
    name = path.name.lower()
    try:
        if is_series(path) or is_dicom(path):
            array, affine = read_dicom(path, pixels)
        elif name.endswith(NIBABEL_SUFFIXES):
            array, affine = _read_nifti(path, pixels)
        elif name.endswith(PICTURE_SUFFIXES):
            array, affine = read_picture(path, indices=label)
        else:
            array, affine = read_itk(path, pixels)
            if pixels:
                _warn_of_no_geometry(path)
    except (SamdaError, OSError):
        raise
    except Exception as error:  # damaged files raise of any kind
        raise not_a_scan(path, error) from error
    _check_affine(affine, path)
    if 0 in array.shape:
        raise InputError(f"{path} has {' x '.join(map(str, array.shape))} voxels: it is empty; give a complete scan")
    return array, affine


def _stack(scans: Sequence[Scan], paths: Sequence[Path]) -> Scan:
    """Stack scans of one grid as channels."""
    first = scans[0]
    grid = first.array.shape, first.affine
    for scan, path in zip(scans[1:], paths[1:], strict=True):
        refuse_other_grid(scan.array.shape, scan.affine, grid, (path, paths[0].name))
    array = np.stack([scan.array for scan in scans], axis=-1)
    return Scan(array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array, first.affine)


def read_geometry(image: Image) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (X, Y, Z) and affine of a scan or its first channel, from the header if the format allows it."""
    array, affine = _load(_existing(files_of(image)[0]), pixels=False)
    x, y, z = (*array.shape, 1, 1)[:3]
    return (x, y, z), affine


def turned(scan: Scan, affine: np.ndarray) -> Scan:
    """The scan with its axes in the order and direction of an affine, a view: one grid may be stored in several."""
    turn = ornt_transform(io_orientation(scan.affine), io_orientation(affine))
    return Scan(apply_orientation(scan.array, turn), scan.affine @ inv_ornt_aff(turn, scan.array.shape[:3]))


def uncropped(label: Scan, grid: tuple[Sequence[int], np.ndarray], path: Any) -> Scan:
    """A label on the grid (shape and affine) of its image: 3D Slicer crops a segmentation (.seg.nrrd) to its segments.

    It is padded with 0. Other labels, and those that do not fit into the grid, are returned as they are.
    """
    shape = label.array.shape
    if not str(path).lower().endswith(".seg.nrrd") or tuple(shape) == tuple(grid[0]):
        return label
    place = np.linalg.inv(grid[1]) @ label.affine
    first = np.rint(place[:3, 3]).astype(int)
    pads = [(int(a), int(size - a - n)) for a, n, size in zip(first, shape, grid[0], strict=True)]
    off = max(np.abs(place[:3, :3] - np.eye(3)).max(), np.abs(place[:3, 3] - first).max())
    return Scan(np.pad(label.array, pads), grid[1]) if off < SAME_PLACE and min(map(min, pads)) >= 0 else label


def refuse_other_grid(
    shape: Sequence[int], affine: np.ndarray, reference: tuple[Sequence[int], np.ndarray], names: Sequence[Any]
) -> None:
    """Refuse a volume that is not on the grid of a reference (shape and affine).

    Corners may differ by a tenth of the smallest voxel side, which covers rounding in file formats. `names` are those
    of the volume and the reference in the message.
    """
    first, second = map(str, names)
    remedy = "give files of one scan, or resample them to one grid"
    if tuple(shape) != tuple(reference[0]):
        sizes = [" x ".join(map(str, size)) for size in (shape, reference[0])]
        raise InputError(f"{first} has {sizes[0]} voxels but {second} {sizes[1]}; {remedy}")
    apart = float(np.linalg.norm(((affine - reference[1]) @ _corners(shape))[:3], axis=0).max())
    if apart > SAME_PLACE * np.linalg.norm(reference[1][:3, :3], axis=0).min():
        raise InputError(f"{first} is offset by up to {apart:.2f} mm from {second}; {remedy}")


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        if is_series(path):
            return path
        raise InputError(f"{path} does not exist; check the path")
    check_file(path)
    return path


# ------------------------------------------------------------------------------------------------------------- NIfTI


@contextmanager
def _noted() -> Iterator[list[logging.LogRecord]]:
    """What nibabel logs about a header in the block; it does not say of which file."""
    logger, notes = nib.imageglobals.logger, BufferingHandler(MOST_NOTES)
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [notes], False
    try:
        yield notes.buffer
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def load_nifti(path: str | Path) -> Any:
    """The nibabel image of a file, without its voxels; headers that state no geometry are refused."""
    path = Path(path)
    try:
        with _noted() as notes:
            image: Any = nib.load(path, mmap=False)  # a mapped file could change later
            unit = _unit(image.header)
            shape, packed = image.shape, path.name.lower().endswith(PACKED)
        data = Path(image.file_map["image"].filename)
    except Exception as error:  # damaged headers raise of any kind
        raise not_a_scan(path, error) from error
    if not isinstance(image, nib.Nifti1Pair | nib.MGHImage):
        raise InputError(f"{path} is an Analyze image, which states no orientation; convert it to NIfTI")
    if not data.is_file():
        raise not_a_scan(path, FileNotFoundError(f"{data.name} is missing"))
    check_request(data, shape, image.get_data_dtype().itemsize, INFLATION if packed else 1)
    if any("pixdim" in note.getMessage() for note in notes) and not image.header.get("sform_code", 1):
        raise InputError(f"{path} states no voxel size ({notes[0].getMessage()}); repair its header")
    if unit in ("meter", "micron"):
        raise InputError(f"{path} has voxel sizes in {unit}; convert the header to mm")
    offset, header = getattr(image.dataobj, "offset", 0), image.header
    if isinstance(image, nib.Nifti1Image) and offset < getattr(header, "single_vox_offset", 0):  # 0 is taken literally
        raise InputError(f"{path} states vox_offset {offset}, within its header; repair its header")
    if np.isinf(slope := _stated_slope(image)):  # nibabel reads it as none
        raise InputError(f"{path} states scl_slope {slope}; repair its header")
    return image


def _unit(header: Any) -> str:
    """The unit of the voxel sizes."""
    try:
        return str(header.get_xyzt_units()[0]) if hasattr(header, "get_xyzt_units") else "mm"
    except KeyError:
        raise ValueError(f"xyzt_units of its header is {int(header['xyzt_units'])}, which is no unit") from None


def _stated_slope(image: Any) -> float:
    """The scl_slope in the file of a NIfTI, which nibabel does not keep; 1 for other formats."""
    if not isinstance(image, nib.Nifti1Pair):
        return 1.0
    with (image.file_map.get("header") or image.file_map["image"]).get_prepare_fileobj("rb") as file:
        return float(type(image.header).from_fileobj(file, check=False)["scl_slope"])


def _read_nifti(path: Path, pixels: bool) -> tuple[np.ndarray, np.ndarray]:
    image = load_nifti(path)
    if not pixels:
        return np.broadcast_to(np.int16(0), image.shape), np.asarray(image.affine, float)
    _warn_of_form_codes(image, path)
    try:
        if path.name.lower().endswith(PACKED):
            with _noted(), gzip.open(path) as stream:
                array = _nifti_voxels(type(image).from_stream(stream))
                for _ in range(LONGEST_REST):  # gzip verifies its checksum at the end
                    if not stream.read(1 << 20):
                        break
                else:
                    raise ValueError(f"more than {LONGEST_REST} MiB follow the voxels")
        else:
            array = _nifti_voxels(image)
    except Exception as error:
        raise not_a_scan(path, error) from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 4 and array.shape[3] == 1:  # vector images have channels in the fifth dimension
        array = array[:, :, :, 0]
    return array.reshape(array.shape + (1,) * (3 - array.ndim)), np.asarray(image.affine, float)


def _nifti_voxels(image: Any) -> np.ndarray:
    proxy = image.dataobj
    if proxy.slope == 1 and proxy.inter == 0:
        return np.asanyarray(proxy)
    return image.get_fdata(dtype=np.float32, caching="unchanged")  # half the memory of float64


def _warn_of_form_codes(image: Any, path: Path) -> None:
    """Warn if the orientation is ambiguous: no form code, or two different forms."""
    if isinstance(image, nib.MGHImage):
        if not image.header["goodRASFlag"]:
            warnings.warn(f"{path}: no orientation is set; left and right follow a convention only", stacklevel=4)
        return
    sform, qform = image.get_sform(coded=True), qform_of(image)
    if sform[1] == 0 and qform[1] == 0:
        warnings.warn(f"{path}: neither sform nor qform is set; left and right follow a convention only", stacklevel=4)
    elif sform[1] and qform[1]:
        corners = _corners(image.shape[:3] + (1,) * (3 - len(image.shape)))
        shift = np.abs((sform[0] - qform[0]) @ corners).max()
        if shift > 0.5 * min(image.header.get_zooms()[:3]):
            warnings.warn(f"{path}: sform and qform differ by up to {shift:.1f} mm; the sform is used", stacklevel=4)
    elif sform[1]:
        pixdim = np.asarray(image.header.get_zooms()[:3], float)
        sizes = np.linalg.norm(sform[0][:3, : len(pixdim)], axis=0)
        if np.abs(sizes / pixdim - 1).max(initial=0) > SAME_SIZE:
            both = [" x ".join(f"{size:.4g}" for size in values) for values in (sizes, pixdim)]
            text = f"voxels are {both[0]} mm by the sform, {both[1]} mm by pixdim; the sform is used"
            warnings.warn(f"{path}: {text}", stacklevel=4)


def qform_of(image: Any) -> tuple[np.ndarray | None, int]:
    """The qform of an image and its code; None and 0 if it has none or an impossible one."""
    try:
        return image.get_qform(coded=True)
    except (HeaderDataError, ValueError):  # an impossible quaternion; the sform has priority
        return None, 0


def _corners(shape: Sequence[int]) -> np.ndarray:
    """(4, 8) homogeneous voxel indices of the corners of a volume."""
    return np.stack([*np.meshgrid(*[(0, n - 1) for n in shape[:3]], indexing="ij"), np.ones((2, 2, 2))]).reshape(4, 8)


def _warn_of_no_geometry(path: Path) -> None:
    """Warn if a file states no voxel size or directions: ITK assumes 1 mm and LPS."""
    fields = text_fields(path)
    if path.name.lower().endswith((".nrrd", ".nhdr")):
        spaces = (*NRRD_SPACES, *NRRD_TIME_SPACES)
        sizes = {"space directions", "spacings"} & fields.keys()
        axes = "space directions" in fields and fields.get("space", "").lower().replace("-", " ") in spaces
    else:
        sizes = {"elementspacing", "elementsize"} & fields.keys()
        axes = bool({"transformmatrix", "rotation", "orientation"} & fields.keys())
    if not sizes:
        warnings.warn(f"{path}: no voxel size is set; voxels of 1 mm are assumed", stacklevel=5)
    if not axes:
        warnings.warn(f"{path}: no orientation is set; left and right follow a convention only", stacklevel=5)


# ------------------------------------------------------------------------------------------------------------- checks


def _fit_channels(array: np.ndarray, channels: int | None, path: Path, label: bool = False) -> np.ndarray:
    """The array, refused if it does not have `channels` channels; None accepts any number.

    A 2-D image is without its alpha channel and, unless colors are asked for, without equal channels.
    """
    picture = path.name.lower().endswith(PICTURE_SUFFIXES)
    if picture and array.ndim == 4:
        if array.shape[3] in (2, 4):
            if np.ptp(array[..., -1]):
                raise InputError(f"{path} is partly transparent; save it without an alpha channel")
            array = array[..., :-1]
        if channels in (1, None) and (array == array[..., :1]).all():
            array = array[..., :1]
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    found = array.shape[3] if array.ndim == 4 else 1
    if array.ndim <= 4 and channels in (found, None):
        return array
    name = f"{path} ({' x '.join(map(str, array.shape))})"
    if label:
        remedy = "merge them into one label map (3D Slicer: export the segmentation as a labelmap)"
        remedy = "save the mask as PNG with a palette or in gray" if picture else remedy
        raise InputError(f"{name} has {array.shape[3]} channels or layers, not one id per voxel; {remedy}")
    raise InputError(
        f"{name} has {found if array.ndim <= 4 else 'several'} channel(s) or time points where {_number_of(channels)} "
        "declared; select channels, or set in_channels of the task"
    )


def _number_of(channels: int | None) -> str:
    return "one channel is" if channels == 1 else f"{channels or 'at most three'} channels are"


def _native(array: np.ndarray, path: Path) -> np.ndarray:
    """The array in the smallest suitable number type of torch."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path} has voxels of type {array.dtype}; save it as integers or floats")
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    wider = {"b": np.uint8, "u2": np.int32, "u4": np.int64, "u8": np.int64}
    target = wider.get(array.dtype.kind) or wider.get(array.dtype.str[1:]) or array.dtype.newbyteorder("=")
    return array.astype(target, copy=False)


def _check_affine(affine: np.ndarray, path: Path) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    possible = np.isfinite(affine).all() and VOXEL_SIDES[0] < sizes.min() and sizes.max() < VOXEL_SIDES[1]
    if not possible or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * sizes.prod():
        raise InputError(f"{path} has an unusable affine {np.round(affine[:3], 4).tolist()}; repair its header")
