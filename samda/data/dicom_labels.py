# SPDX-License-Identifier: Apache-2.0
"""Labels as DICOM objects: segmentations (SEG) and contours (RTSTRUCT) on the slices of the series they refer to.

Their segments have names instead of ids; the id of a name is `samda.task.name_id`, in every file the same.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform
from pydicom.dataset import Dataset
from skimage.draw import polygon

from samda.data.dicom import Frame, frames_of, series_frames, stored_pixels
from samda.data.dicom_files import (
    SEGMENTATIONS,
    STRUCTURES,
    dicom_header,
    is_dicom,
    is_series,
    refusing_damage,
    series_files,
    series_in,
    visible,
)
from samda.data.formats import LPS_TO_RAS
from samda.errors import InputError
from samda.task import name_id

Grid = tuple[Sequence[int], np.ndarray]  # shape (X, Y, Z), affine

THRESHOLD = 0.5  # of a fractional segmentation, from which a voxel belongs to the segment
OFF = 0.1  # tolerance of the place of a frame or contour, relative to the step between slices
HALF = 0.5  # pixels between the place of a frame and that of its slice
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def is_dicom_label(path: Path) -> bool:
    """Is this a DICOM SEG or RTSTRUCT?"""
    try:
        return is_dicom(path) and dicom_header(path).get("SOPClassUID") in (*SEGMENTATIONS, STRUCTURES)
    except InputError:
        return False


def label_names(path: Path) -> list[str]:
    """The names of the segments or ROIs of a DICOM label."""
    with refusing_damage(path, "its segments cannot be read"):
        return list(_names(dicom_header(path), path).values())


def referenced_series(path: Path) -> set[str]:
    """SeriesInstanceUIDs that a DICOM label refers to."""
    header = dicom_header(path)
    with refusing_damage(path, "its references cannot be read"):
        items = [*(header.get("ReferencedSeriesSequence") or ())]
        for place in header.get("ReferencedFrameOfReferenceSequence") or ():
            for study in place.get("RTReferencedStudySequence") or ():
                items += study.get("RTReferencedSeriesSequence") or ()
        return {str(item.get("SeriesInstanceUID", "")) for item in items} - {""}


def series_uid(path: Path) -> str:
    """SeriesInstanceUID of a series; damaged files, which its reader refuses, are passed over."""
    for file in series_files(path):
        with contextlib.suppress(InputError):
            header = dicom_header(file)
            if header.get("SOPClassUID") not in SEGMENTATIONS:
                return str(header.get("SeriesInstanceUID", ""))
    return ""


def read_dicom_label(
    path: Path, image: Path | Grid | None = None, wanted: Collection[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (X, Y, Z), int32, and affine of a DICOM label on the grid of its series.

    Args:
        path: SEG (BINARY, LABELMAP, or FRACTIONAL from half of its maximum) or RTSTRUCT. Contours of one ROI in one
            slice are combined by XOR; an ROI of the type EXTERNAL, the outline of the body, is left out.
        image: the series, or (for a prediction) shape and affine of its grid in another file; None looks for the series
            beside the label.
        wanted: ids that must not overlap, and have priority over others; None is all.

    Raises:
        InputError: the series is not found, segments overlap, or a frame or contour lies on no slice.
    """
    if isinstance(image, tuple):
        frames, affine = _grid_frames(path, *image)
    else:
        frames, _, affine = series_frames(_source(path, image))
    passed: list[str] = []
    with refusing_damage(path, "its segments cannot be read"):
        ids = _painted(path, frames, wanted, passed)
    for name in dict.fromkeys(passed):
        warnings.warn(f"{path}: {name!r} has points or open lines, which are passed over", stacklevel=2)
    return ids.transpose(2, 1, 0), affine


