# SPDX-License-Identifier: Apache-2.0
"""DICOM: the series of a folder or the frames of a file as one volume.

All geometry and the rescaling come from the headers, read by pydicom, for each slice; nothing is assumed. Compressed
pixels are decoded by SimpleITK. Affines map voxel indices to RAS mm.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from samda.data.dicom_files import SEGMENTATIONS, dicom_header, one_series, read_dataset, refusing_damage
from samda.data.formats import LPS_TO_RAS, itk_image
from samda.data.headers import check_request
from samda.errors import InputError

QUANTITIES = ("CT",)  # modalities whose values have a unit, however they are displayed
UNTRAINED = {"PT": "PET", "NM": "nuclear medicine"}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
SAME_DIRECTION = 1e-3  # tolerance between direction cosines of slices
SAME_SIZE = 1e-3  # tolerance between pixel sizes of slices, relative
SAME_PLACE = 1e-3  # mm
UNEVEN = 0.1  # tolerance between steps from slice to slice, relative
DRIFT = 0.25  # tolerance between the places of slices and an even grid, in steps
COSINES = 0.01  # tolerance of the length of direction cosines, and of their right angle


@dataclasses.dataclass(frozen=True)
class Frame:
    """A slice: a file, or a frame of one."""

    path: Path
    number: int  # of the frame in its file, from 0
    shape: tuple[int, int]  # rows, columns
    position: np.ndarray  # (3,) first voxel, LPS mm
    rows: np.ndarray  # (3,) direction along a row, LPS
    columns: np.ndarray  # (3,) direction along a column, LPS
    spacing_mm: tuple[float, float]  # between rows, between columns
    thickness_mm: float | None
    rescale: tuple[float, float]  # slope, intercept

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.path} (frame {self.number + 1})" if self.number else str(self.path)


def read_dicom(path: Path, pixels: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z[, C]) and affine of a DICOM file, the one series in a folder, or FOLDER/UID of several.

    Zeros without `pixels`. Images of MONOCHROME1, whose smallest value is white, are inverted, as viewers show them.
    """
    frames, headers, affine = series_frames(path)
    kinds = {str(header.get("Modality", "")).strip() for header in headers.values()}
    for kind in kinds & UNTRAINED.keys():
        raise InputError(
            f"{path} is {UNTRAINED[kind]} (modality {kind}), for which no task is made; give CT, MR or images"
        )
    rows, columns = frames[0].shape
    if not pixels:
        return np.broadcast_to(np.int16(0), (columns, rows, len(frames))), affine
    for file, header in headers.items():
        syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID", ImplicitVRLittleEndian)
        plain = not (syntax.is_encapsulated or syntax.is_deflated)
        shape = (len(frames) // len(headers), rows, columns, int(header.get("SamplesPerPixel", 1)))
        check_request(file, shape, int(header.get("BitsAllocated", 16)) / 8, 1 if plain else math.inf)
    check_request(path, (len(frames), *shape[1:]), 2, math.inf)
    places = {(frame.path, frame.number): place for place, frame in enumerate(frames)}
    slices: list[Any] = [None] * len(frames)
    inverted = [file for file, header in headers.items() if _is_inverted(header)]
    if inverted:
        warnings.warn(
            f"{path} is MONOCHROME1 (small values are white) and is inverted, as viewers show it", stacklevel=2
        )
    for file, header in headers.items():
        values = stored_pixels(file)
        if file in inverted:
            bits, signed = int(header.get("BitsStored", 16)), int(header.get("PixelRepresentation", 0))
            values = (-1 if signed else (1 << bits) - 1) - values.astype(np.int32)
        for number, plane in enumerate(values):
            place = places[file, number]
            slices[place] = _rescaled(plane, *frames[place].rescale)
    array = np.stack(slices)  # with one type for all
    return array.transpose(2, 1, 0, *range(3, array.ndim)), affine


def series_frames(path: Path) -> tuple[list[Frame], dict[Path, Dataset], np.ndarray]:
    """Slices in the order of the third axis of :func:`read_dicom`, headers of the files, and affine."""
    headers = {path: dicom_header(path)} if path.is_file() else one_series(path)
    if any(header.get("SOPClassUID") in SEGMENTATIONS for header in headers.values()):
        raise InputError(f"{path} is a DICOM segmentation, which is a label; give the series it was drawn on")
    frames = [frame for file, header in headers.items() for frame in frames_of(header, file)]
    frames, affine = _arrange(frames, path)
    _warn_of_missing_slices(list(headers.values()), path)
    return frames, headers, affine


# --------------------------------------------------------------------------------------------------------------- frames


def frames_of(header: Dataset, path: Path) -> list[Frame]:
    """The frames of a file with their geometry; values that are missing or unreadable are refused."""
    with refusing_damage(path, "its header cannot be read"):
        count = int(header.get("NumberOfFrames") or 1)
        shared, each = ([*(header.get(name) or ())] for name in FUNCTIONAL_GROUPS)
        shape = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
        samples = header.get("SamplesPerPixel", 1)
        bits = [int(header.get(tag) or 0) for tag in ("BitsAllocated", "BitsStored", "HighBit")]
        stated = "BitsStored" in header and "HighBit" in header
    if "Rows" not in header:
        raise InputError(f"{path} is no DICOM image; give the folder of one series")
    if samples not in (1, 3) or min(shape) < 1 or count < 1:
        size = f"{count} x {shape[0]} x {shape[1]} pixels with {samples} samples"
        raise InputError(f"{path} is a damaged DICOM file: it states {size}; replace or remove it")
    if stated and (bits[2] != bits[1] - 1 or bits[1] > bits[0]):  # values would be shifted, or have other bits in them
        text = f"BitsAllocated {bits[0]}, BitsStored {bits[1]}, HighBit {bits[2]}, which do not fit; repair its header"
        raise InputError(f"{path} states {text}")
    table = "ModalityLUTSequence" in header or header.get("PhotometricInterpretation") == "PALETTE COLOR"
    if table and header.get("SOPClassUID") not in SEGMENTATIONS:
        raise InputError(f"{path} maps its pixels by a table; convert the series to NIfTI")
    if each and len(each) != count:
        raise InputError(f"{path} has {count} frames but describes {len(each)}; repair its header")
    frames = []
    for number in range(count):
        groups = [*each[number : number + 1], *shared[:1]]
        with refusing_damage(path, "its frames cannot be read"):
            places = [item for group in groups for element in group if element.VR == "SQ" for item in element.value]
        if count == 1 or groups:  # frames without description have no place
            places.append(header)
        position = _stated(places, "ImagePositionPatient", 3, path)
        directions = _stated(places, "ImageOrientationPatient", 6, path)
        spacing = _stated(places, "PixelSpacing", 2, path)
        for tag, value in (("position", position), ("orientation", directions), ("PixelSpacing", spacing)):
            if value is None:
                raise InputError(
                    f"{path} states no {tag}{' for its frames' if count > 1 else ''}, so the place of its voxels is "
                    "unknown; convert it to NIfTI with the right geometry, or a plain picture to PNG"
                )
        rows, columns = np.reshape(directions, (2, 3))
        off = [rows @ columns, *(np.linalg.norm([rows, columns], axis=1) - 1)]
        if np.abs(off).max() > COSINES or min(spacing) <= 0:
            raise InputError(f"{path} states orientation {directions}, PixelSpacing {spacing}; repair its header")
        thickness = _stated(places, "SliceThickness", 1, path) or _stated(places, "SpacingBetweenSlices", 1, path)
        slope = _stated(places, "RescaleSlope", 1, path) or (1.0,)
        intercept = _stated(places, "RescaleIntercept", 1, path) or (0.0,)
        if slope[0] == 0:  # all voxels would be equal
            raise InputError(f"{path} states RescaleSlope 0; repair its header")
        frames.append(
            Frame(
                *(path, number, shape, np.array(position), np.array(directions[:3]), np.array(directions[3:])),
                *(spacing, thickness[0] if thickness and thickness[0] > 0 else None, (slope[0], intercept[0])),
            )
        )
    return frames


def _stated(places: Sequence[Dataset], tag: str, count: int, path: Path) -> Any:
    """The numbers of a tag in the first place that has it, or None."""
    for place in places:
        with refusing_damage(path, f"{tag} cannot be read"):
            value = place.get(tag)
            if value is None or value == "":
                continue
            numbers = tuple(float(v) for v in ([value] if count == 1 else value))
        if len(numbers) != count or not np.isfinite(numbers).all():
            raise InputError(f"{path} states {tag} {str(value)!a:.80}; repair its header")
        return numbers
    return None


# ------------------------------------------------------------------------------------------------------------- geometry


def _arrange(frames: list[Frame], path: Path) -> tuple[list[Frame], np.ndarray]:
    """The frames in the order of their places, and the affine of the volume; frames of no single grid are refused."""
    first = frames[0]
    for frame in frames[1:]:
        turned = np.abs(np.r_[frame.rows - first.rows, frame.columns - first.columns]).max() > SAME_DIRECTION
        what = "lies in another plane than" if turned else ""
        if frame.shape != first.shape:
            what = f"has {frame.shape[1]} x {frame.shape[0]} pixels, not {first.shape[1]} x {first.shape[0]} as"
        elif not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=SAME_SIZE):
            sizes = [" x ".join(f"{v:g}" for v in f.spacing_mm) for f in (frame, first)]
            what = f"has pixels of {sizes[0]} mm, not {sizes[1]} as"
        if what:
            raise InputError(f"{frame.name} {what} {first.name}; give the slices of one volume, one folder each")
    normal = np.cross(first.rows, first.columns)
    frames = sorted(frames, key=lambda frame: float(frame.position @ normal))
    positions = np.array([frame.position for frame in frames])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.rows * first.spacing_mm[1], first.columns * first.spacing_mm[0]
    affine[:3, 2] = _step(positions, frames, normal, path)
    affine[:3, 3] = positions[0]
    return frames, LPS_TO_RAS @ affine


