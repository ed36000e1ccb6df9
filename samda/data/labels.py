# SPDX-License-Identifier: Apache-2.0
"""Map ids in label files to classes of a task, by name."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from samda.errors import InputError, UsageError, nearest
from samda.task import NAMED, Task, name_id

UNKNOWN = 255  # class index of an id without a name
CHUNK = 1 << 22  # voxels mapped at once
IGNORE = "ignore"  # nnU-Net's name of voxels without a label
SCALES = {1, 255}  # ids of a binary mask, one of which becomes the other in some programs
NEAR_ID = 1e-3  # largest distance of a value to the id that it stands for
LARGEST_RANGE = 1 << 20  # between the smallest and the largest id of a label file


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """Class index of each id in label files."""

    ids: Mapping[int, int]  # id -> class index; 0 for named structures outside the task
    rest: int | None  # class index of all other ids: 0 (background), or None: refused
    source: str  # source of the ids, for messages
    ignored: frozenset[int] = frozenset()  # ids of unlabeled voxels: refused

    @property
    def wanted(self) -> set[int]:
        """The ids of foreground classes."""
        return {i for i, index in self.ids.items() if index > 0}

    def refusal(self, found: Collection[int]) -> str:
        """Why a label with these ids cannot be used as it is, and the remedy; empty if it can."""
        unlabeled = sorted(self.ignored & set(found))
        if unlabeled:
            return (
                f"has voxels of id {unlabeled[0]}, the data set's {IGNORE!r}: they would become background; label "
                "them, leave the case out, or list the id under a class of the task"
            )
        own = {i for i in self.wanted if i < NAMED}
        other = {i for i in found if i and i not in self.ids}
        if len(own) == 1 and own | other == SCALES:
            return f"is a mask of 0 and {min(other)}, {self.source} has id {min(own)}; save all masks with one id"
        return ""


def label_map(task: Task, dataset_labels: Mapping[str, tuple[int, ...]] | None = None) -> LabelMap:
    """Map the ids of label files to class indices.

    Voxels with the id of nnU-Net's "ignore" are refused unless the task lists the id.

    1. If `task.labels` is given, these ids are used and all other ids become background.
    2. Otherwise, the `labels` of the data set are matched with `task.classes` by name. Other named structures become
       background; ids without a name are refused.
    3. Otherwise, id k is class k, and larger ids are refused.

    Segments of DICOM labels have names, see :func:`samda.task.name_id`: those of the task's classes are these classes,
    in addition to the rules above, and all others become background.
    """
    named = {name_id(name): k for k, name in enumerate(task.classes)}
    if task.labels is not None:
        _refuse_disagreement(task, dataset_labels or {})
        given = _invert(task, task.labels)
        ignored = frozenset((dataset_labels or {}).get(IGNORE, ())) - given.keys()
        return LabelMap(named | given, 0, f"task {task.name!r}", ignored)
    if dataset_labels is None:
        numbered = {k: k for k in range(task.num_classes)}
        return LabelMap(numbered | named, None, f"task {task.name!r} (id k is class k)")
    ids = {i: 0 for name, values in dataset_labels.items() if name != IGNORE for i in values}
    for name in task.classes[1:]:
        if name not in dataset_labels and name_id(name) not in ids:
            raise InputError(
                f"the data set has no class {name!r}; {nearest(name, dataset_labels)} or add `labels` to the task"
            )
    own = {name: dataset_labels[name] for name in task.classes if name in dataset_labels}
    known = {0: 0} | ids | named | _invert(task, own)
    return LabelMap(known, None, "the data set's labels", frozenset(dataset_labels.get(IGNORE, ())) - known.keys())


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
        if numbers and numbers != set(ids):
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
    """Ids of label files (1, X, Y, Z) -> class indices, uint8; see :func:`label_map`."""

    def __init__(
        self, keys: KeysCollection, task: Task, dataset_labels: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        super().__init__(keys)
        self.map = label_map(task, dataset_labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            label = d[key]
            name = label.meta.get("filename_or_obj", "the label") if isinstance(label, MetaTensor) else "the label"
            mapped = self._map(label, str(name))
            d[key] = MetaTensor(mapped, meta=label.meta, applied_operations=label.applied_operations)
        return d

    def _map(self, label: MetaTensor, name: str) -> torch.Tensor:
        values = label.as_tensor() if isinstance(label, MetaTensor) else label
        values = torch.from_numpy(whole_ids(values.numpy(), name))
        first, last = id_range(values.numpy(), name)
        self._check(values.reshape(-1), first, last, name)
        table = torch.full((last - first + 1,), UNKNOWN if self.map.rest is None else self.map.rest)
        table[max(0, NAMED - first) :] = 0  # names that are no classes
        for i, index in self.map.ids.items():
            if 0 <= i - first < len(table):
                table[i - first] = index
        table = table.to(torch.uint8)
        flat = values.reshape(-1)
        mapped = torch.empty(flat.shape, dtype=torch.uint8)
        for start in range(0, len(flat), CHUNK):  # indices are int64, eight times the memory of a label
            mapped[start : start + CHUNK] = table[flat[start : start + CHUNK].long() - first]
        if self.map.rest is None and (mapped == UNKNOWN).any():
            self._refuse(flat[mapped == UNKNOWN], name)
        return mapped.reshape(values.shape)

    def _check(self, values: torch.Tensor, first: int, last: int, name: str) -> None:
        """Refuse ids that must not become background; warn if all do."""
        counts = np.zeros(last - first + 1, np.int64)
        for part in values.split(CHUNK):
            counts += np.bincount(part.numpy().astype(np.int64) - first, minlength=len(counts))
        found = [int(i) + first for i in np.flatnonzero(counts)]
        refusal = self.map.refusal(found)
        if refusal:
            raise InputError(f"{name} {refusal}")
        others = [i for i in found if i]
        if self.map.rest == 0 and others and not any(i in self.map.ids for i in others):
            shown = ", ".join(map(str, others[:8]))
            warnings.warn(
                f"{name}: all of it is background, as {self.map.source} lists none of its ids: {shown}", stacklevel=2
            )

    def _refuse(self, values: torch.Tensor, name: str) -> None:
        unknown = ", ".join(str(int(i)) for i in values.unique()[:8])
        known = ", ".join(map(str, sorted(self.map.ids)[:16]))
        raise InputError(
            f"{name} has ids that {self.map.source} does not name: {unknown} (known: {known}); list the ids of each "
            "class under `labels` in the task, and the others become background"
        )
