# SPDX-License-Identifier: Apache-2.0
"""Label-free measures against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from samda.adaptation.agreement import class_agreement, displacement, foreground_entropy, mean_agreement


def certain(labels: list[list[int]], classes: int = 3) -> torch.Tensor:
    """Logits (V, 1, K, 1, w) that predict `labels` (V lists of w classes) with certainty."""
    return 40.0 * torch.nn.functional.one_hot(torch.tensor(labels), classes).float().transpose(1, 2)[:, None, :, None]


def agreement(logits: torch.Tensor, classes: list[int] | None = None) -> float:
    return mean_agreement(class_agreement(logits), classes)


def test_agreement_by_hand() -> None:
    # class 1: view 0 has pixels {0, 1}, view 1 has {0}; each is the other's consensus: Dice 2/3 twice
    assert agreement(certain([[1, 1, 0, 0], [1, 0, 0, 0]])) == pytest.approx(2 / 3)


def test_agreement_leaves_the_view_itself_out() -> None:
    # three views: view 2 differs, the others agree. Consensus of (1, 2) ties by probability and argmax takes background
    z = certain([[1, 1], [1, 1], [0, 0]])
    assert agreement(z) == pytest.approx((0 + 0 + 0) / 3)
    z = certain([[1, 1], [1, 1], [1, 1], [0, 0]])
    assert agreement(z) == pytest.approx(3 / 4)


def test_collapse_does_not_gain() -> None:
    background = certain([[0, 0, 0], [0, 0, 0]])
    assert agreement(background) == 0.0
    assert agreement(background, classes=[1, 2]) == 0.0
    both = certain([[1, 2, 0], [1, 2, 0]])
    one = certain([[1, 0, 0], [1, 0, 0]])
    assert agreement(both) == 1.0
    assert agreement(one, classes=[1, 2]) == 0.5  # the lost class counts
    assert agreement(certain([[1, 1, 0], [0, 0, 0]])) == 0.0


def test_a_single_view_agrees_with_nobody() -> None:
    assert math.isnan(agreement(certain([[1, 0]])))


def test_classes_of_any_view_are_measured_one_by_one() -> None:
    by_class = class_agreement(certain([[0, 1, 1], [0, 1, 2], [0, 1, 2]]))
    # class 1: view 0 has {1, 2}, its others {1}: 2/3; views 1 and 2 have {1}, their others {1, 2} by a tie: 2/3
    # class 2: view 0 has none: 0; views 1 and 2 have {2}, the tie goes to class 1: 0
    assert by_class == pytest.approx({1: 2 / 3, 2: 0.0})
    assert mean_agreement(by_class) == pytest.approx(1 / 3)
    assert mean_agreement(by_class, [1]) == pytest.approx(2 / 3)
    assert mean_agreement(by_class, [1, 2, 3]) == pytest.approx(2 / 9)  # nobody shows class 3


def test_foreground_entropy() -> None:
    z = torch.zeros(2, 1, 2, 1, 2)
    z[:, :, 1, :, 0] = math.log(4)  # pixel 0: p = (.2, .8); pixel 1 ties and counts as background
    expected = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / math.log(2)
    assert foreground_entropy(z) == pytest.approx(expected, abs=1e-6)
    assert foreground_entropy(certain([[0, 0]])) == 1.0


def test_displacement_is_relative_to_all_tensors_together() -> None:
    start = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert displacement({"a": torch.tensor([3.5]), "b": torch.tensor([4.0])}, start) == pytest.approx(0.1)
