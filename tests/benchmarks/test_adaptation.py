# SPDX-License-Identifier: Apache-2.0
"""The simulated shifts of the adaptation's evidence, and its score."""

from __future__ import annotations

import numpy as np
import torch


def test_shifts_keep_the_shape_and_the_range() -> None:
    from benchmarks.evidence.adaptation import simulated_targets
    from benchmarks.evidence.shifts import shifts

    volume = torch.rand(1, 24, 24, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 24, 24, 6, dtype=torch.uint8)
    labels[:, 4:12, 4:12] = 1
    for shift in shifts(("background", "liver")):
        changed, moved = shift(volume, labels, np.array([3.0, 3.0, 3.0]), 400.0)
        assert changed.shape == moved.shape == volume.shape and 0 <= changed.min() <= changed.max() <= 1
        assert not torch.equal(changed, volume)
        assert (shift.bend is None) == torch.equal(moved, labels)
    assert {run["family"] for run in simulated_targets()} == {"tuning", "patients", "report"}


def test_dice_over_the_organs_that_are_shown() -> None:
    from benchmarks.evidence.adaptation import _mean_dice
    from samda.task import Task

    label, prediction = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    label[:2], prediction[:3], prediction[3] = 1, 1, 2  # class 2 is not shown: it counts nothing
    assert _mean_dice(prediction, label, Task(classes=("background", "a", "b"))) == 0.8
