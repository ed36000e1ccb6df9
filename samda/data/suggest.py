# SPDX-License-Identifier: Apache-2.0
"""Suggest a task for an inspected data set: each choice with its reason, to be reviewed and changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samda.data.inspect import AIR, CaseFacts, DataReport, check_data, task_problems
from samda.data.layouts import Problem
from samda.errors import InputError
from samda.task import AXES, Task

SIZES = (256, 384, 512)  # pixels of a slice, tried in this order
SMALLEST_SIZE = 64
COARSENING = 2.0  # how much coarser than the scans the slices may be before a larger size is taken
TAIL = 0.5  # percent of the foreground below and above the window
MARGIN = 1.02  # of the field of view around the body
ANISOTROPIC = 1.5  # times the middle voxel side: how long the side across the slices is at least
REFINING = 2.0  # how much finer at most: SAM sees more where an organ covers more pixels
WINDOW = 400.0  # HU, the narrowest window: what surrounds an organ should stay visible
SINGLE, UNNAMED = "foreground", "class_{}"


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A task with the reason of each choice (key of the task -> reason)."""

    task: Task
    reasons: dict[str, str]

    def to_yaml(self, head: Sequence[str] = ()) -> str:
        """The task as a YAML file with the reasons as comments, below a comment of the lines `head`."""
        values = self.task.to_dict()
        keys = ["name", "classes", "labels", "modality"]
        keys += ["window"] if self.task.modality == "CT" else ["percentiles"]
        keys += ["in_channels", "spacing", "image_size", "axis", "nsd_tolerance"]
        lines = [f"# {line}".rstrip() for line in head]
        for key in keys:
            value = values[key]
            if key == "labels":
                value = {name: ids[0] if len(ids) == 1 else ids for name, ids in value.items()}
            listed = yaml.safe_dump(
                [_short(value)], default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
            )
            text = f"{key}: {listed.strip()[1:-1]}"
            lines.append(f"{text} # {self.reasons[key]}" if key in self.reasons else text)
        return "\n".join(lines) + "\n"


