# SPDX-License-Identifier: Apache-2.0
"""A few slices of some scans, prepared as for a prediction: the same ones whatever network looks at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor

from samda.data.datalists import Case
from samda.data.slices import SliceGrid
from samda.data.task import Task
from samda.data.transforms import build_preprocessing
from samda.errors import InputError, UsageError

__all__ = ["body_slices", "check_same_slices"]

PREPARED_BY = ("modality", "window", "percentiles", "spacing", "image_size", "axis", "in_channels", "context")


def body_slices(cases: Sequence[Case], task: Task, count: int) -> list[torch.Tensor]:
    """Evenly spaced slices through the bodies of scans, each as the network sees it.

    Every scan gives equally many, as far as it has them; of more scans than slices, evenly spaced ones give one each.
    The order is that of the scans and of the slices within them. Where the body is larger than the field of view, it is
    the window in the middle.

    Args:
        cases: see :func:`samda.inference.predict.find_cases`.
        task: geometry and intensities.
        count: at most so many slices in all, at least 1.

    Returns:
        (C, H, W) float32 in [0, 1] each, C the task's `network_channels`, H and W its `image_size`.

    Raises:
        InputError: a scan cannot be read or used, or no slice of any scan shows a body.
        UsageError: `count` is below 1.
    """
    if count < 1:
        raise UsageError(f"at least one slice is needed, got {count}")
    scans = [cases[i] for i in _spread(len(cases), count)]
    preprocessing = build_preprocessing(task, labels=False)
    slices: list[torch.Tensor] = []
    for k, case in enumerate(scans):
        image = preprocessing({key: value for key, value in case.items() if key != "label"})["image"]
        wanted = count // len(scans) + (k < count % len(scans))
        slices += _slices_of(image, task, wanted)
    if not slices:
        raise InputError(
            f"no slice shows a body (scans looked at: {len(scans)}); check the files and the task's modality"
        )
    return slices


def check_same_slices(tasks: dict[str, Task]) -> None:
    """Refuse tasks for which one scan becomes different slices.

    Args:
        tasks: name of the model -> its task.

    Raises:
        UsageError: naming the first difference.
    """
    (first, reference), *others = tasks.items()
    for name, task in others:
        for key in PREPARED_BY:
            if getattr(task, key) != getattr(reference, key):
                raise UsageError(
                    f"{first} and {name} see different images ({key} {getattr(reference, key)} and "
                    f"{getattr(task, key)}), so their fields cannot be compared; measure them one at a time"
                )


def _slices_of(image: MetaTensor, task: Task, count: int) -> list[torch.Tensor]:
    """Slices of a preprocessed volume (C, X, Y, Z)."""
    volume = image.as_tensor()
    grid = SliceGrid.from_volume(volume, image.affine, task)
    planes = volume.movedim(1 + grid.axes[0], 0).flatten(1)
    shown = [i for i in range(*grid.body) if planes[i].min() < planes[i].max()]  # a constant plane shows nothing
    rows, columns = (slice(start, start + task.image_size) for start in (_middle(n, task) for n in grid.canvas))
    return [grid.inputs(volume, shown[i])[0, :, rows, columns] for i in _spread(len(shown), count)]


def _middle(side: int, task: Task) -> int:
    """Where the middle window of a canvas begins; both are multiples of 16."""
    return (side - task.image_size) // 2


def _spread(total: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `total`; all of them where there are no more."""
    count = min(total, count)
    return [int(i) for i in (np.arange(count) + 0.5) * total // max(count, 1)]
