# SPDX-License-Identifier: Apache-2.0
"""The simulated shifts of the adaptation's evidence, and its score."""

from __future__ import annotations

import numpy as np
import torch


def test_shifts_keep_the_shape_and_the_range_and_grow() -> None:
    from benchmarks.evidence.adaptation import SEVERITIES, SHIFTS, shifted

    volume = 0.1 + 0.8 * torch.rand(1, 24, 24, 6, generator=torch.Generator().manual_seed(0))
    for name in SHIFTS:
        changes = []
        for severity in SEVERITIES:
            changed = shifted(volume, name, severity)
            assert changed.shape == volume.shape and 0 <= changed.min() <= changed.max() <= 1
            assert torch.equal(changed, shifted(volume, name, severity))
            changes.append(float((changed - volume).abs().mean()))
        assert 0 < changes[0] < changes[-1]
        assert shifted(volume[..., :1], name, 3).shape == (1, 24, 24, 1)  # a picture


def test_sites_by_hand() -> None:
    from benchmarks.evidence.adaptation import site_targets
    from benchmarks.evidence.tables import shifted

    run = next(run for run in site_targets() if run["target"] != run["source"])
    case = {"reason": "accepted", "seconds": 5.0, "predict": 2.0}
    cases = {"a": case | {"source": 0.5, "final": 0.7}, "b": case | {"source": 0.6, "final": 0.57, "reason": "x"}}
    line = shifted([run | {"cases": cases}]).splitlines()[-1]
    expected = ["vessels_chase", "vessels_lesav", "2", "0.550", "0.635", "50 %", "-0.030", "50 %", "2.5"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == expected


def test_dice_over_the_organs_that_are_shown() -> None:
    from benchmarks.evidence.adaptation import _mean_dice
    from samda.task import Task

    label, prediction = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    label[:2], prediction[:3], prediction[3] = 1, 1, 2  # class 2 is not shown: it counts nothing
    assert _mean_dice(prediction, label, Task(classes=("background", "a", "b"))) == 0.8
