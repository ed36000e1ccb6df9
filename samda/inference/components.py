# SPDX-License-Identifier: Apache-2.0
"""The largest connected piece of a class: what a label map keeps of organs that come in one piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, get_largest_connected_component_mask
from scipy import ndimage

from samda.data.task import Task
from samda.errors import UsageError

__all__ = ["KeepLargestd", "keep_largest", "override"]


def keep_largest(labels: np.ndarray, classes: Iterable[int]) -> np.ndarray:
    """Turn all but the largest piece of each class into background; pieces are 3-D and touch at faces, edges, corners.

    Each class is looked at by itself, within the box around it: memory grows with that box, not with the volume. Of
    pieces of equal size the first stays, in the order of the array.

    Args:
        labels: (X, Y, Z) class indices, integers.
        classes: which classes; all others are left as they are.

    Returns:
        (X, Y, Z) of the same dtype; the array itself where nothing had to go.
    """
    chosen = sorted(set(classes))
    boxes = ndimage.find_objects(labels, max_label=max(chosen)) if chosen and labels.any() else []
    result = labels
    for k in chosen:
        box = boxes[k - 1] if k <= len(boxes) else None
        if box is None:
            continue
        mask = labels[box] == k
        stray = mask & ~np.asarray(get_largest_connected_component_mask(mask))
        if stray.any():
            result = labels.copy() if result is labels else result
            result[box][stray] = 0
    return result


class KeepLargestd(MapTransform):
    """As :func:`keep_largest`, for label maps (1, X, Y, Z) in a dictionary; which classes, says `task.largest_only`.

    Args:
        keys: keys of the label maps.
        task: a Task or its values.
    """

    def __init__(self, keys: KeysCollection, task: Task | Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.task = task if isinstance(task, Task) else Task.from_dict(task)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            volume = d[key]
            plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
            kept = keep_largest(plain[0].cpu().numpy(), self.task.largest_only)
            result = torch.from_numpy(kept)[None].to(plain.device)
            d[key] = MetaTensor(result).copy_meta_from(volume) if isinstance(volume, MetaTensor) else result
        return d


def override(task: Task, classes: bool | str | Sequence[str] | None) -> Task:
    """The task with another `keep_largest`: names of classes, true or "all", false or "none"; None leaves the task's.

    Raises:
        UsageError: a name that is no foreground class.
    """
    if classes is None:
        return task
    if isinstance(classes, str):
        classes = {"all": True, "none": False}.get(classes, [name.strip() for name in classes.split(",")])
    if not isinstance(classes, bool) and not all(classes):
        raise UsageError(f"keep_largest {list(classes)} holds an empty name; give names of classes, or all, or none")
    return dataclasses.replace(task, keep_largest=classes if isinstance(classes, bool) else tuple(classes))
