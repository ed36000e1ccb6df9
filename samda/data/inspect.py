# SPDX-License-Identifier: Apache-2.0
"""Inspect a data set before training: facts and problems of its cases, see :mod:`samda.data.measure`.

Every case is read completely. All problems are collected, each with case and remedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.datalists import LARGEST_CHANNELS, LAYOUTS, DataList, read_datalist
from samda.data.folders import Problem
from samda.data.labels import IGNORE, IGNORED, SCALES, LabelMap, PartialLabels, label_map
from samda.data.measure import ENDS, CaseFacts, inspect_case
from samda.data.slices import refuse_other_scale, sides_mm
from samda.data.splits import patient_of, split
from samda.errors import InputError, SamdaError, UsageError
from samda.io import files_of
from samda.progress import Cases
from samda.task import Task


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Cases, facts and problems of a data set."""

    path: Path
    data: DataList
    cases: list[CaseFacts]
    problems: list[Problem]

    @property
    def stops(self) -> list[Problem]:
        """The problems that would make a training fail."""
        return [problem for problem in self.problems if problem.stops]

    def sorted_problems(self) -> list[Problem]:
        """All problems: first those that stop a training, then in the order of the cases."""
        order = {case.id: number for number, case in enumerate(self.cases)}
        return sorted(self.problems, key=lambda p: (not p.stops, order.get(p.case, -1)))

    @property
    def labeled(self) -> list[CaseFacts]:
        """Cases whose image and label were read."""
        return [case for case in self.cases if case.section != "test" and case.shape and case.label_ids]

    @property
    def other_scale(self) -> list[CaseFacts]:
        """The fewer of the binary masks where some are 0 and 1, others 0 and 255, and no list names the ids."""
        kinds = _grouped((i, case) for case in self.labeled for i in case.label_ids if set(case.label_ids) - {0} == {i})
        mixed = self.data.labels is None and kinds.keys() >= SCALES
        return min((kinds[i] for i in sorted(SCALES)), key=len) if mixed else []

    def label_table(self) -> list[dict[str, Any]]:
        """One row per id: name, voxels and number of cases; includes named ids without voxels."""
        names = {i: name for name, ids in (self.data.labels or {}).items() for i in ids}
        voxels, cases = Counter[int](), Counter[int]()
        for case in self.cases:
            voxels.update(case.label_ids)
            cases.update(case.label_ids.keys())
        every = sorted({*voxels, *names}) if voxels or names else []
        return [{"id": i, "name": names.get(i), "voxels": voxels[i], "cases": cases[i]} for i in every]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "layout": self.data.layout,
            "layout_name": LAYOUTS[self.data.layout],
            "sections": {name: len(cases) for name, cases in self.data.cases.items()},
            "channels": self.data.channels,
            "labels": self.label_table(),
            "cases": [case.to_dict() for case in self.cases],
            "problems": [dataclasses.asdict(problem) for problem in self.sorted_problems()],
        }


def check_data(path: str | Path, task: Task | None = None) -> DataReport:
    """Inspect every case of a data set (see `read_datalist`) and the data set as a whole.

    With a `task`, the data are checked against it; None accepts the ids that the data set names, or any.
    """
    problems: list[Problem] = []
    data = read_datalist(path, problems.append)
    every = [(case, section) for section, cases in data.cases.items() for case in cases]
    wanted, facts = None, []
    with contextlib.suppress(InputError, UsageError):  # see task_problems
        wanted = None if task is None else label_map(task, data.labels).wanted
    with Cases("reading", len(every)) as progress:
        for case, section in every:
            facts.append(inspect_case(case, section, problems.append, wanted))
            progress.next()
    report = DataReport(Path(path), data, facts, problems)
    problems += _label_problems(report, task)
    problems += _channel_problems(facts, task)
    problems += _mixture_problems(facts)
    problems += _patient_problems(data)
    problems += _foreground_problems(report, task)
    if task is not None:
        problems += task_problems(report, task)
    return report


