# SPDX-License-Identifier: Apache-2.0
"""Suggest a task for an inspected data set, with the reason for each value."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samda.data.folders import Problem
from samda.data.inspect import DataReport, check_data, task_problems
from samda.data.labels import IGNORE
from samda.data.measure import AIR, ANISOTROPIC, CaseFacts
from samda.errors import InputError, UsageError, one_line, printable
from samda.io import load_yaml
from samda.task import AXES, Task, name_id, names_side

GRID = 2  # pixels: the class head tells apart what lies on every second pixel of a slice, its logits have stride 2
PER_WIDTH = 5  # places of that grid that the narrowest structure should cover
# of pictures; inner splits of 3 pictures or patients, 5 and 12 places in the same time: nuclei .909, .916 and (stained)
# .827, .831, hearts .866, .868
PER_WIDTH_PICTURE = 12
NARROW = 25  # percent of the cases whose structure is narrower than what counts
SMALLEST_SIZE = 128  # pixels of a slice; fewer only where more would be finer than the voxels need
SMALLEST_PICTURE = 256  # inner splits, 128 to 208 pixels and 256 in the same time: nuclei .834, .853; lungs .958, .963
LARGEST_SIZE = 256  # of volumes: larger ones cost more than they gain, as fewer training steps fit into the time
LARGEST_PICTURE = 768  # one slice per case, so encoding costs less than that of a volume
SMALL_PART = 16  # times as wide as its structures a picture may be cut into tiles
NEAR = 1.05  # times the spacing of pictures: how much coarser for one row less of 16 pixels, which would be padding
ALIKE = 1.1  # pictures whose shorter sides differ less than so many times have one size
WHOLE = 1.25  # times the body: how large a scan may be to be seen as a whole
CLOSE = 2.0  # mm: slices so close resemble each other, and neighbors help (hippocampus at 1 mm: Dice .859 to .868)
MOST_SLICES = 384  # of a scan along three axes together: a prediction takes three times as long
CENTRAL = 0.03  # of a picture's width: how far from its middle a structure may lie on average to count as central
TAIL = 0.5  # percent of the foreground below and above the window
MARGIN = 1.02  # of the field of view around the body
WINDOW = 400.0  # HU, the narrowest window; keeps the surroundings of organs visible
MOST_IDS = {False: 150, True: 32}  # in labels without names, of volumes and of 2-D images: more are gray values
SINGLE, UNNAMED = "foreground", "class_{}"


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A task with reasons (key of the task -> reason)."""

    task: Task
    reasons: dict[str, str]

    def to_yaml(self, head: Sequence[str] = ()) -> str:
        """The task as YAML with reasons as comments, below the comment lines `head`."""
        values = self.task.to_dict()
        keys = ["name", "classes", "labels", "modality"]
        keys += ["window"] if self.task.modality == "CT" else ["percentiles"]
        keys += ["in_channels", *(["context"] if self.task.context else [])]
        keys += ["spacing", *(["picture_size"] if self.task.picture_size else [])]
        keys += [
            "image_size",
            "axis",
            *(["axes"] if self.task.axes != "one" else []),
            *(["mirror"] if self.task.mirror else []),
            "nsd_tolerance",
        ]
        lines = [f"# {' '.join(printable(line).splitlines())}".rstrip() for line in head]
        for key in keys:
            value = values[key]
            if key == "labels":
                value = {name: ids[0] if len(ids) == 1 else ids for name, ids in value.items()}
                value = {name: name if i == name_id(name) else i for name, i in value.items()}  # of DICOM labels
            text = f"{key}: {_flow(_short(value))}"
            lines.append(f"{text} # {one_line(self.reasons[key])}" if key in self.reasons else text)
        return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value as YAML on one line that is read back as it is: texts like 1e3 are quoted."""
    listed = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    try:
        same = load_yaml(listed) == [value]
    except yaml.YAMLError as error:  # longer or deeper than what is read of a task file
        raise InputError(f"names of the data set do not fit into a task file ({one_line(error)})") from error
    return listed.strip()[1:-1] if same else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> Any:
    """Whole numbers without decimal point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return value


def check_and_suggest(path: str | Path) -> tuple[DataReport, Suggestion | None]:
    """Inspect a data set and suggest a task for it; None if its labels do not allow one.

    The report includes problems of the data with this task.
    """
    report = check_data(path)
    try:
        suggestion = suggest_task(report)
    except InputError as error:
        if not report.stops:
            report.problems.append(Problem("no task", str(error)))
        return report, None
    report.problems.extend(task_problems(report, suggestion.task))
    return report, suggestion


