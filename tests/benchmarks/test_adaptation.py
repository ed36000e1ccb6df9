# SPDX-License-Identifier: Apache-2.0
"""docs/adaptation.md shows what benchmarks/results/adaptation.json holds; the simulated shifts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_gains_of_the_adaptation_by_hand() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "adaptation.json").read_text(encoding="utf-8"))
    runs = [run for run in results["runs"] if run["family"] == "real" and run["method"] == "default"]
    text = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    for case in ("B", "M"):
        scores = [run["mean_dice"] for run in runs if run["case"] == case]
        gain = statistics.fmean(score["final"] - score["source"] for score in scores)
        line = next(line for line in text.splitlines() if line.startswith(f"| {case}, adapted |"))
        assert f"{gain:+.3f}" in line
        plain = next(line for line in text.splitlines() if line.startswith(f"| {case}, source |"))
        assert all(
            abs(float(cell) - score["source"]) < 6e-4 for cell, score in zip(plain.split("|")[2:], scores, strict=False)
        )
        if case == "M":
            assert f"every model improved, by {gain:.3f} on average" in " ".join(text.split())


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
