# SPDX-License-Identifier: Apache-2.0
"""The optimization loop of one case: optimizer steps, curves, and selection of the iterate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from samda.adaptation.agreement import class_agreement, displacement, foreground_entropy, mean_agreement
from samda.adaptation.objectives import Objective
from samda.progress import share

GRADIENT_NORM = 1.0  # clip
NEAR = 0.9  # share of the highest merit; merit is coarse, and good objectives improve with further steps
Merit = Callable[[torch.Tensor, Mapping[int, float]], float]  # logits of all views, agreement by class -> score


class NotFinite(Exception):
    """A loss or parameter is not finite; the case falls back."""


class OutOfTime(Exception):
    """The time limit of the case was exceeded; the case falls back."""


@dataclasses.dataclass
class Trajectory:
    """The course of one adaptation. Curves have one entry per iterate, the source model first (`steps` + 1 entries)."""

    tensors: dict[str, torch.Tensor]  # of the kept iterate
    last: dict[str, torch.Tensor]  # of the last iterate
    best_step: int = 0
    loss: list[float] = dataclasses.field(default_factory=list)
    agreement: list[float] = dataclasses.field(default_factory=list)  # mean over the classes of source and iterate
    by_class: list[dict[int, float]] = dataclasses.field(default_factory=list)  # the same for each class
    entropy: list[float] = dataclasses.field(default_factory=list)
    merit: list[float] = dataclasses.field(default_factory=list)
    displacement: list[float] = dataclasses.field(default_factory=list)
    drift: list[float] = dataclasses.field(default_factory=list)  # of the features; NaN where it is not measured

    def measures(self) -> tuple[float, float, float]:
        """Agreement, entropy and drift of the kept iterate."""
        return self.agreement[self.best_step], self.entropy[self.best_step], self.drift[self.best_step]


@contextlib.contextmanager
def restoring(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Enable gradients only for `parameters`, yield their initial values by name, and restore them bitwise at exit."""
    start = copies(parameters)
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield start
    finally:
        load(parameters, start)
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The present values, by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def load(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` into `parameters`, by name."""
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def optimize(
    logits_of: Callable[[], torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    steps: int,
    lr: float,
    merit: Merit | None = None,
    deadline: float | None = None,
    alignment: Callable[[], torch.Tensor] | None = None,
) -> Trajectory:
    """Minimize the objective over `parameters`, which are theta_0 before and the kept iterate afterwards.

    Adam with gradients clipped to norm 1, in fp32. The kept iterate is the latest whose `merit` is at least 90 % of the
    highest, theta_0 included.

    Args:
        logits_of: logits (V, N, K, h, w) of all views at the current parameters, with gradients.
        parameters: by name; they require gradients.
        objective: see :mod:`samda.adaptation.objectives`.
        steps: optimizer steps; 0 only measures the source model.
        lr: learning rate.
        merit: label-free score of an iterate; None is the agreement between views. NaN keeps the last iterate.
        deadline: `time.monotonic()` at which :class:`OutOfTime` is raised.
        alignment: distance of the features of the latest logits from the source's, see
            :mod:`samda.adaptation.alignment`; weighted by the objective.
    """
    start = copies(parameters)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=lr)
    run = Trajectory(start, start)
    state: Any = None
    kept: dict[int, dict[str, torch.Tensor]] = {}
    for step in range(steps + 1):
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime(f"step {step} of {steps}")
        with torch.set_grad_enabled(step < steps):
            logits = logits_of().float()
        now = logits.detach()
        if step == 0:
            state = objective.prepare(now)
        with torch.set_grad_enabled(step < steps):
            loss = objective.loss(logits, state) + objective.anchor * _anchor(parameters, start)
        with torch.set_grad_enabled(step < steps and objective.align > 0):
            drift = alignment() if alignment is not None else torch.tensor(math.nan)
        if alignment is not None and objective.align:
            loss = loss + objective.align * drift
        run.drift.append(float(drift.detach()))
        run.displacement.append(displacement(parameters, start))
        _measure(run, now, loss, merit)
        share(0.35 + 0.55 * step / max(1, steps))  # of a case: after prediction and views
        kept = {i: tensors for i, tensors in kept.items() if _is_near(run, i)}
        if _is_near(run, step):
            kept[step] = copies(parameters)
        if step < steps:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), GRADIENT_NORM)
            if not torch.isfinite(norm):
                raise NotFinite(f"the gradient of step {step + 1}")
            optimizer.step()
    run.best_step = max(kept)
    run.tensors = kept[run.best_step]
    run.last = copies(parameters)
    load(parameters, run.tensors)
    return run


def keep_last(logits: torch.Tensor, agreed: Mapping[int, float]) -> float:
    """A merit that keeps the last iterate."""
    return math.nan


def _anchor(parameters: Mapping[str, nn.Parameter], start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """|theta - theta_0|^2 / |theta_0|^2 over all adapted tensors."""
    moved = torch.stack([(parameters[name] - start[name]).square().sum() for name in start]).sum()
    return moved / torch.stack([tensor.square().sum() for tensor in start.values()]).sum().clamp_min(1e-12)


def _measure(run: Trajectory, logits: torch.Tensor, loss: torch.Tensor, merit: Merit | None) -> None:
    """Add the measures of an iterate to the curves."""
    value = float(loss.detach())
    if not math.isfinite(value) or not torch.isfinite(logits).all():
        raise NotFinite(f"loss {value} after {len(run.loss)} steps")
    run.by_class.append(class_agreement(logits))
    agreed = mean_agreement(run.by_class[-1], {*run.by_class[0], *run.by_class[-1]})
    run.loss.append(value)
    run.agreement.append(agreed)
    run.entropy.append(foreground_entropy(logits))
    run.merit.append(agreed if merit is None else merit(logits, run.by_class[-1]))


def _is_near(run: Trajectory, step: int) -> bool:
    """Is the merit of an iterate at least 90 % of the highest so far? NaN is, and replaces previous iterates."""
    merits = [math.inf if math.isnan(merit) else merit for merit in run.merit]
    return merits[step] >= NEAR * max(merits)