def suggest_task(report: DataReport) -> Suggestion:
    """A task that suits a data set.

    * classes: as the data set names them, else one for every id in the labels;
    * modality: as file types, data set or DICOM headers state it, else CT where scans reach below -500;
    * spacing and image size: the narrowest structure, the voxels and a bound of the cost decide;
    * window: the middle 99 % of the foreground, at least 400 HU.
    """
    cases = report.labeled
    if not cases:
        raise InputError(f"{report.path}: no case with a readable image and label, so no task can be suggested")
    if report.other_scale:
        raise InputError(f"{report.path}: masks of 0 and 1 and of 0 and 255, so no task can be suggested")
    choices = {**_classes(report, cases), **_modality(report, cases)}
    modality, labels = choices["modality"][0], choices["labels"][0]
    axes = _axes(cases, modality, labels)
    choices |= _geometry(cases, modality, labels, every="axes" in axes)
    choices |= axes
    choices |= _context(cases, modality, AXES[choices["axis"][0]])
    choices |= _mirror(cases, modality, labels)
    if modality == "CT":
        choices |= _window(cases, [i for ids in labels.values() for i in np.atleast_1d(ids)])
    values = {key: value for key, (value, _) in choices.items()}
    values["in_channels"] = _channels(cases)
    try:
        task = Task.from_dict(values)
    except UsageError as error:  # what the data set says cannot be in a task, such as a name with a line break
        raise InputError(f"{report.path}: {error}") from error
    return Suggestion(task, {key: reason for key, (_, reason) in choices.items() if reason})


Choices = Mapping[str, tuple[Any, str]]  # key -> value and reason


def _classes(report: DataReport, cases: Sequence[CaseFacts]) -> Choices:
    named = {
        n: ids for n, ids in (report.data.labels or {}).items() if n not in ("background", IGNORE) and 0 not in ids
    }
    every = [i for ids in named.values() for i in ids]
    if named and len(set(every)) == len(every):
        names = sorted(named, key=lambda name: named[name])
        ignored = ", those of `ignore` do not count" if IGNORE in (report.data.labels or {}) else ""
        return {
            "classes": (["background", *names], "names of the data set"),
            "labels": ({name: list(named[name]) for name in names}, f"all other ids become background{ignored}"),
        }
    found = sorted({i for case in cases for i in case.label_ids if i > 0})
    if not found:
        raise InputError(f"{report.path}: no label contains an id above 0, so no task can be suggested")
    most = MOST_IDS[cases[0].picture]
    if len(found) > most:
        raise InputError(
            f"{report.path}: the labels hold {len(found)} different ids, as gray values do; are images and labels "
            "swapped, or masks smoothed? Otherwise name the classes in dataset.json"
        )
    segments = {i: name for case in cases for i, name in case.segments.items()}
    told = [segments.get(i, "") for i in found]
    if all(told) and len(set(told)) == len(found):
        names, why = told, "names of the segments"
    else:
        names = [SINGLE] if len(found) == 1 else [UNNAMED.format(i) for i in found]
        why = "placeholders; rename them here and below"
    return {
        "classes": (["background", *names], why),
        "labels": (dict(zip(names, found, strict=True)), "ids found in the labels; all others become background"),
    }


def _modality(report: DataReport, cases: Sequence[CaseFacts]) -> Choices:
    if all(case.picture for case in cases):
        return {"modality": ("image", "the files are 2-D images")}
    channels = report.data.channels
    if channels and any(not name.isdigit() for name in channels):
        kind = "CT" if all(name.strip().lower() == "ct" for name in channels) else "MR"
        why = "" if kind == "CT" else "; percentiles serve whatever is not CT"
        return {"modality": (kind, f"the data set names its channels {', '.join(channels)}{why}")}
    stated = Counter(case.dicom for case in cases if case.dicom)
    if stated:
        name = stated.most_common(1)[0][0]
        kind = "CT" if name == "CT" else "MR"
        why = "" if name in ("CT", "MR") else "; percentiles serve whatever is not CT"
        return {"modality": (kind, f"{stated[name]} of {len(cases)} series state {name}{why}")}
    airy = sum(case.smallest <= AIR for case in cases)
    if airy * 2 > len(cases):
        return {"modality": ("CT", f"guess: {airy} of {len(cases)} scans have values below {AIR:g}, as air in HU")}
    return {"modality": ("MR", f"guess: {len(cases) - airy} of {len(cases)} scans have no values below {AIR:g}")}


