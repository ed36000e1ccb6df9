# SPDX-License-Identifier: Apache-2.0
"""The optimization loop of one case: optimizer steps, label-free measures of the iterates, and their selection."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from samda.adaptation.guard import Decision
from samda.adaptation.objectives import Objective, log_probabilities, most_likely, normalized_entropy
from samda.errors import SamdaError
from samda.progress import share

GRADIENT_NORM = 1.0  # clip
NEAR = 0.95  # share of the highest merit
Merit = Callable[[torch.Tensor, Mapping[int, float]], float]  # logits of all views, agreement by class -> score


class NotFinite(Exception):
    """A loss or parameter is not finite; the case falls back."""


class OutOfTime(Exception):
    """The time limit of the case was exceeded; the case falls back."""


def decision_of(error: Exception) -> Decision:
    """The decision on a case whose adaptation failed."""
    text = " ".join(str(error).split())
    if isinstance(error, NotFinite):
        return Decision.of("fallback_nonfinite", f"not finite: {text}")
    if isinstance(error, OutOfTime):
        return Decision.of("fallback_timeout", f"the time limit passed at {text}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return Decision.of("fallback_oom", "out of memory; lower slices or views")
    if isinstance(error, SamdaError) and "not finite" in text:
        return Decision.of("fallback_nonfinite", text)
    return Decision.of("fallback_error", f"{type(error).__name__} while adapting: {text}")


@dataclasses.dataclass
class Trajectory:
    """The course of one adaptation. Curves have one entry per iterate, the source model first."""

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

    def agreements(self) -> list[float]:
        """Agreement of source, kept and last iterate over the classes of all three: an organ that only the adapted
        model finds must not lower the mean.
        """
        measured = [self.by_class[step] for step in (0, self.best_step, -1)]
        return [mean_agreement(by_class, set().union(*measured)) for by_class in measured]


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
    lr: float | Mapping[str, float],
    merit: Merit | None = None,
    deadline: float | None = None,
    alignment: Callable[[], torch.Tensor] | None = None,
    starts: Sequence[Mapping[str, torch.Tensor]] = (),
    enough: Callable[[int], bool] | None = None,
) -> Trajectory:
    """Minimize the objective over `parameters`, which are theta_0 before and the kept iterate afterwards.

    The first iterates are theta_0 and the `starts`; from the one of highest `merit` follow steps of Adam with gradients
    clipped to norm 1, in fp32. Of all iterates, the first is kept whose merit is at least 95 % of the highest: views
    agree ever better with further steps, and the least change that has nearly the whole effect errs least.

    Args:
        logits_of: logits (V, N, K, h, w) of all views at the current parameters, with gradients.
        parameters: by name; they require gradients.
        objective: see :mod:`samda.adaptation.objectives`.
        steps: optimizer steps; 0 only measures theta_0 and the starts.
        lr: learning rate, or one for each parameter.
        merit: label-free score of an iterate; None is the agreement between views. NaN keeps the last iterate.
        deadline: `time.monotonic()` at which :class:`OutOfTime` is raised.
        alignment: distance of the features of the latest logits from the source's, see
            :mod:`samda.adaptation.alignment`; weighted by the objective.
        starts: values of some of the parameters, by name.
        enough: does no step follow the iterate of this index?
    """
    start, steps = copies(parameters), steps if parameters else 0
    run, last = Trajectory(start, start), len(starts) + steps
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def pass_(gradients: bool, record: bool = True) -> torch.Tensor:
        """The loss at the present parameters, which become an iterate."""
        nonlocal kept
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime(f"iterate {len(run.loss)} of {last}")
        with torch.set_grad_enabled(gradients):
            logits = logits_of().float()
            loss = objective.loss(logits)
        with torch.set_grad_enabled(gradients and objective.align > 0):
            drift = alignment() if alignment is not None else torch.tensor(math.nan)
        if alignment is not None and objective.align:
            loss = loss + objective.align * drift
        if record:
            run.drift.append(float(drift.detach()))
            run.displacement.append(displacement(parameters, start))
            _measure(run, logits.detach(), loss, merit)
            kept = _near_highest(kept | {len(run.merit) - 1: copies(parameters)}, run.merit)
            share(0.35 + 0.55 * (len(run.loss) - 1) / max(1, last))  # of a case: after prediction and views
        return loss

    measured = bool(starts) or enough is not None  # before the first step
    for tensors in (start, *starts) if measured else ():
        load(parameters, start | dict(tensors))
        pass_(gradients=False)
    if measured:
        first = max(kept, key=lambda index: (_merit(run.merit[index]), index))
        load(parameters, kept[first])
        steps = 0 if enough is not None and enough(first) else steps
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(parameters, lr)
    groups = [{"params": [tensor], "lr": rates[name]} for name, tensor in parameters.items()]
    optimizer = torch.optim.Adam(groups) if groups else None
    for step in range(steps + 1 if steps or not measured else 0):
        loss = pass_(gradients=step < steps, record=step > 0 or not measured)
        if optimizer is not None and step < steps:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), GRADIENT_NORM)
            if not torch.isfinite(norm):
                raise NotFinite(f"the gradient of step {step + 1}")
            optimizer.step()
    run.best_step = (max if math.isnan(run.merit[-1]) else min)(kept)
    run.tensors, run.last = kept[run.best_step], copies(parameters)
    load(parameters, run.tensors)
    return run


def keep_last(logits: torch.Tensor, agreed: Mapping[int, float]) -> float:
    """A merit that keeps the last iterate."""
    return math.nan


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


def _near_highest(kept: dict[int, dict[str, torch.Tensor]], merits: Sequence[float]) -> dict[int, Any]:
    """The iterates whose merit is near the highest so far."""
    least = NEAR * max(map(_merit, merits))
    return {index: tensors for index, tensors in kept.items() if _merit(merits[index]) >= least}


def _merit(merit: float) -> float:
    return math.inf if math.isnan(merit) else merit


def class_agreement(logits: torch.Tensor) -> dict[int, float]:
    """Per foreground class the mean over views of Dice(argmax p_v, argmax mean_{u != v} p_u), slices pooled.

    `logits` are (V, N, K, h, w), views mapped back. Empty predictions score 0, also against empty ones: a collapse to
    background must not gain. The result has every class that any view predicts; values are NaN with a single view.
    """
    views = logits.shape[0]
    p = log_probabilities(logits).exp()
    labels = most_likely(p)
    shown = sorted(set(labels.unique().tolist()) - {0})
    if views == 1:
        return dict.fromkeys(shown, float("nan"))
    others = most_likely(p.sum(0, keepdim=True) - p)
    dims = tuple(range(1, labels.ndim))
    dice = {}
    for c in shown:
        a, b = labels == c, others == c
        total = (a.sum(dims) + b.sum(dims)).double()
        dice[c] = float((2.0 * (a & b).sum(dims) / total.clamp_min(1.0)).mean())
    return dice


def mean_agreement(dice: Mapping[int, float], classes: Iterable[int] | None = None) -> float:
    """A in [0, 1]: the mean of :func:`class_agreement` over `classes`, by default those predicted.

    A class that no view predicts counts 0, so that a lost class does not raise the mean. 0 without any class.
    """
    chosen = sorted(dice if classes is None else classes)
    if any(math.isnan(value) for value in dice.values()):
        return math.nan
    return sum(dice.get(c, 0.0) for c in chosen) / len(chosen) if chosen else 0.0


def foreground_entropy(logits: torch.Tensor) -> float:
    """Mean normalized entropy over the pixels that view 0 predicts as foreground; 1 if there are none."""
    log_p = log_probabilities(logits[0])
    foreground = most_likely(log_p) > 0
    return float(normalized_entropy(log_p)[foreground].mean()) if foreground.any() else 1.0


def displacement(parameters: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> float:
    """|theta - theta_0| / |theta_0| over all adapted tensors; the root mean square of the change where theta_0 is 0.

    0 where nothing moves.
    """
    if not start:
        return 0.0
    moved = sum(float((parameters[name].detach() - start[name]).double().square().sum()) for name in start)
    size = sum(float(start[name].double().square().sum()) for name in start)
    return (moved / (size or sum(tensor.numel() for tensor in start.values()))) ** 0.5
