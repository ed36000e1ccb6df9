# SPDX-License-Identifier: Apache-2.0
"""One case looked at: its grid, its intensities, its label ids, and everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from samda.data.body import body_mask, body_threshold, coarse
from samda.data.formats import PICTURE_SUFFIXES, files_of
from samda.data.itk import dicom_modality
from samda.data.listings import Case
from samda.data.problems import Problem, Report
from samda.data.readers import Scan, read_scan
from samda.data.task import Task
from samda.data.transforms import refuse_lossy_label, refuse_other_grid
from samda.errors import InputError, reason_of

__all__ = ["QUANTILES", "CaseFacts", "look_at"]

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
AIR = -500.0  # HU: what reaches below it holds air in Hounsfield units
SAMPLES = 20_000  # foreground voxels kept of a case, evenly spread
MANY_IDS = 256  # a file with more different values is an image
LARGEST_RANGE = 1 << 20  # between the smallest and the largest id
COARSEST, SMALLEST, LARGEST = 30.0, 5.0, 3000.0  # mm: a voxel side, and the longest side of a scan
CHUNK = 1 << 22  # voxels counted at once
MOST_VALUES = 1 << 21  # voxels that quantiles are taken from, evenly spread


@dataclasses.dataclass
class CaseFacts:
    """What a case holds. Shapes, spacings and directions are those of the image's file.

    Attributes:
        id, section: of the case.
        image: its files.
        label: its label file, if it has one.
        shape: (X, Y, Z), None if the image cannot be read; so are the others.
        spacing_mm: (3,) voxel sides.
        orientation: where the axes point, as "LPS".
        channels: number of channels.
        picture: is it a 2D picture?
        dicom: the modality that a DICOM series states, "CT" or "MR" for instance.
        smallest, largest: of all intensities; NaN where there are NaN.
        quantiles: `QUANTILES` of the intensities, one row a channel.
        extent_mm: (3,) size of the body along the RAS axes; of a picture, all of it.
        sides_mm: (3,) voxel sides along the RAS axes.
        label_ids: id -> voxels; empty without a readable label.
        foreground: (n, C) intensities where the label is not 0, at most `SAMPLES` of them.
        foreground_ids: (n,) the ids there.
    """

    id: str
    section: str
    image: list[str]
    label: str | None
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    channels: int = 0
    picture: bool = False
    dicom: str | None = None
    smallest: float = float("nan")
    largest: float = float("nan")
    quantiles: list[list[float]] = dataclasses.field(default_factory=list)
    extent_mm: tuple[float, ...] = ()
    sides_mm: tuple[float, ...] = ()
    label_ids: dict[int, int] = dataclasses.field(default_factory=dict)
    foreground: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 1), np.float32), repr=False)
    foreground_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.startswith("foreground")}


def look_at(case: Case, section: str, report: Report) -> CaseFacts:
    """Read a case to the last voxel.

    Args:
        case: the case.
        section: its section.
        report: called with everything that is wrong with it.
    """
    facts = CaseFacts(str(case["id"]), section, [str(p) for p in files_of(case["image"])], case.get("label"))

    def tell(kind: str, text: str, stops: bool = True) -> None:
        report(Problem(kind, text, facts.id, stops and section != "test"))

    image = label = None
    with _noticing(tell), _refusals("unreadable", tell):
        scan = read_scan(case["image"], None)
        _describe(scan, facts, tell)
        image = _in_ras(scan)
    if image is not None:
        with _refusals("image", tell):
            _image_facts(image, facts, tell)
    if facts.label is not None:
        with _noticing(tell), _refusals("unreadable", tell):
            refuse_lossy_label(facts.label)
            label = _in_ras(read_scan(facts.label))
            facts.label_ids = _count_ids(label.array, facts.label, tell)
    if image is not None and label is not None:
        with _refusals("grid", tell):
            refuse_other_grid(image.array.shape[:3], image.affine, label.array.shape, label.affine, str(facts.label))
            if facts.label_ids:
                facts.foreground, facts.foreground_ids = _foreground(image.array, label.array)
    return facts


Tell = Callable[..., None]  # (kind, text, stops=True)


@contextmanager
def _refusals(kind: str, tell: Tell) -> Iterator[None]:
    """Report what goes wrong in the block instead of raising it: every case is looked at."""
    try:
        yield
    except Exception as error:
        tell(kind, reason_of(error))


@contextmanager
def _noticing(tell: Tell) -> Iterator[None]:
    """Report the warnings of the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            tell("header", " ".join(str(warning.message).split()), stops=False)


def _in_ras(scan: Scan) -> Scan:
    """The scan with its axes in RAS order, a view."""
    turn = nib.io_orientation(scan.affine)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.array.shape[:3])
    return Scan(nib.orientations.apply_orientation(scan.array, turn), affine)


# -------------------------------------------------------------------------------------------------------------- image