def _label_problems(report: DataReport, task: Task | None) -> Iterator[Problem]:
    """Ids with several names, ids without a name, and names without voxels."""
    labels = report.data.labels or {}
    owners = _grouped((i, name) for name, ids in labels.items() for i in ids)
    shared = ", ".join(f"{i} ({' and '.join(names)})" for i, names in owners.items() if len(names) > 1)
    if shared:
        text = f"the data set assigns ids to several names: {shared}; list the ids of each class in the task"
        yield Problem("label ids", text, stops=False)
    try:
        known = _known_ids(report.data.labels, task)
    except SamdaError as error:
        yield Problem("label ids", str(error))
        return
    if task is None and (rare := report.other_scale):
        text = f"{rare[0].label} is one of {len(rare)} masks of 0 and {max(rare[0].label_ids)}, unlike the others"
        yield rare[0].problem("label ids", f"{text}; save all masks with one id")
    for case in report.cases:
        if known is None:
            if any(i < 0 for i in case.label_ids):
                text = f"{case.label} contains ids below 0; name them under `labels` in the task, or they become"
                yield case.problem("label ids", f"{text} background", False)
            continue
        unknown = sorted(i for i in case.label_ids if i not in known.ids)
        if refusal := known.refusal(case.label_ids):
            yield case.problem("label ids", f"{case.label} {refusal}")
        elif warning := known.warning(case.label_ids):
            yield case.problem("label ids", f"{case.label}: {warning}", False)
        elif known.rest is None and unknown:
            shown = ", ".join(f"{i} ({case.label_ids[i]} voxels)" for i in unknown[:8]) + ", ..." * (len(unknown) > 8)
            text = f"{case.label} contains ids that {known.source} does not name: {shown}; "
            if task is None:  # the suggested task lists ids, so these become background
                text += "they become background unless the task lists them"
            else:
                text += "list the ids of each class under `labels` in the task, and the others become background"
            yield case.problem("label ids", text, task is not None)
    segments = _grouped((i, (name, case)) for case in report.cases for i, name in case.segments.items())
    for i, named in segments.items():
        other = [(name, case) for name, case in named if name != named[0][0]]
        if other:
            text = f"{other[0][1].label} names id {i} {other[0][0]!r}, {named[0][1].label} {named[0][0]!r}"
            yield other[0][1].problem("label ids", f"{text}; export them as labelmaps with one color table")
    held = {i for case in report.cases for i in case.label_ids}
    absent = [name for name, ids in labels.items() if held and not held & set(ids) and name != IGNORE]
    if absent:
        text = f"no label contains {', '.join(absent)}; remove these classes from the task, or check the ids"
        yield Problem("absent class", text, stops=False)


def _known_ids(labels: Mapping[str, tuple[int, ...]] | None, task: Task | None) -> LabelMap | None:
    if task is not None:
        return label_map(task, labels)
    if labels is None:
        return None
    known = {0: 0} | {i: int(name != "background") for name, ids in labels.items() if name != IGNORE for i in ids}
    return LabelMap(known | dict.fromkeys(labels.get(IGNORE, ()), IGNORED), None, "the data set")


def _channel_problems(facts: Sequence[CaseFacts], task: Task | None) -> Iterator[Problem]:
    """Cases whose channels differ from those of the task, the network or other cases."""
    counts = Counter(case.channels for case in facts if case.shape)
    usual = task.in_channels if task else max(counts, key=counts.__getitem__, default=0)
    for case in facts:
        if not case.shape or (case.channels == usual and case.channels <= LARGEST_CHANNELS):
            continue
        text = f"{case.image[0]} has {case.channels} channels"
        if case.picture and case.channels == 1 and usual == 3:
            text += f", the {'task' if task else 'others'} 3; save it in color"
        elif case.channels > LARGEST_CHANNELS:
            text += f" or time points, the network takes {LARGEST_CHANNELS}; select channels"
        elif task:
            text += f", the task {usual}; set its in_channels, or leave the case out"
        else:
            text += f", {counts[usual]} other cases {usual}; leave it out, or use the same channels for all"
        yield case.problem("channels", text)