def _step(positions: np.ndarray, frames: Sequence[Frame], normal: np.ndarray, path: Path) -> np.ndarray:
    """Step (mm, LPS) from slice to slice at positions (n, 3)."""
    if len(positions) == 1:
        if frames[0].thickness_mm is None:
            raise InputError(f"{path} is one slice and states no SliceThickness; convert it to NIfTI with its size")
        return normal * frames[0].thickness_mm
    steps = np.diff(positions, axis=0)
    sizes = np.linalg.norm(steps, axis=1)
    same = np.flatnonzero(sizes < SAME_PLACE)
    if len(same):
        pair = f"{frames[same[0]].name} and {frames[same[0] + 1].name}"
        raise InputError(
            f"{path} has {len(positions)} slices at {len(positions) - len(same)} places ({pair} are at one): time "
            "points, echoes or duplicates; keep one volume"
        )
    mean = steps.mean(axis=0)
    off = np.linalg.norm(steps - mean, axis=1)
    if off.max() > UNEVEN * np.linalg.norm(mean):
        usual = np.median(steps, axis=0)
        place = int(np.linalg.norm(steps - usual, axis=1).argmax())
        between = f"between {frames[place].name} and {frames[place + 1].name}"
        if sizes.max() - sizes.min() > 0.5 * off.max():
            found = f"the slices are unevenly spaced ({sizes.min():.2f} to {sizes.max():.2f} mm), most {between}"
        else:
            found = f"the slices do not lie in one line, they are shifted by {off.max():.2f} mm {between}"
        raise InputError(f"{path}: {found}; add missing slices or remove others")
    drift = np.linalg.norm(positions - positions[0] - np.arange(len(positions))[:, None] * mean, axis=1)
    if drift.max() > DRIFT * np.linalg.norm(mean):
        raise InputError(
            f"{path}: the slices are unevenly spaced, {frames[int(drift.argmax())].name} lies {drift.max():.2f} mm off "
            f"its place in even steps of {np.linalg.norm(mean):.2f} mm; resample the series to even steps"
        )
    return mean