def _geometry(cases: Sequence[CaseFacts], modality: str, labels: Mapping[str, Any], every: bool) -> Choices:
    """Slice axis, spacing and image size, and the tolerance that goes with them; the field holds slices of the axis, or
    of `every` one.

    The spacing is the coarsest at which the class head's grid is not coarser than the voxels or than a fifth (pictures:
    a twelfth) of the narrowest structure, as coarse slices cost less; but the field of view has at least 128 pixels
    (pictures: 256) where the voxels are that fine, and at most 256 (pictures: 768), which bounds the cost.
    """
    axis, across, why = _axis(cases, modality)
    plane = [a for a in range(3) if a != across]
    picture = modality == "image"
    scaled = _picture_size(cases, plane, labels) if picture else {}
    if scaled:
        cases = [_scaled(case, scaled["picture_size"][0] / _shorter_side(case, plane)) for case in cases]
    own = 1.0 if picture else float(np.median([np.mean([c.sides_mm[a] for a in plane]) for c in cases]))
    narrow, width = _narrowest(cases, labels)
    field, holds = _field(cases, [0, 1, 2] if every else plane, picture, width)
    needed = max(own, width / (PER_WIDTH_PICTURE if picture else PER_WIDTH)) / GRID
    largest = LARGEST_PICTURE if picture else LARGEST_SIZE
    coarsest = field / SMALLEST_SIZE
    if picture:
        coarsest = min(coarsest, max(own, field / SMALLEST_PICTURE))
    wanted = max(own / GRID, min(needed, coarsest))
    spacing = _rounded_up(max(wanted, field / largest))
    size = int(np.ceil(field / spacing / 16 - 1e-6)) * 16
    if picture and 16 < size < largest and field / (size - 16) <= NEAR * spacing:
        size, spacing = size - 16, _rounded_up(field / (size - 16))
    unit = "pixels" if picture else "mm"
    scans = f"the scans have {own:.3g}" if not picture else "a pixel of a 2-D image counts as 1 mm"
    grid = f"mm per pixel of a slice; {scans}"
    if narrow:
        grid += f", {narrow} is {width:.3g} wide"
    if spacing > NEAR * needed:
        grid += f"; {_rounded_up(needed):.3g} would suit that, but {largest} pixels bound the cost"
    if 0 < width < spacing:  # a label has a pixel where it covers most of it
        grid += f"; {narrow} may vanish in places: a spacing up to {width:.3g} keeps it, in tiles"
    tolerance = 3.0 if not picture else max(2.0, spacing)
    return {
        **scaled,
        "axis": (axis, why),
        "spacing": (spacing, grid),
        "image_size": (size, f"{spacing * size:.0f} {unit} of view; {holds}"),
        "nsd_tolerance": (tolerance, f"{unit}, of the normalized surface distance"),
    }


def _picture_size(cases: Sequence[CaseFacts], plane: Sequence[int], labels: Mapping[str, Any]) -> Choices:
    """The size that all pictures are brought to; nothing where their pixels tell more about lengths than their sides.

    A picture does not know its scale. A camera with more pixels shows the same field with more of them (eyes,
    endoscopes, X-rays); a larger mosaic of a microscope shows more tissue. The widths of the structures tell which.
    """
    sides = [_shorter_side(case, plane) for case in cases]
    reason = "pixels of the shorter side; a picture of another size is brought to it"
    if max(sides) > ALIKE * min(sides):
        widths = [_narrowest([case], labels)[1] for case in cases]
        known = [(width, side) for width, side in zip(widths, sides, strict=True) if width]
        if known and np.std([np.log(w / side) for w, side in known]) > np.std([np.log(w) for w, _ in known]):
            return {}
        reason = f"the pictures have {min(sides):.0f} to {max(sides):.0f} pixels; all show a field alike"
    return {"picture_size": (float(np.median(sides)), reason)}


def _shorter_side(case: CaseFacts, plane: Sequence[int]) -> float:
    """Of a camera it spans the field; longer ones differ in how much of the margin they show."""
    return min(case.extent_mm[a] for a in plane)


def _scaled(case: CaseFacts, factor: float) -> CaseFacts:
    """A picture with other pixels."""
    extent = tuple(side * factor for side in case.extent_mm)
    widths = {i: width * factor for i, width in case.widths_mm.items()}
    return dataclasses.replace(case, extent_mm=extent, widths_mm=widths)


def _narrowest(cases: Sequence[CaseFacts], labels: Mapping[str, Any]) -> tuple[str, float]:
    """The class of the narrowest structure and its width (mm); 0 where none was measured.

    A quarter of the cases is narrower: nuclei, for instance, differ twofold between laboratories.
    """
    widths = []
    for name, ids in labels.items():
        for i in np.atleast_1d(ids):
            seen = [case.widths_mm[int(i)] for case in cases if int(i) in case.widths_mm]
            widths += [(float(np.percentile(seen, NARROW)), name)] if seen else []
    width, name = min(widths, default=(0.0, ""))
    return name, width