def _mixture_problems(facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    """Single slices among volumes, 2-D images among scans."""
    volumes = [case for case in facts if case.shape and not case.picture]
    flat = [case for case in volumes if case.shape and 1 in case.shape]
    for case in flat if len(flat) < len(volumes) else []:
        text = f"{case.image[0]} is a single slice, others are volumes; leave it out"
        yield case.problem("one slice", text, False)
    pictures = sum(case.picture for case in facts)
    if pictures and volumes:
        text = f"{pictures} cases are 2-D images, {len(volumes)} are scans; split them into two data sets"
        yield Problem("mixed", text, stops=False)


def _patient_problems(data: DataList) -> Iterator[Problem]:
    """Patients in several sections or folds; files that are the image of several cases."""
    every = [(case, section) for section, cases in data.cases.items() for case in cases]
    sections = _grouped((patient_of(case), (section, case["id"])) for case, section in every)
    folds = _grouped(
        (patient_of(case), (case["fold"], case["id"]))
        for case, section in every
        if section == "training" and "fold" in case
    )
    for groups, what, remedy in (
        (sections, "sections", "which biases the scores; keep one"),
        (folds, "folds", "which --fold refuses; use one fold"),
    ):
        for patient, places in groups.items():
            first: dict[Any, str] = {}
            for place, name in places:
                first.setdefault(place, name)
            if len(first) > 1:
                shown = ", ".join(f"{name} in {place}" for place, name in first.items())
                text = f"patient {patient!r} is in {len(first)} {what} ({shown}), {remedy}"
                yield Problem("patient", text, stops=False)
    images = _grouped((files_of(case["image"])[0].resolve(), case["id"]) for case, _ in every if "slices" not in case)
    for path, names in images.items():
        if len(names) > 1:
            text = f"{path} is the image of {len(names)} cases ({', '.join(names)}); keep one"
            yield Problem("same image", text, names[1], False)
    labeled = [case for case, _ in every if "label" in case and "slices" not in case]
    labels = _grouped((Path(case["label"]).resolve(), case) for case in labeled)
    for path, mine in labels.items():
        if len({files_of(case["image"])[0].resolve() for case in mine}) > 1:
            text = (
                f"{path} is the label of {len(mine)} cases ({', '.join(case['id'] for case in mine)}) of other images"
            )
            yield Problem("same label", f"{text}; give each its own", mine[1]["id"])
    for case in labeled:
        if files_of(case["image"])[0].resolve() == Path(case["label"]).resolve():
            yield Problem("same file", f"{case['label']} is image and label of one case; give its label", case["id"])


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Key -> its values, in order."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _foreground_problems(report: DataReport, task: Task | None) -> Iterator[Problem]:
    """Missing training or validation foreground, for the default split."""
    training, validation = (report.data.cases[name] for name in ("training", "validation"))
    if not training:
        text = f"no case has image and label ({len(report.data.cases['test'])} without label)"
        yield Problem("no label", f"{text}; list labeled cases as training")
        return
    read = {case.id for case in report.labeled}
    foreground = {case.id for case in report.labeled if _has_foreground(case, report.data.labels, task)}
    if read and not foreground:
        yield Problem("no foreground", "no label contains any class; check labels, ids and names")
        return
    if not validation:
        try:
            parts = split(training, task or Task())
        except InputError:  # already listed as a problem
            return
        except SamdaError as error:
            yield Problem("split", str(error))
            return
        if "slices" in parts.validation[0]:
            return
        training, validation = parts.training, parts.validation
    for name, cases in (("training", training), ("validation", validation)):
        ids = {case["id"] for case in cases}
        if ids <= read and not ids & foreground:  # unreadable cases are separate problems
            names = ", ".join(case["id"] for case in cases[:5])
            text = f"no label of the {name} cases ({names}) has any class; choose others (--fold, --seed) or add some"
            yield Problem("no foreground", text)


def _has_foreground(case: CaseFacts, labels: Mapping[str, Iterable[int]] | None, task: Task | None) -> bool:
    named = (task.labels if task and task.labels else labels) or {}
    if named:
        skip = ("background", IGNORE)
        return any(i in case.label_ids for name, ids in named.items() if name not in skip for i in ids)
    return any(i != 0 for i in case.label_ids)


def task_problems(report: DataReport, task: Task) -> Iterator[Problem]:
    """Problems with a task: intensities mapped to one value, voxels of another scale, slices out of range."""
    low, high = task.window
    entries = [entry for cases in report.data.cases.values() for entry in cases]
    for case, entry in zip(report.cases, entries, strict=True):
        try:
            PartialLabels(task.classes).lacking(entry)
        except InputError as error:
            yield case.problem("unlabeled", str(error))
        if not case.shape:
            continue
        try:
            refuse_other_scale(sides_mm(case.sides_mm or (task.spacing,) * 3, case.shape, task), task)
        except InputError as error:
            yield case.problem("spacing", f"{case.image[0]}: {error}")
        ends = ENDS[task.slice_axis]
        size = next(n for n, end in zip(case.shape, case.orientation, strict=True) if end in ends)
        for first, end in entry.get("slices", []):
            if not 0 <= first < end <= size:
                text = f"slices {first} to {end} are not within its {size} slices; count from 0, end exclusive"
                yield case.problem("slices", text)
        if not case.quantiles or case.smallest == case.largest:
            continue
        text = f"{case.image[0]} has values from {case.smallest:g} to {case.largest:g}"
        if task.modality == "CT" and (case.largest <= low or case.smallest >= high):
            text += f", which the window {low:g} to {high:g} HU maps to one value; check units and modality"
            yield case.problem("intensity", text)
        elif task.modality == "CT" and case.smallest >= 0:
            text += "; a CT in Hounsfield units has air near -1000: check units and modality"
            yield case.problem("intensity", text, False)
        elif task.modality != "CT" and any(row[0] == row[-1] for row in case.quantiles):
            text += ", but 1 and 99 % of a channel are equal; check the file, or set wider percentiles in the task"
            yield case.problem("intensity", text, task.modality == "image")