def _warn_of_missing_slices(headers: Sequence[Dataset], path: Path) -> None:
    """Warn if the headers of a series speak of slices at its ends that are not there."""
    numbers, totals = [], []
    for header in headers:
        try:
            numbers.append(int(header.InstanceNumber))
            totals += [int(header[tag].value) for tag in ("ImagesInAcquisition", "NumberOfSlices") if tag in header]
        except (AttributeError, TypeError, ValueError):
            continue
    count = sum(int(header.get("NumberOfFrames") or 1) for header in headers)
    if len(headers) > 1 and numbers and 1 < min(numbers) <= count:  # others are numbered through a whole study
        warnings.warn(
            f"{path}: its {count} slices are numbered from {min(numbers)}; is the scan complete?", stacklevel=3
        )
    elif totals and max(totals) > count:
        warnings.warn(f"{path}: {count} slices, but the header states {max(totals)}; is it complete?", stacklevel=3)


# --------------------------------------------------------------------------------------------------------------- pixels


def stored_pixels(path: Path) -> np.ndarray:
    """The stored pixels (frames, rows, columns[, C]) of a file, before rescaling."""
    with refusing_damage(path, "its pixels cannot be read"):
        header = read_dataset(path)
        if not hasattr(header, "file_meta"):
            header.file_meta = pydicom.dataset.FileMetaDataset()
        if "TransferSyntaxUID" not in header.file_meta:  # files without preamble
            little, implicit = header.original_encoding[1], header.original_encoding[0]
            plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            header.file_meta.TransferSyntaxUID = plain
        shape = int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns)
        colors = (3,) if header.get("SamplesPerPixel", 1) == 3 else ()
        packed = header.file_meta.TransferSyntaxUID.is_encapsulated
        array = _decoded(header, path) if packed else header.pixel_array  # refuses fewer bytes than stated
        return array.reshape(*shape, *colors)


def _decoded(header: Dataset, path: Path) -> np.ndarray:
    """Compressed pixels, decoded by SimpleITK from a copy without rescaling, of which ITK knows only one per file."""
    for tag in (*FUNCTIONAL_GROUPS, "RescaleSlope", "RescaleIntercept"):
        if tag in header:
            del header[tag]
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = UID(SECONDARY_CAPTURE)
    with tempfile.TemporaryDirectory(prefix="samda-") as folder:
        copy = Path(folder) / path.name
        header.save_as(copy)
        return sitk.GetArrayFromImage(itk_image(copy))


def _is_inverted(header: Dataset) -> bool:
    shown = header.get("PhotometricInterpretation") == "MONOCHROME1"
    return shown and str(header.get("Modality", "")).strip() not in QUANTITIES


def _rescaled(plane: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """The values of a plane, in 16 bits where they fit."""
    if not (slope.is_integer() and intercept.is_integer()):
        return (plane * slope + intercept).astype(np.float32)
    values = plane if (slope, intercept) == (1, 0) else plane.astype(np.int64) * int(slope) + int(intercept)
    if values.dtype.kind in "iu" and values.dtype.itemsize > 2:
        fits = np.iinfo(np.int16).min <= values.min() and values.max() <= np.iinfo(np.int16).max
        values = values.astype(np.int16 if fits else np.int32)
    return values
