# SPDX-License-Identifier: Apache-2.0
"""Measure a case: grid, intensities, size of the body, label ids, and width of the structures in the slices.

The widths decide how fine the slices must be.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from samda.data.body import coarse_body
from samda.data.dicom_files import dicom_modality, is_dicom, is_series
from samda.data.folders import Case, Problem, Report
from samda.data.formats import PICTURE_SUFFIXES
from samda.data.headers import segment_names
from samda.data.labels import count_ids
from samda.data.readers import Scan, read_label, read_scan, refuse_other_grid, turned, uncropped
from samda.errors import InputError, one_line, reason_of
from samda.io import files_of
from samda.task import Task

RAS = np.eye(4)
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
AIR = -500.0  # HU: a CT with air has values below
SAMPLES = 20_000  # foreground voxels kept per case, evenly spaced
MANY_IDS = 256  # a file with more different values is not a label map
COARSEST, SMALLEST, LARGEST = 30.0, 5.0, 3000.0  # mm: of a voxel side; of the longest side of a scan
ENDS = ("LR", "PA", "IS")  # letters of an orientation, of each RAS axis
MOST_VALUES = 1 << 21  # voxels used for quantiles, evenly spaced
SLICES = 24  # of each structure whose width is measured, evenly spread
LARGEST_BOX = 2048  # pixels: of a larger structure, the middle of its box is measured
ANISOTROPIC = 1.5  # times the middle voxel side: how long the side across the slices is at least


@dataclasses.dataclass
class CaseFacts:
    """Facts of a case. Shapes, spacings and directions are those of the image file, unless marked RAS."""

    id: str
    section: str
    image: list[str]
    label: str | None
    shape: tuple[int, int, int] | None = None  # (X, Y, Z); None if the image cannot be read
    spacing_mm: tuple[float, ...] = ()  # (3,)
    orientation: str = ""  # directions of the axes, for example "LPS"
    channels: int = 0
    picture: bool = False  # is it a 2-D image?
    dicom: str | None = None  # modality of a DICOM series, for example "CT" or "MR"
    smallest: float = float("nan")  # intensity, without NaN and infinity
    largest: float = float("nan")
    quantiles: list[list[float]] = dataclasses.field(default_factory=list)  # `QUANTILES`, one row per channel
    extent_mm: tuple[float, ...] = ()  # (3,) size of the body along the RAS axes; of a 2-D image, all of it
    sides_mm: tuple[float, ...] = ()  # (3,) voxel sides along the RAS axes
    label_ids: dict[int, int] = dataclasses.field(default_factory=dict)  # id -> voxels
    widths_mm: dict[int, float] = dataclasses.field(default_factory=dict)  # id above 0 -> width within slices
    offsets: dict[int, float] = dataclasses.field(default_factory=dict)  # in a 2-D image: id above 0 -> its mean
    # position along the RAS x axis, -0.5 to 0.5
    segments: dict[int, str] = dataclasses.field(default_factory=dict)  # names of ids, as 3D Slicer's files have them
    foreground: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 1), np.float32), repr=False)
    foreground_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int), repr=False)
    # at most `SAMPLES` labeled voxels: (n, C) intensities and (n,) ids

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.startswith("foreground")}

    @property
    def scan_mm(self) -> tuple[float, ...]:
        """Size of the whole scan along the RAS axes."""
        along = {axis: place for place, end in enumerate(self.orientation) for axis in range(3) if end in ENDS[axis]}
        return tuple((self.shape or (0, 0, 0))[along[axis]] * self.sides_mm[axis] for axis in range(3))

    def problem(self, kind: str, text: str, stops: bool = True) -> Problem:
        """A problem of this case; problems of test cases do not stop a training."""
        return Problem(kind, text, self.id, stops and self.section != "test")


Tell = Callable[..., None]  # (kind, text, stops=True)


def inspect_case(case: Case, section: str, report: Report, wanted: Collection[int] | None = None) -> CaseFacts:
    """Read a case completely; `report` is called with its problems. `wanted` are ids that must not overlap."""
    facts = CaseFacts(str(case["id"]), section, [str(p) for p in files_of(case["image"])], case.get("label"))

    def tell(kind: str, text: str, stops: bool = True) -> None:
        report(facts.problem(kind, text, stops))

    image = label = None
    with _collect("unreadable", tell):
        scan = read_scan(case["image"], None)
        _describe(scan, facts, tell)
        image = turned(scan, RAS)
    if image is not None:
        with _collect("image", tell):
            _measure(image, facts, tell)
    if facts.label is not None:
        with _collect("unreadable", tell):
            label = turned(read_label(facts.label, case["image"], wanted), RAS)
            facts.label_ids = _count_ids(label.array, facts.label, tell)
            facts.segments = segment_names(facts.label)
    if image is not None and label is not None:
        with _collect("grid", tell):
            grid = image.array.shape[:3], image.affine
            label = uncropped(label, grid, facts.label)
            refuse_other_grid(label.array.shape, label.affine, grid, (facts.label, "its image"))
            if facts.label_ids:
                facts.foreground, facts.foreground_ids = _foreground(image.array, label.array)
                sides = np.linalg.norm(label.affine[:3, :3], axis=0)
                facts.widths_mm = structure_widths(label.array, sides, facts.label_ids)
                if facts.picture:
                    facts.offsets = _offsets(label.array, facts.label_ids)
    return facts


@contextmanager
def _collect(kind: str, tell: Tell) -> Iterator[None]:
    """Report errors and warnings of the block instead of raising them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", module=r"pydicom\.")  # they may quote a whole file
        try:
            yield
        except Exception as error:
            tell(kind, reason_of(error))
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            tell("header", one_line(warning.message), stops=False)