def _field(cases: Sequence[CaseFacts], plane: Sequence[int], picture: bool, width: float) -> tuple[float, str]:
    """How large a field of view (mm) has to be, and what it holds."""
    bodies = [max(case.extent_mm[a] for a in plane) for case in cases]
    field = float(np.percentile(bodies, 95))
    if picture:
        usual = float(np.median(bodies))
        if 0 < width * SMALL_PART < usual < field:  # padding all to the size of a few costs more than tiles
            return usual, f"half of the images need more than {usual:.0f} and are tiled"
        return field, f"95 % of the cases need {field:.0f}, larger ones are tiled"
    whole = float(np.percentile([max(case.scan_mm[a] for a in plane) for case in cases], 95))
    if field < whole <= WHOLE * field:
        field = whole
    field *= MARGIN
    return field, f"95 % of the cases need {field:.0f}, larger ones are tiled"


def _rounded_up(value: float) -> float:
    """To three digits."""
    unit = 10.0 ** (np.floor(np.log10(value)) - 2)
    return float(f"{np.ceil(value / unit - 1e-6) * unit:.3g}")


def _context(cases: Sequence[CaseFacts], modality: str, across: int) -> Choices:
    """The neighbors of a slice as further channels, where they are close."""
    apart = float(np.median([case.sides_mm[across] for case in cases]))
    if modality == "image" or _channels(cases) > 1 or apart > CLOSE:
        return {}
    return {"context": (1, f"slices are {apart:.3g} mm apart: a slice is seen with the one below and the one above")}


def _axes(cases: Sequence[CaseFacts], modality: str, labels: Mapping[str, Any]) -> Choices:
    """Slices along all three axes, for small volumes of nearly cubic voxels. Sagittal ones do not tell left from right.

    Dice on inner splits of the hippocampus in the same time, one axis and three: 3 patients to train on .806, .838; 10
    patients .859, .873; 30 patients .867, .879; 130 patients .885, .893.
    """
    if modality == "image" or any(map(names_side, labels)):
        return {}
    sides = np.median([case.sides_mm for case in cases], 0)
    slices = np.median([np.divide(case.extent_mm, case.sides_mm).sum() for case in cases])
    if max(sides) > ANISOTROPIC * min(sides) or slices > MOST_SLICES:
        return {}
    return {
        "axes": ("all", "voxels are nearly cubes: slices along three axes train, a prediction is the mean of three")
    }


def _mirror(cases: Sequence[CaseFacts], modality: str, labels: Mapping[str, Any]) -> Choices:
    """Mirrored pictures, where every structure lies as often to the left as to the right.

    Dice on inner splits without it, with mirrored training, and with the mean in prediction, too: retinal vessels .791,
    .794, .801; nuclei .916, .922, .925; volumes of the hippocampus .852, .846, .837; vessels upside down as well .780.
    """
    if modality != "image" or any(map(names_side, labels)):
        return {}
    for ids in labels.values():
        found = np.array([case.offsets[int(i)] for i in np.atleast_1d(ids) for case in cases if int(i) in case.offsets])
        if not len(found) or abs(found.mean()) > max(CENTRAL, 2 * found.std() / np.sqrt(len(found))):
            return {}
    return {"mirror": (True, "all structures lie as often to the left as to the right: mirrored pictures look alike")}


def _channels(cases: Sequence[CaseFacts]) -> int:
    return min(3, Counter(case.channels for case in cases).most_common(1)[0][0])


def _axis(cases: Sequence[CaseFacts], modality: str) -> tuple[str, int, str]:
    """The slice axis, its index in RAS, and the reason: the coarsest axis of most scans, else axial."""
    coarsest = [int(np.argmax(c.sides_mm)) for c in cases if max(c.sides_mm) > ANISOTROPIC * np.median(c.sides_mm)]
    across = Counter(coarsest).most_common(1)[0][0] if 2 * len(coarsest) > len(cases) else 2
    if modality == "image" or across == 2:
        return "axial", 2, ""
    name = next(name for name, axis in AXES.items() if axis == across)
    apart = np.median([case.sides_mm[across] for case in cases])
    return name, across, f"the slice spacing of {apart:.3g} mm is coarser than that within slices"


def _window(cases: Sequence[CaseFacts], ids: Sequence[int]) -> Choices:
    samples = np.concatenate([case.foreground[np.isin(case.foreground_ids, ids)].reshape(-1) for case in cases])
    if not len(samples):
        return {"window": ([-160.0, 240.0], "HU; soft tissue, as no foreground could be measured")}
    low, high = np.percentile(samples, [TAIL, 100 - TAIL])
    wider = max(0.0, WINDOW - (high - low)) / 2
    window = [float(np.floor((low - wider) / 10) * 10), float(np.ceil((high + wider) / 10) * 10)]
    return {"window": (window, f"HU; 99 % of the foreground is within {low:.0f} to {high:.0f}, plus a margin")}