def _short(value: Any) -> Any:
    """Whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return value


def check_and_suggest(path: str | Path) -> tuple[DataReport, Suggestion | None]:
    """Inspect a data set and suggest a task for it; None where its labels allow none.

    The report also holds the cases that this very task could not use.
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
    * spacing and image size: the field of view holds the body of nearly every case in 256 pixels or, where these would
      be more than twice as coarse as the scans, in up to 512; in fewer where they would be more than twice as fine;
    * window: the middle 99 % of the foreground, at least 400 HU.
    """
    cases = report.labeled
    if not cases:
        raise InputError(f"{report.path}: no case with a readable image and label, so no task can be suggested")
    choices = {**_classes(report, cases), **_modality(report, cases)}
    modality, labels = choices["modality"][0], choices["labels"][0]
    choices |= _geometry(cases, modality)
    if modality == "CT":
        choices |= _window(cases, [i for ids in labels.values() for i in np.atleast_1d(ids)])
    values = {key: value for key, (value, _) in choices.items()}
    values["name"] = report.path.resolve().stem.replace(" ", "_") or "segmentation"
    values["in_channels"] = min(3, Counter(case.channels for case in cases).most_common(1)[0][0])
    return Suggestion(Task.from_dict(values), {key: reason for key, (_, reason) in choices.items() if reason})


Choices = Mapping[str, tuple[Any, str]]  # key -> value and reason


def _classes(report: DataReport, cases: Sequence[CaseFacts]) -> Choices:
    named = {name: ids for name, ids in (report.data.labels or {}).items() if name != "background" and 0 not in ids}
    every = [i for ids in named.values() for i in ids]
    if named and len(set(every)) == len(every):
        names = sorted(named, key=lambda name: named[name])
        return {
            "classes": (["background", *names], "as the data set names them"),
            "labels": ({name: list(named[name]) for name in names}, "all other ids become background"),
        }
    found = sorted({i for case in cases for i in case.label_ids if i > 0})
    if not found:
        raise InputError(f"{report.path}: no label holds any id above 0, so no task can be suggested")
    names = [SINGLE] if len(found) == 1 else [UNNAMED.format(i) for i in found]
    return {
        "classes": (["background", *names], "rename them as you like, here and below"),
        "labels": (dict(zip(names, found, strict=True)), "the ids found; all others become background"),
    }


def _modality(report: DataReport, cases: Sequence[CaseFacts]) -> Choices:
    if all(case.picture for case in cases):
        return {"modality": ("image", "the files are pictures")}
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
        return {"modality": ("CT", f"{airy} of {len(cases)} scans reach below {AIR:g}, as air does in HU: a guess")}
    return {"modality": ("MR", f"{len(cases) - airy} of {len(cases)} scans do not reach below {AIR:g}: a guess")}


def _geometry(cases: Sequence[CaseFacts], modality: str) -> Choices:
    """Slice axis, spacing and image size, and the tolerance that goes with them."""
    axis, across, why = _axis(cases, modality)
    plane = [a for a in range(3) if a != across]
    own = 1.0 if modality == "image" else float(np.median([np.mean([c.sides_mm[a] for a in plane]) for c in cases]))
    field = float(np.percentile([max(case.extent_mm[a] for a in plane) for case in cases], 95))
    field *= 1.0 if modality == "image" else MARGIN
    size = next((s for s in SIZES if field / s <= COARSENING * own), SIZES[-1])
    spacing = float(np.ceil(100 * max(own / REFINING, field / size) - 1e-6)) / 100
    size = max(SMALLEST_SIZE, int(np.ceil(field / spacing / 16 - 1e-6)) * 16)
    unit = "pixels" if modality == "image" else "mm"
    scans = f"the scans have {own:.3g}" if modality != "image" else "a pixel of a picture counts as 1 mm"
    view = f"{spacing * size:.0f} {unit} of view; 95 % of the cases need {field:.0f}, larger ones are tiled"
    tolerance = 3.0 if modality != "image" else max(2.0, spacing)
    return {
        "axis": (axis, why),
        "spacing": (spacing, f"mm per pixel of a slice; {scans}. Finer shows small structures, and tiles more"),
        "image_size": (size, view),
        "nsd_tolerance": (tolerance, f"{unit}, of the normalized surface distance"),
    }


def _axis(cases: Sequence[CaseFacts], modality: str) -> tuple[str, int, str]:
    """The slice axis, its number in RAS, and why: the one along which most scans are clearly coarsest, else axial."""
    coarsest = [int(np.argmax(c.sides_mm)) for c in cases if max(c.sides_mm) > ANISOTROPIC * np.median(c.sides_mm)]
    across = Counter(coarsest).most_common(1)[0][0] if 2 * len(coarsest) > len(cases) else 2
    if modality == "image" or across == 2:
        return "axial", 2, ""
    name = next(name for name, axis in AXES.items() if axis == across)
    apart = np.median([case.sides_mm[across] for case in cases])
    return name, across, f"slices are {apart:.3g} mm apart along it, which is coarser than within"


def _window(cases: Sequence[CaseFacts], ids: Sequence[int]) -> Choices:
    samples = np.concatenate([case.foreground[np.isin(case.foreground_ids, ids)].reshape(-1) for case in cases])
    if not len(samples):
        return {"window": ([-160.0, 240.0], "HU; soft tissue, as no foreground could be measured")}
    low, high = np.percentile(samples, [TAIL, 100 - TAIL])
    wider = max(0.0, WINDOW - (high - low)) / 2
    window = [float(np.floor((low - wider) / 10) * 10), float(np.ceil((high + wider) / 10) * 10)]
    return {"window": (window, f"HU; 99 % of the foreground lie in {low:.0f} to {high:.0f}, and their surroundings")}