def _describe(scan: Scan, facts: CaseFacts, tell: Tell) -> None:
    """Grid of the file, and problems if it is implausible."""
    first = Path(facts.image[0])
    x, y, z = scan.array.shape[:3]
    sides = np.linalg.norm(scan.affine[:3, :3], axis=0)
    facts.shape, facts.channels = (x, y, z), scan.array.shape[3] if scan.array.ndim == 4 else 1
    facts.spacing_mm = tuple(float(f"{s:.5g}") for s in sides)
    facts.orientation = "".join(nib.aff2axcodes(scan.affine))
    facts.picture = first.name.lower().endswith(PICTURE_SUFFIXES)
    facts.dicom = dicom_modality(first) if is_series(first) or is_dicom(first) else None
    if facts.picture:
        return
    extent, shown = float((sides * facts.shape).max()), " x ".join(f"{s:g}" for s in facts.spacing_mm)
    if sides.max() > COARSEST or not SMALLEST <= extent <= LARGEST:
        text = f"{first} has voxels of {shown} mm and a longest side of {extent:.4g} mm"
        tell("spacing", f"{text}; the unit of its header may be m or micrometers: convert it to mm")
    elif np.allclose(np.abs(scan.affine), np.eye(4)) and 1 not in facts.shape:
        text = f"{first} has voxels of 1 x 1 x 1 mm at the origin: the geometry may be lost"
        tell("spacing", f"{text}; check it against the original", stops=False)


def _measure(image: Scan, facts: CaseFacts, tell: Tell) -> None:
    """Intensities and size of the body."""
    values = image.array if image.array.ndim == 4 else image.array[..., None]
    spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0)
    facts.sides_mm = tuple(float(f"{s:.5g}") for s in spacing_mm)
    name = facts.image[0]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        tell("NaN", f"{name} contains {bad} NaN or infinite values; replace them")
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
    _, mask, strides = coarse_body(values, spacing_mm, task, scaled=False)
    sides = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    counts = [min((side[-1] - side[0] + 1) * strides[a], shape[a]) for a, side in enumerate(sides)]
    return tuple(round(float(n * s), 1) for n, s in zip(counts, spacing_mm, strict=True))