def _painted(path: Path, frames: list[Frame], wanted: Collection[int] | None, passed: list[str]) -> np.ndarray:
    """Ids (slices, rows, columns); `passed` gets the names of what has no area."""
    rows, columns = frames[0].shape
    ids = np.zeros((len(frames), rows, columns), np.int32)
    names: dict[int, str] = {0: "background"}
    structures = dicom_header(path).get("SOPClassUID") == STRUCTURES
    masks = _contours(path, frames, passed) if structures else _segments(path, frames)
    for place, name, mask in masks:
        number = name_id(name)
        if names.setdefault(number, name) != name:
            raise InputError(f"{path}: the names {name!r} and {names[number]!r} have the same id; rename one")
        plane = ids[place]
        taken = mask & (plane != 0) & (plane != number)
        if wanted is not None:
            taken &= np.isin(plane, list(wanted))
        if taken.any() and (wanted is None or number in wanted):
            other = names[int(plane[taken][0])]
            raise InputError(
                f"{path}: {name!r} and {other!r} overlap by {taken.sum()} voxels in slice {place + 1}; a voxel has one "
                "class, so give a task (--task) that lists one of them, or cut one out of the other"
            )
        plane[mask & ~taken] = number
    return ids


def _names(header: Dataset, path: Path) -> dict[int, str]:
    """Number -> name of segments (without that of the background) or ROIs."""
    if header.get("SOPClassUID") == STRUCTURES:
        outline = {
            int(about.ReferencedROINumber)
            for about in header.get("RTROIObservationsSequence", [])
            if about.get("RTROIInterpretedType") == "EXTERNAL"
        }
        found = {int(roi.ROINumber): str(roi.get("ROIName", "")) for roi in header.get("StructureSetROISequence", [])}
        found = {number: name for number, name in found.items() if number not in outline}
    else:
        segments = header.get("SegmentSequence", [])
        found = {int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in segments if int(s.SegmentNumber)}
    unnamed = [number for number, name in found.items() if not name.strip()]
    if unnamed:
        raise InputError(f"{path}: segment {unnamed[0]} has no name; name it")
    return {number: name.strip() for number, name in found.items()}


def _source(path: Path, image: Path | None) -> Path:
    """The series that a label refers to: the image, or one beside the label."""
    wanted = referenced_series(path)
    if image is not None:
        if not (is_series(image) or is_dicom(image)):
            raise InputError(f"{path} is a DICOM label, but {image} is no DICOM series; convert one of them")
        if wanted and series_uid(image) not in {*wanted, ""}:  # none where pseudonymization has emptied it
            raise InputError(f"{path} refers to another series than {image}; give the series it was drawn on")
        return image
    places = [place for above in (path.parent, path.parent.parent) for place in (above, *visible(above))]
    for folder in dict.fromkeys(place for place in places if place.is_dir()):
        for series in series_in(folder)[0]:
            if series_uid(series) in wanted:
                return series
    raise InputError(f"{path}: the series that it refers to is not beside it; put it there, or list both in a CSV")


def _grid_frames(path: Path, shape: Sequence[int], affine: np.ndarray) -> tuple[list[Frame], np.ndarray]:
    """The slices of a grid, its axes turned to those of a SEG's frames (as stored for an RTSTRUCT), and affine."""
    header = dicom_header(path)
    if header.get("SOPClassUID") != STRUCTURES:
        own, like = frames_of(header, path)[0], np.eye(4)
        like[:3, :3] = np.stack([own.rows, own.columns, np.cross(own.rows, own.columns)], 1)
        turn = ornt_transform(io_orientation(affine), io_orientation(LPS_TO_RAS @ like))
        affine = affine @ inv_ornt_aff(turn, tuple(shape))
        shape = [shape[k] for k in np.argsort(turn[:, 0])]
    steps, first = (LPS_TO_RAS @ affine)[:3, :3].T, (LPS_TO_RAS @ affine)[:3, 3]
    columns_mm, rows_mm, slices_mm = np.linalg.norm(steps, axis=1)
    about = (steps[0] / columns_mm, steps[1] / rows_mm, (rows_mm, columns_mm), slices_mm, (1.0, 0.0))
    size = (shape[1], shape[0])
    return [Frame(path, k, size, first + k * steps[2], *about) for k in range(shape[2])], affine


