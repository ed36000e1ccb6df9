# SPDX-License-Identifier: Apache-2.0
"""The validation metric of a training: Dice per case and class, pooled over all slices of the case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events

from samda.processes import exchange

__all__ = ["CaseDice"]


class CaseDice:
    """Mean Dice over cases and foreground classes, each pooled over the slices of a case on the slice grid.

    Dice = 2 |P & T| / (|P| + |T|). A missed class and a class found where there is none count 0; absent in both it does
    not count. Pooling counts slices without foreground, whose false positives a mean over slices would hide.

    It attaches like an ignite metric: `engine.state.metrics[name]` is the mean, `engine.state.metric_details[name]` the
    mean per class (None where the class never occurred). The number of the case is `batch["case"]`. Connected processes
    add up their counts, so the slices of a case may be spread over them.

    Args:
        classes: names of the classes, background first.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.reset()

    def reset(self, engine: Engine | None = None) -> None:
        """Forget everything."""
        self.counts: dict[int, torch.Tensor] = {}  # case -> (3, K): overlap, predicted, true voxels

    def update(self, logits: torch.Tensor, label: torch.Tensor, cases: Sequence[int]) -> None:
        """Add a batch.

        Args:
            logits: (B, K, H, W).
            label: (B, 1, H, W) class indices.
            cases: number of the case of each item.
        """
        k = len(self.classes)
        predicted, true = logits.argmax(1).flatten(1), label[:, 0].long().flatten(1)
        for p, t, case in zip(predicted, true, cases, strict=True):
            overlap = torch.bincount(t[p == t], minlength=k)
            counts = torch.stack([overlap, torch.bincount(p, minlength=k), torch.bincount(t, minlength=k)]).cpu()
            self.counts[int(case)] = self.counts.get(int(case), 0) + counts

    def merge(self, counts: Sequence[dict[int, torch.Tensor]]) -> None:
        """Take the sum of the counts of several processes, this one's among them."""
        self.counts = {}
        for part in counts:
            for case, values in part.items():
                self.counts[case] = self.counts.get(case, 0) + values

    def per_class(self) -> dict[str, float | None]:
        """Mean over the cases, per foreground class."""
        values: dict[str, float | None] = {}
        for k, name in enumerate(self.classes[1:], start=1):
            sums = [counts[:, k].tolist() for counts in self.counts.values()]
            dice = [2 * overlap / (predicted + true) for overlap, predicted, true in sums if predicted + true]
            values[name] = sum(dice) / len(dice) if dice else None
        return values

    def compute(self) -> float:
        """Mean over the classes; NaN if none occurred."""
        values = [value for value in self.per_class().values() if value is not None]
        return sum(values) / len(values) if values else math.nan

    def attach(self, engine: Engine, name: str) -> None:
        """Register with an evaluation engine."""

        def iteration(engine: Engine) -> None:
            output: Any = engine.state.output
            batch: Any = engine.state.batch
            self.update(output["pred"], output["label"], batch["case"])

        def epoch(engine: Engine) -> None:
            self.merge(exchange(self.counts))
            engine.state.metrics[name] = self.compute()
            engine.state.metric_details[name] = self.per_class()  # type: ignore[attr-defined]

        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, epoch)
