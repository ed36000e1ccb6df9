# SPDX-License-Identifier: Apache-2.0
"""Map ids in label files to classes of a task, by name."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from samda.data.headers import segment_names
from samda.errors import InputError, UsageError, nearest
from samda.task import NAMED, Task, name_id

OPEN = 192  # values of label maps from here on are sets of classes, see :class:`PartialLabels`
IGNORED = 254  # the set of all classes
CHUNK = 1 << 22  # voxels counted or mapped at once
SHOWN = 8  # ids in a message
IGNORE = "ignore"  # nnU-Net's name of voxels without a label
SCALES = {1, 255}  # ids of a binary mask, one of which becomes the other in some programs
NEAR_ID = 1e-3  # largest distance of a value to the id that it stands for
LARGEST_RANGE = 1 << 20  # between the smallest and the largest id of a label file


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """Class index of each id in label files."""

    ids: Mapping[int, int]  # id -> class index; 0 for named structures outside the task, IGNORED without a label
    rest: int | None  # class index of all other ids: 0 (background), or None: refused
    source: str  # source of the ids, for messages

    @property
    def wanted(self) -> set[int]:
        """The ids of foreground classes."""
        return {i for i, index in self.ids.items() if index > 0}

    def refusal(self, found: Collection[int]) -> str:
        """Why a label with these ids cannot be used as it is, and the remedy; empty if it can."""
        own = {i for i in self.wanted if i < NAMED and self.ids[i] < OPEN}
        other = {i for i in found if i and i not in self.ids}
        if len(own) == 1 and own | other == SCALES:
            return f"is a mask of 0 and {min(other)}, {self.source} has id {min(own)}; save all masks with one id"
        return ""

    def warning(self, found: Collection[int]) -> str:
        """A warning if all of these ids become background though some are not 0; else empty."""
        others = [i for i in found if i]
        if self.rest != 0 or not others or any(i in self.ids for i in others):
            return ""
        shown = ", ".join(map(str, others[:SHOWN]))
        return f"all of it is background, as {self.source} lists none of its ids: {shown}"


@dataclasses.dataclass(frozen=True)
class PartialLabels:
    """What voxels may be where a label does not say it: label maps hold class indices, and values for sets of classes.

    Voxels of the ids `ignore` may be of any class (:data:`IGNORED`). In a case whose label lacks classes, background
    may also be one of these: value :data:`OPEN` + i for the classes `sets[i]`.

    Args:
        classes: of the task, background first.
        everywhere: classes that no case labels.
        sets: the different sets of class indices that labels of cases lack.
    """

    classes: tuple[str, ...]
    everywhere: tuple[str, ...] = ()
    sets: tuple[tuple[int, ...], ...] = ()

    def lacking(self, case: Mapping[Any, Any]) -> tuple[int, ...]:
        """Indices of the classes that the label of a case lacks: those of its entry "unlabeled", and of all cases."""
        names = {*self.everywhere, *case.get("unlabeled", ())}
        for name in names:
            if name not in self.classes[1:]:
                where = f"case {str(case.get('id', case.get('label')))!r}"
                raise InputError(f"{where}: unlabeled names {name!r}; {nearest(name, self.classes[1:])}")
        return tuple(k for k, name in enumerate(self.classes) if name in names)

    def background(self, case: Mapping[Any, Any]) -> int:
        """Value of the background of a case in label maps."""
        lacking = self.lacking(case)
        return OPEN + self.sets.index(lacking) if lacking else 0

    def possible(self) -> torch.Tensor:
        """(256, K) bool: the classes that each value of a label map leaves possible."""
        table = torch.zeros(256, len(self.classes), dtype=torch.bool)
        table[: len(self.classes)] = torch.eye(len(self.classes), dtype=torch.bool)
        for place, lacking in enumerate(self.sets, start=OPEN):
            table[place, [0, *lacking]] = True
        table[IGNORED] = True
        return table


def partial_labels(
    cases: Iterable[Mapping[Any, Any]],
    task: Task,
    dataset_labels: Mapping[str, tuple[int, ...]] | None = None,
    known: Collection[str] = (),
) -> PartialLabels | None:
    """What the labels of some cases leave open; None if nothing.

    No case labels a class for which `task.labels` lists no id, nor, without `task.labels`, a class in `known` (of the
    model that a training starts from) that the data set does not name.
    """
    named, listed = task.labels, dataset_labels or {}
    if named is not None:
        everywhere = [name for name in task.classes[1:] if not named.get(name)]
    else:
        everywhere = [name for name in task.classes[1:] if listed and name in known and name not in listed]
    gaps = PartialLabels(task.classes, tuple(everywhere))
    sets = tuple(sorted({lacking for case in cases if (lacking := gaps.lacking(case))}))
    if len(sets) > IGNORED - OPEN:
        raise InputError(
            f"cases lack {len(sets)} different sets of classes, at most {IGNORED - OPEN} can be told apart"
        )
    ignores = IGNORE not in task.classes and (IGNORE in listed or IGNORE in (named or {}))
    return dataclasses.replace(gaps, sets=sets) if sets or ignores else None


def label_map(
    task: Task, dataset_labels: Mapping[str, tuple[int, ...]] | None = None, absent: Collection[str] = ()
) -> LabelMap:
    """Map the ids of label files to class indices; the ids of "ignore" (nnU-Net's name) to :data:`IGNORED`.

    Classes in `absent` need no id.

    1. If `task.labels` is given, these ids are used and all other ids become background.
    2. Otherwise, the `labels` of the data set are matched with `task.classes` by name. Other named structures become
       background; ids without a name are refused.
    3. Otherwise, id k is class k, and larger ids are refused.

    Segments of DICOM labels have names, see :func:`samda.task.name_id`: those of the task's classes are these classes,
    in addition to the rules above, and all others become background.
    """
    if task.num_classes > OPEN:
        raise UsageError(f"labels of at most {OPEN} classes can be read, task {task.name!r} has {task.num_classes}")
    named = {name_id(name): k for k, name in enumerate(task.classes)}
    if task.labels is not None:
        _refuse_disagreement(task, dataset_labels or {})
        given = _invert(task, task.labels)
        open_ids = {*(dataset_labels or {}).get(IGNORE, ()), *task.labels.get(IGNORE, ())}
        return _ignoring(LabelMap(named | given, 0, f"task {task.name!r}"), open_ids - given.keys())
    if dataset_labels is None:
        numbered = {k: k for k in range(task.num_classes)}
        return LabelMap(numbered | named, None, f"task {task.name!r} (id k is class k)")
    ids = {i: 0 for name, values in dataset_labels.items() if name != IGNORE for i in values}
    for name in task.classes[1:]:
        if name not in dataset_labels and name_id(name) not in ids and name not in absent:
            raise InputError(
                f"the data set has no class {name!r}; {nearest(name, dataset_labels)} or add `labels` to the task"
            )
    own = {name: dataset_labels[name] for name in task.classes if name in dataset_labels}
    known = {0: 0} | ids | named | _invert(task, own)
    return _ignoring(LabelMap(known, None, "the data set's labels"), set(dataset_labels.get(IGNORE, ())) - known.keys())


def relabeled(task: Task, dataset_labels: Mapping[str, tuple[int, ...]] | None) -> Task:
    """The task of a trained model for labels of another data set.

    Its ids are those of the training data. Where this data set names its structures, a class has the ids of its name.
    A class that is not named keeps its ids if they belong to structures that the task does not know, with a warning:
    these may be parts of it. All other classes are not labeled here.

    Raises:
        InputError: the data set names structures, none of which is a class of the task or has one of its ids.
    """
    if task.labels is None or not dataset_labels:
        return task
    structures = {i: name for name, ids in dataset_labels.items() for i in ids}
    labels: dict[str, tuple[int, ...]] = {}
    for name in task.classes[1:]:
        own = task.labels.get(name, ())
        there = [structures.get(i) for i in own]
        if name in dataset_labels:
            labels[name] = tuple(dataset_labels[name])
        elif own and all(other is not None and other not in task.classes for other in there):
            shown = ", ".join(f"{i} ({other})" for i, other in zip(own, there, strict=True))
            warnings.warn(f"the data set has no class {name!r}: its ids {shown} are taken for it", stacklevel=2)
            labels[name] = own
        else:
            labels[name] = ()
    if not any(labels.values()):
        named = ", ".join(repr(name) for name in dataset_labels if name not in ("background", IGNORE))
        raise InputError(
            f"the data set names {named or 'no structure'}, none of which is a class of task {task.name!r} "
            f"({', '.join(task.classes[1:])}); rename them"
        )
    ignored = [i for i in task.labels.get(IGNORE, ()) if i not in structures]
    if ignored and IGNORE not in task.classes:
        labels[IGNORE] = tuple(ignored)
    return task if labels == dict(task.labels) else dataclasses.replace(task, labels=labels)


def scoring_map(
    cases: Iterable[Mapping[Any, Any]],
    task: Task,
    dataset_labels: Mapping[str, tuple[int, ...]] | None = None,
    known: Collection[str] = (),
) -> MapLabelsd:
    """The map of "label" by which a trained model is scored on the labels of a data set; see :func:`relabeled` and, for
    `known`, :func:`partial_labels`.
    """
    task = relabeled(task, dataset_labels)
    return MapLabelsd("label", task, dataset_labels, partial_labels(cases, task, dataset_labels, known))


def _ignoring(known: LabelMap, ids: Collection[int]) -> LabelMap:
    return dataclasses.replace(known, ids={**known.ids, **dict.fromkeys(ids, IGNORED)})


def _invert(task: Task, labels: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    ids: dict[int, int] = {}
    for index, name in enumerate(task.classes):
        for i in labels.get(name, ()):
            if i in ids:
                both = f"{task.classes[ids[i]]!r} and {name!r}"
                raise UsageError(f"task {task.name!r}: {both} share id {i}; use different ids")
            ids[i] = index
    return ids


def _refuse_disagreement(task: Task, dataset_labels: Mapping[str, tuple[int, ...]]) -> None:
    for name, ids in (task.labels or {}).items():
        numbers = {i for i in dataset_labels.get(name, ()) if i < NAMED}
        if ids and numbers and numbers != set(ids):
            raise InputError(
                f"class {name!r} has ids {list(ids)} in task {task.name!r} but {list(dataset_labels[name])} in the "
                "data set; use the task file of this data set, or a task without `labels`"
            )


def id_range(array: np.ndarray, name: str) -> tuple[int, int]:
    """The smallest and largest id of a label file; a range too large for ids is refused."""
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(high - low):
        bad = int((~np.isfinite(array)).sum())
        raise InputError(f"{name} contains {bad} NaN or infinite values, not class ids; set them to an id")
    if high - low > LARGEST_RANGE:
        raise InputError(f"{name} has values from {low:g} to {high:g}, not class ids; give a label map")
    return round(low), round(high)


def count_ids(array: np.ndarray, name: str) -> dict[int, int]:
    """id -> voxels of a label map, in order of the ids."""
    low, high = id_range(array, name)
    flat = array.ravel(order="K")  # a view of a dense array, whatever the order of its axes
    counts = np.zeros(high - low + 1, np.int64)
    for start in range(0, len(flat), CHUNK):
        counts += np.bincount(flat[start : start + CHUNK].astype(np.int64) - low, minlength=len(counts))
    return {int(k) + low: int(counts[k]) for k in np.flatnonzero(counts)}


def whole_ids(array: np.ndarray, name: str) -> np.ndarray:
    """The ids of a label file as integers.

    Values within 0.001 of integers are rounded with a warning: headers with a scale store 1 as 0.99998. Other values
    are refused.
    """
    low, high = id_range(array, name)
    if array.dtype.kind != "f":
        return array
    ids = np.empty(array.shape, np.int16 if low >= -(1 << 15) and high < 1 << 15 else np.int32)
    bad, largest = 0, 0.0
    for plane, values in zip(ids, array, strict=True):  # by plane, to save memory
        plane[...] = np.rint(values)
        off = np.abs(values - plane)
        bad += int((off > NEAR_ID).sum())
        largest = max(largest, float(off.max(initial=0)))
    if bad:
        raise InputError(f"{name} contains {bad} fractions, not class ids; resample labels with nearest neighbor")
    if largest:
        warnings.warn(f"{name}: ids are up to {largest:.1g} off integers and rounded (scaled header)", stacklevel=2)
    return ids


class MapLabelsd(MapTransform):
    """Ids of label files (1, X, Y, Z) -> class indices and values of :class:`PartialLabels`, uint8; see
    :func:`label_map`. The entry "unlabeled" of a case names classes that its label lacks.
    """

    def __init__(
        self,
        keys: KeysCollection,
        task: Task,
        dataset_labels: Mapping[str, tuple[int, ...]] | None = None,
        partial: PartialLabels | None = None,
    ) -> None:
        super().__init__(keys)
        self.partial, self.classes = partial, task.classes
        self.map = label_map(task, dataset_labels, partial.everywhere if partial else ())

    def __call__(self, data: Mapping[Any, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            label = d[key]
            name = label.meta.get("filename_or_obj", "the label") if isinstance(label, MetaTensor) else "the label"
            if d.get("unlabeled") and self.partial is None:
                raise InputError(f"{name}: its case lacks classes ('unlabeled'); build_preprocessing needs `partial`")
            mapped = self._map(label, str(name), self.partial.background(d) if self.partial else 0)
            d[key] = MetaTensor(mapped, meta=label.meta, applied_operations=label.applied_operations)
        return d

    def _map(self, label: MetaTensor, name: str, background: int) -> torch.Tensor:
        values = label.as_tensor() if isinstance(label, MetaTensor) else label
        values = torch.from_numpy(whole_ids(values.numpy(), name))
        found = list(count_ids(values.numpy(), name))
        self._check(found, name)
        self._check_names(found, name)
        first = found[0]
        table = torch.zeros(found[-1] - first + 1, dtype=torch.uint8)
        for i in found:
            table[i - first] = self.map.ids.get(i, 0) or background
        flat = values.reshape(-1)
        mapped = torch.empty(flat.shape, dtype=torch.uint8)
        for start in range(0, len(flat), CHUNK):  # indices are int64, eight times the memory of a label
            mapped[start : start + CHUNK] = table[flat[start : start + CHUNK].long() - first]
        return mapped.reshape(values.shape)

    def _check_names(self, found: Sequence[int], name: str) -> None:
        """Refuse a file of 3D Slicer whose name for an id is that of another class."""
        for i, segment in segment_names(name).items():
            index = self.map.ids.get(i, 0)
            if i in found and segment in self.classes and self.classes.index(segment) != index:
                here = f"that of {self.classes[index]!r}" if index < len(self.classes) else "without a label"
                raise InputError(
                    f"{name} states that id {i} is {segment!r}, but {self.map.source} says it is {here}; export it "
                    "as a labelmap with the ids of the task"
                )

    def _check(self, found: Sequence[int], name: str) -> None:
        """Refuse ids that must not become background; warn if all do. Names that are not classes may."""
        refusal, warning = self.map.refusal(found), self.map.warning(found)
        if refusal:
            raise InputError(f"{name} {refusal}")
        if warning:
            warnings.warn(f"{name}: {warning}", stacklevel=2)
        unknown = [i for i in found if self.map.rest is None and i not in self.map.ids and i < NAMED]
        if unknown:
            known = ", ".join(map(str, sorted(self.map.ids)[:16]))
            raise InputError(
                f"{name} has ids that {self.map.source} does not name: {', '.join(map(str, unknown[:SHOWN]))} (known: "
                f"{known}); list the ids of each class under `labels` in the task, and the others become background"
            )