def _count_ids(array: np.ndarray, name: str, tell: Tell) -> dict[int, int]:
    """id -> voxels."""
    ids = count_ids(array, name)
    if len(ids) > MANY_IDS:
        span = f"from {min(ids)} to {max(ids)}"
        raise InputError(f"{name} contains {len(ids)} different values {span}; give a label map")
    if set(ids) == {0}:
        text = f"{name} contains only background; leave the case out if it was not labeled"
        tell("empty label", text, stops=False)
    return ids


def _foreground(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, C) intensities and (n,) ids of labeled voxels, evenly spaced."""
    places = np.flatnonzero(label.reshape(-1))
    places = places[:: max(1, len(places) // SAMPLES)][:SAMPLES]
    index = np.unravel_index(places, label.shape)
    values = image[index]
    return np.asarray(values if values.ndim == 2 else values[:, None], np.float32), label[index].astype(int)


def _offsets(label: np.ndarray, ids: Iterable[int]) -> dict[int, float]:
    """id above 0 -> mean position of its voxels along the first axis, from -0.5 to 0.5."""
    columns = {i: np.nonzero(label == i)[0] for i in ids if i > 0}
    return {i: round(float((found.mean() + 0.5) / len(label) - 0.5), 4) for i, found in columns.items()}


# -------------------------------------------------------------------------------------------------------------- widths


def structure_widths(label: np.ndarray, sides_mm: Sequence[float], ids: Iterable[int]) -> dict[int, float]:
    """Width (mm) of each structure in the slices of a label map: of vessels the caliber, of an organ its narrow side.

    A place on the ridge of the distance transform is the center of the largest disc around it. The width is the median
    of the discs' diameters, weighted by their areas, so that small ends and frayed borders do not count.

    `label` is (X, Y, Z), RAS, with voxel sides `sides_mm` (3,), and holds `ids`; those above 0 are measured.
    """
    across = slice_axis(sides_mm)
    plane_sides = [float(side) for axis, side in enumerate(sides_mm) if axis != across]
    planes = np.moveaxis(label, across, 0)
    every = np.array(sorted(ids))
    found: dict[int, list[tuple[int, tuple[slice, slice]]]] = defaultdict(list)
    for number, plane in enumerate(planes):
        boxes = ndimage.find_objects(np.searchsorted(every, plane) + 1)
        for k, box in enumerate(boxes):
            if box is not None and every[k] > 0:
                found[int(every[k])].append((number, box))
    widths = {}
    for k, places in found.items():
        chosen = np.unique(np.linspace(0, len(places) - 1, SLICES).round().astype(int))
        discs = [_discs(planes[places[i][0]][_middle(places[i][1])] == k, plane_sides) for i in chosen]
        diameters = np.sort(np.concatenate(discs))
        areas = np.cumsum(diameters**2)
        widths[k] = float(diameters[np.searchsorted(areas, areas[-1] / 2)])
    return widths


def slice_axis(sides_mm: Sequence[float]) -> int:
    """The RAS axis along which a scan is clearly coarsest, else the third."""
    coarsest = int(np.argmax(sides_mm))
    return coarsest if sides_mm[coarsest] > ANISOTROPIC * float(np.median(sides_mm)) else 2


def _middle(box: tuple[slice, slice]) -> tuple[slice, ...]:
    """At most `LARGEST_BOX` pixels of a box in each direction."""
    cut = [max(0, side.stop - side.start - LARGEST_BOX) for side in box]
    return tuple(slice(side.start + n // 2, side.stop - (n - n // 2)) for side, n in zip(box, cut, strict=True))


def _discs(mask: np.ndarray, sides_mm: Sequence[float]) -> np.ndarray:
    """Diameters (mm) of the largest discs in a mask, one for each pixel of the ridge."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=sides_mm)  # to the next center outside
    ridge = (distance > 0) & (distance == ndimage.maximum_filter(distance, 3))
    return np.asarray(2 * distance[ridge] - np.mean(sides_mm))