class _Slices:
    """The planes of a series."""

    def __init__(self, frames: list[Frame]) -> None:
        self.normal = np.cross(frames[0].rows, frames[0].columns)
        self.heights = np.array([frame.position @ self.normal for frame in frames])
        step = np.ptp(self.heights) / max(1, len(frames) - 1)
        self.step = float(step) or frames[0].thickness_mm or 1.0

    def holding(self, points: np.ndarray, path: Path, what: str) -> int:
        """The slice that points (n, 3) lie on; InputError if there is none."""
        heights = np.atleast_2d(points) @ self.normal
        place = int(np.abs(self.heights - heights[0]).argmin())
        off = float(np.abs(heights - self.heights[place]).max())
        if off > OFF * self.step:
            raise InputError(f"{path}: {what} lies {off:.2f} mm off the slices of its series; resample it")
        return place


def _segments(path: Path, frames: list[Frame]) -> Iterator[tuple[int, str, np.ndarray]]:
    """Slice, name and mask of each frame of a SEG, or of each segment in a frame of a label map."""
    header = dicom_header(path)
    names = _names(header, path)
    kind, most = header.get("SegmentationType"), int(header.get("MaximumFractionalValue") or 255)
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise InputError(f"{path} states the segmentation type {str(kind)!a:.40}; convert it to BINARY")
    own, slices = frames_of(header, path), _Slices(frames)
    shared = [*header.get("SharedFunctionalGroupsSequence", [])][:1]
    for frame, group, values in zip(
        own, header.get("PerFrameFunctionalGroupsSequence", []), stored_pixels(path), strict=True
    ):
        place = slices.holding(frame.position, path, f"frame {frame.number + 1}")
        source = frames[place]
        off = np.abs(np.r_[frame.rows - source.rows, frame.columns - source.columns]).max() * max(frame.shape)
        apart = np.linalg.norm(frame.position - source.position) / min(source.spacing_mm)
        if frame.shape != source.shape or max(off, apart) > HALF:
            raise InputError(f"{path}: frame {frame.number + 1} is not on the pixels of its series; resample it")
        if kind == "LABELMAP":
            for number in np.unique(values[values > 0]):
                if int(number) not in names:
                    raise InputError(f"{path} has voxels of segment {number}, which it does not describe; repair it")
                yield place, names[int(number)], values == number
            continue
        about = [*group.get("SegmentIdentificationSequence", [])]
        about += [item for g in shared for item in g.get("SegmentIdentificationSequence", [])]
        number = int(about[0].ReferencedSegmentNumber) if about else 0
        if number not in names:
            raise InputError(f"{path}: frame {frame.number + 1} names no segment of it; repair it")
        yield place, names[number], values > 0 if kind == "BINARY" else values >= THRESHOLD * most


def _contours(path: Path, frames: list[Frame], passed: list[str]) -> Iterator[tuple[int, str, np.ndarray]]:
    """Slice, name and mask of each ROI in each slice of an RTSTRUCT."""
    header = dicom_header(path)
    names, slices = _names(header, path), _Slices(frames)
    for roi in header.get("ROIContourSequence", []):
        name = names.get(int(roi.ReferencedROINumber))
        masks: dict[int, np.ndarray] = {}
        for contour in roi.get("ContourSequence", []) if name else ():
            if contour.get("ContourGeometricType") not in CLOSED:
                passed.append(str(name))
                continue
            points = np.reshape(np.asarray(contour.ContourData, float), (-1, 3))
            if not np.isfinite(points).all():
                raise InputError(f"{path}: a contour of {name!r} has points that are no numbers; repair it")
            k = slices.holding(points, path, f"a contour of {name!r}")
            frame = frames[k]
            steps = np.stack([frame.columns * frame.spacing_mm[0], frame.rows * frame.spacing_mm[1]], 1)
            lines = np.linalg.lstsq(steps, (points - frame.position).T, rcond=None)[0]
            mask = masks.setdefault(k, np.zeros(frame.shape, bool))
            inside = polygon(lines[0], lines[1], frame.shape)
            mask[inside] = ~mask[inside]
        for k, mask in masks.items():
            yield k, str(name), mask
