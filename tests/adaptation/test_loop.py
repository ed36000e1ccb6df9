# SPDX-License-Identifier: Apache-2.0
"""The inner loop on a network of one scale and one shift per class; label-free measures against counts by hand."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn as nn

from samda.adaptation.loop import (
    NotFinite,
    OutOfTime,
    class_agreement,
    displacement,
    foreground_entropy,
    mean_agreement,
    optimize,
    restoring,
)
from samda.adaptation.objectives import Objective, build_objective


class Scaler(nn.Module):
    """Logits z -> s z + b; `base` never moves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.shift = nn.Parameter(torch.full((3, 1, 1), 0.1))
        self.base = nn.Parameter(torch.ones(3, 1, 1), requires_grad=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.base * (self.scale * z + self.shift)

    def moving(self) -> dict[str, nn.Parameter]:
        return {"scale": self.scale, "shift": self.shift}


@pytest.fixture
def logits() -> torch.Tensor:
    z = torch.randn(3, 2, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    z[:, :, 0] += 1.0
    return z


def run(network: Scaler, logits: torch.Tensor, name: str = "tent", steps: int = 4, **options: object):
    with restoring(network, network.moving()) as start:
        trajectory = optimize(lambda: network(logits), network.moving(), build_objective(name), steps, 0.05, **options)
        inside = {k: v.detach().clone() for k, v in network.moving().items()}
    return trajectory, start, inside


def test_curves_cover_every_iterate_and_the_loss_falls(logits: torch.Tensor) -> None:
    trajectory, _, _ = run(Scaler(), logits)
    for curve in (trajectory.loss, trajectory.agreement, trajectory.entropy, trajectory.displacement, trajectory.merit):
        assert len(curve) == 5
    assert trajectory.loss[-1] < trajectory.loss[0]
    assert trajectory.displacement[0] == 0.0 and trajectory.displacement[-1] > 0


def test_first_adam_step_moves_every_number_by_the_rate(logits: torch.Tensor) -> None:
    trajectory, start, _ = run(Scaler(), logits, steps=1, merit=lambda z, agreed: float("nan"))
    for name, tensor in trajectory.tensors.items():
        moved = (tensor - start[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-3, atol=0)


def test_the_first_iterate_near_the_highest_merit_is_kept(logits: torch.Tensor) -> None:
    scores = iter([0.86, 0.1, 0.9, 0.85, 0.94])  # 95 % of 0.94 are 0.893
    trajectory, _, inside = run(Scaler(), logits, merit=lambda z, agreed: next(scores))
    assert trajectory.best_step == 2
    shorter, _, _ = run(Scaler(), logits, steps=2, merit=lambda z, agreed: float("nan"))  # NaN keeps the last one
    assert shorter.best_step == 2
    for name in inside:
        assert torch.equal(inside[name], shorter.tensors[name]) and torch.equal(inside[name], trajectory.tensors[name])


def test_steps_follow_the_best_of_the_starts(logits: torch.Tensor) -> None:
    starts = [{"scale": torch.full((3, 1, 1), value)} for value in (2.0, 3.0)]
    scores = iter([0.1, 0.5, 0.3, 0.2])
    trajectory, start, _ = run(Scaler(), logits, steps=1, starts=starts, merit=lambda z, agreed: next(scores))
    assert len(trajectory.loss) == len(trajectory.drift) == 4 and trajectory.best_step == 1
    assert torch.equal(trajectory.tensors["scale"], starts[0]["scale"])
    assert torch.equal(trajectory.tensors["shift"], start["shift"])
    moved = (trajectory.last["scale"] - starts[0]["scale"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-3, atol=0)
    last, _, _ = run(Scaler(), logits, steps=0, starts=starts, merit=lambda z, agreed: float("nan"))
    assert last.best_step == 2 and torch.equal(last.tensors["scale"], starts[1]["scale"])
    scores = iter([0.5, 0.5, 0.51, 0.6])
    trajectory, start, _ = run(Scaler(), logits, steps=1, starts=starts, merit=lambda z, agreed: next(scores))
    assert trajectory.best_step == 3
    moved = (trajectory.last["scale"] - starts[1]["scale"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-3, atol=0)


def test_no_step_follows_what_is_enough(logits: torch.Tensor) -> None:
    starts = [{"scale": torch.full((3, 1, 1), 2.0)}]
    for merits, steps in (([0.0, 0.3, 0.1], 0), ([0.0, 0.1, 0.1, 0.1], 2), ([0.25, 0.1], 0)):
        scores = iter(merits)
        found, start, _ = run(
            Scaler(),
            logits,
            steps=2,
            starts=starts,
            enough=lambda index, merits=merits: merits[index] >= 0.2,
            merit=lambda z, agreed, scores=scores: next(scores),
        )
        assert len(found.merit) == 2 + steps
        best = starts[0] if merits[1] > merits[0] else start
        assert torch.equal(found.tensors["scale"], best["scale"])
    alone, _, _ = run(Scaler(), logits, steps=2, enough=lambda index: True, merit=lambda z, agreed: 0.2)
    assert len(alone.merit) == 1


def test_a_rate_for_each_parameter(logits: torch.Tensor) -> None:
    network = Scaler()
    with restoring(network, network.moving()) as start:
        found = optimize(
            lambda: network(logits), network.moving(), build_objective("tent"), 1, {"scale": 0.05, "shift": 0.01}
        )
    for name, rate in (("scale", 0.05), ("shift", 0.01)):
        moved = (found.last[name] - start[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


def test_nothing_as_good_keeps_the_source(logits: torch.Tensor) -> None:
    scores = iter([0.5, 0.52, 0.3, 0.51, 0.1])
    trajectory, start, inside = run(Scaler(), logits, merit=lambda z, agreed: next(scores))
    assert trajectory.best_step == 0
    assert all(torch.equal(inside[name], start[name]) for name in start)


def test_no_steps_measure_the_source(logits: torch.Tensor) -> None:
    trajectory, start, inside = run(Scaler(), logits, steps=0)
    assert trajectory.best_step == 0 and len(trajectory.loss) == 1
    assert all(torch.equal(inside[name], start[name]) for name in start)


def test_everything_is_restored(logits: torch.Tensor) -> None:
    network = Scaler().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    run(network, logits)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.training and not network.base.requires_grad
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_everything_is_restored_after_an_exception(logits: torch.Tensor, error: type[BaseException]) -> None:
    network = Scaler()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    calls = []

    def merit(z: torch.Tensor, agreed: object) -> float:
        calls.append(0)
        if len(calls) == 3:
            raise error("in the middle")
        return 1.0

    with pytest.raises(error):
        run(network, logits, merit=merit)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.scale.requires_grad and not network.base.requires_grad


def test_only_what_is_named_moves(logits: torch.Tensor) -> None:
    network = Scaler()
    moving = {"scale": network.scale}
    with restoring(network, moving):
        assert not network.shift.requires_grad
        trajectory = optimize(lambda: network(logits), moving, build_objective("tent"), 2, 0.05)
        assert torch.equal(network.shift, torch.full((3, 1, 1), 0.1)) and network.shift.grad is None
    assert set(trajectory.tensors) == {"scale"} and network.shift.requires_grad


class Broken(Objective):
    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("nan")


class Steep(Objective):
    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits - logits.detach()).abs().sqrt().sum()  # 0, with an infinite slope


@pytest.mark.parametrize("objective", [Broken(), Steep()])
def test_not_finite_is_reported(logits: torch.Tensor, objective: Objective) -> None:
    network = Scaler()
    with pytest.raises(NotFinite), restoring(network, network.moving()):
        optimize(lambda: network(logits), network.moving(), objective, 2, 0.05)
    assert torch.equal(network.scale, torch.ones(3, 1, 1))


def test_out_of_time(logits: torch.Tensor) -> None:
    network = Scaler()
    with pytest.raises(OutOfTime), restoring(network, network.moving()):
        optimize(lambda: network(logits), network.moving(), build_objective("tent"), 2, 0.05, deadline=time.monotonic())


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