def _describe(scan: Scan, facts: CaseFacts, tell: Tell) -> None:
    """What the file says of its grid, and whether that can be."""
    first = Path(facts.image[0])
    x, y, z = scan.array.shape[:3]
    sides = np.linalg.norm(scan.affine[:3, :3], axis=0)
    facts.shape, facts.channels = (x, y, z), scan.array.shape[3] if scan.array.ndim == 4 else 1
    facts.spacing_mm = tuple(float(f"{s:.5g}") for s in sides)
    facts.orientation = "".join(nib.aff2axcodes(scan.affine))
    facts.picture = first.name.lower().endswith(PICTURE_SUFFIXES)
    facts.dicom = dicom_modality(first) if first.is_dir() else None
    if facts.picture:
        return
    extent, shown = float((sides * facts.shape).max()), " x ".join(f"{s:g}" for s in facts.spacing_mm)
    if sides.max() > COARSEST or not SMALLEST <= extent <= LARGEST:
        text = f"{first} has voxels of {shown} mm and measures {extent:.4g} mm at most"
        tell("spacing", f"{text}; its header may count in m or micrometers: convert it to mm")
    elif np.allclose(np.abs(scan.affine), np.eye(4)) and 1 not in facts.shape:
        text = f"{first} states voxels of 1 x 1 x 1 mm at the origin, as files do whose geometry was lost"
        tell("spacing", f"{text}; check it against the original", stops=False)


def _image_facts(image: Scan, facts: CaseFacts, tell: Tell) -> None:
    """Intensities, size of the body, and what is wrong with them."""
    values = image.array if image.array.ndim == 4 else image.array[..., None]
    spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0)
    facts.sides_mm = tuple(float(f"{s:.5g}") for s in spacing_mm)
    name = facts.image[0]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        tell("NaN", f"{name} holds {bad} NaN or infinite values; replace them before use")
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    facts.smallest, facts.largest = float(values.min()), float(values.max())
    for channel in range(values.shape[3]):
        part = values[..., channel]
        if part.min() == part.max():
            what = f"channel {channel} of {name}" if values.shape[3] > 1 else name
            tell("constant", f"{what} is constant ({float(part.min()):g} everywhere); check the file")
        flat = part.reshape(-1)[:: max(1, part.size // MOST_VALUES)]
        facts.quantiles.append([float(f"{q:.5g}") for q in np.quantile(flat, QUANTILES)])
    facts.extent_mm = _extent_mm(values[..., 0], spacing_mm, facts)


def _extent_mm(values: np.ndarray, spacing_mm: np.ndarray, facts: CaseFacts) -> tuple[float, ...]:
    """Size of the body along the RAS axes."""
    shape = np.asarray(values.shape)
    if facts.picture:
        return tuple(float(n) for n in shape)
    task = Task(modality="CT" if facts.smallest <= AIR else "MR")
    small, strides = coarse(values, spacing_mm)
    mask = body_mask(small, spacing_mm * strides, body_threshold(small, task, scaled=False))
    sides = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    counts = [min((side[-1] - side[0] + 1) * strides[a], shape[a]) for a, side in enumerate(sides)]
    return tuple(round(float(n * s), 1) for n, s in zip(counts, spacing_mm, strict=True))


# -------------------------------------------------------------------------------------------------------------- label


def _count_ids(array: np.ndarray, name: str, tell: Tell) -> dict[int, int]:
    """id -> voxels.

    Raises:
        InputError: the values are no class ids.
    """
    flat = array.reshape(-1)
    if array.dtype.kind == "f":
        if not np.isfinite(flat).all():
            bad = int((~np.isfinite(flat)).sum())
            raise InputError(f"{name} holds {bad} NaN or infinite values, which are no class ids; set them to an id")
        fractions = int((flat != np.rint(flat)).sum())
        if fractions:
            raise InputError(
                f"{name} holds {fractions} fractions, which are no class ids; resample labels with nearest neighbor"
            )
    low, high = int(flat.min()), int(flat.max())
    if high - low > LARGEST_RANGE:
        raise InputError(f"{name} holds values from {low} to {high}, which are no class ids; is it a label map?")
    counts = np.zeros(high - low + 1, np.int64)
    for start in range(0, len(flat), CHUNK):
        counts += np.bincount(flat[start : start + CHUNK].astype(np.int64) - low, minlength=len(counts))
    ids = {int(k) + low: int(counts[k]) for k in np.flatnonzero(counts)}
    if len(ids) > MANY_IDS:
        raise InputError(f"{name} holds {len(ids)} different values from {low} to {high}; give a label map, no image")
    if set(ids) == {0}:
        tell("empty label", f"{name} holds background alone; leave the case out if it was not labeled", stops=False)
    return ids


def _foreground(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, C) intensities and (n,) ids of labeled voxels, evenly spread."""
    places = np.flatnonzero(label.reshape(-1))
    places = places[:: max(1, len(places) // SAMPLES)][:SAMPLES]
    index = np.unravel_index(places, label.shape)
    values = image[index]
    return np.asarray(values if values.ndim == 2 else values[:, None], np.float32), label[index].astype(int)
