# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine

from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.training import CaseDice


def logits_of(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits whose argmax is `labels` (B, H, W)."""
    return F.one_hot(labels, classes).movedim(-1, 1).float() * 5


def test_dice_is_pooled_over_the_slices_of_a_case() -> None:
    metric = CaseDice(["background", "organ"])
    true = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]]])  # two slices of one case, the second empty
    predicted = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 0]]])
    metric.update(logits_of(predicted, 2), true[:, None], [0, 0])
    assert metric.compute() == pytest.approx(2 * 1 / (3 + 2))  # not the mean of 2/3 and 0


def test_cases_and_classes_are_averaged() -> None:
    metric = CaseDice(["background", "a", "b"])
    true = torch.tensor([[[1, 1, 2, 0]], [[1, 0, 0, 0]]])
    predicted = torch.tensor([[[1, 0, 2, 0]], [[0, 0, 0, 0]]])
    metric.update(logits_of(predicted, 3), true[:, None], torch.tensor([0, 1]))
    assert metric.per_class() == {"a": pytest.approx((2 / 3 + 0) / 2), "b": pytest.approx(1.0)}
    assert metric.compute() == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("true", "predicted", "expected"),
    [([0, 0], [0, 0], math.nan), ([0, 0], [1, 0], 0.0), ([1, 0], [0, 0], 0.0), ([1, 0], [1, 0], 1.0)],
    ids=["absent in both", "only predicted", "missed", "equal"],
)
def test_the_rules_for_absent_classes(true: list[int], predicted: list[int], expected: float) -> None:
    metric = CaseDice(["background", "organ"])
    metric.update(logits_of(torch.tensor([[predicted]]), 2), torch.tensor([[[true]]]), [0])
    assert metric.compute() == pytest.approx(expected, nan_ok=True)


def test_it_attaches_to_an_engine_and_starts_anew_each_run() -> None:
    label = torch.tensor([[[[1, 0]]]])
    engine = Engine(lambda engine, batch: {"pred": logits_of(label[:, 0], 2), "label": batch["label"]})
    engine.state.metric_details = {}  # MONAI's evaluators have it
    CaseDice(["background", "organ"]).attach(engine, "dice")
    for other in (label, 1 - label):  # right, then wrong everywhere
        engine.run([{"label": other, "case": torch.tensor([3])}])
    assert engine.state.metrics["dice"] == 0.0
    assert engine.state.metric_details["dice"] == {"organ": 0.0}


def test_what_partial_labels_leave_open_does_not_count() -> None:
    metric = CaseDice(["background", "a", "b"], PartialLabels(("background", "a", "b"), sets=((2,),)))
    true = torch.tensor([[[1, 1, OPEN, OPEN, IGNORED, IGNORED]], [[1, 2, 2, 0, IGNORED, IGNORED]]])
    predicted = torch.tensor([[[1, 2, 1, 2, 1, 2]], [[1, 2, 0, 0, 2, 1]]])
    metric.update(logits_of(predicted, 3), true[:, None], [0, 1])
    # a of case 0: one of two found, one false; b is not labeled in case 0, in case 1 one of two is found
    assert metric.per_class() == {"a": pytest.approx((2 / (2 + 2) + 1) / 2), "b": pytest.approx(2 / 3)}
