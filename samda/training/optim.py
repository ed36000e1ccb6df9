# SPDX-License-Identifier: Apache-2.0
"""What changes the parameters that adapters and class head declare: optimizer, schedule, penalty, moving average.

ignite's EMAHandler is not used: it copies the whole network, and almost all of this one is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from samda.adapters.base import adapter_parameters, modules, regularization, trainable_parameters
from samda.errors import UsageError
from samda.training.pace import Pace


def parameter_groups(network: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trainable parameters that are not frozen by full name, each in exactly one group: "adapters", "head" and
    "base" (what a baseline trains). Empty groups are omitted.
    """
    trainable = {name: p for name, p in trainable_parameters(network).items() if p.requires_grad}
    adapters = set(adapter_parameters(network))
    head = set(network.head_params())  # type: ignore[operator]
    groups: dict[str, dict[str, nn.Parameter]] = {"adapters": {}, "head": {}, "base": {}}
    for name, parameter in trainable.items():
        group = "adapters" if name in adapters else "head" if name in head else "base"
        groups[group][name] = parameter
    return {group: parameters for group, parameters in groups.items() if parameters}


def build_optimizer(
    network: nn.Module,
    learning_rate: float | Mapping[str, float | None] = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over the groups of :func:`parameter_groups`.

    Vectors and scalars (biases, scales and shifts of norms, gates, singular values) do not decay, matrices and kernels
    do; a group "adapters" therefore appears as "adapters" and "adapters/vectors". `learning_rate` is one rate, or a
    rate per group name ("adapters", "head", "base"); None for the head is the rate that suits its kind.
    """
    groups = parameter_groups(network)
    if isinstance(learning_rate, Mapping):
        unknown = [name for name in learning_rate if name not in ("adapters", "head", "base")]
        missing = [name for name in groups if name not in learning_rate]
        if unknown or missing:
            what = f"unknown group {unknown[0]!r}" if unknown else f"no rate for the group {missing[0]!r}"
            raise UsageError(f"learning_rate: {what}; this network has {', '.join(groups)}")
    settings: list[dict[str, Any]] = []
    for group, parameters in groups.items():
        rate = learning_rate[group] if isinstance(learning_rate, Mapping) else learning_rate
        if rate is None and group == "head":
            rate = network.head_config.learning_rate  # type: ignore[union-attr,assignment]
        if rate is None or not 0 < rate < math.inf:
            raise UsageError(f"learning_rate of {group!r} must be positive, got {rate}")
        for name, vectors in ((group, False), (f"{group}/vectors", True)):
            chosen = [p for p in parameters.values() if (p.ndim < 2) == vectors]
            if chosen:
                decay = 0.0 if vectors else weight_decay
                settings.append({"name": name, "params": chosen, "lr": rate, "weight_decay": decay})
    devices = {parameter.device.type for group in settings for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"}  # one kernel for all tensors: many small ones otherwise cost as much as a pass
    return torch.optim.AdamW(settings, lr=1e-3, betas=betas, fused=fused)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    epochs: int = 1,
    iterations: int = 1,
    warmup: float = 0.05,
    pace: Pace | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine to zero, one step per iteration.

    Unlike MONAI's `WarmupCosineSchedule` it does not spend the first iteration at rate zero, and its state leaves the
    length of the training open, so one can resume with more steps.

    With T steps and w = round(warmup T), 0 <= warmup < 1, the rate of step t is multiplied by (t + 1) / (w + 1) for
    t < w, else by (1 + cos(pi (t - w) / (T - w))) / 2. Where only the used share u of the time is known, by
    max(u / warmup, 0.1) for u < warmup, else by (1 + cos(pi (u - warmup) / (1 - warmup))) / 2.

    Args:
        epochs: passes over the training slices.
        iterations: steps of a pass.
        warmup: share of the training.
        pace: the length of the training; None is `epochs` times `iterations`.
    """
    if not 0 <= warmup < 1:
        raise UsageError(f"warmup is a share of the training, in [0, 1); got {warmup}")
    total = max(1, epochs * iterations)
    if pace is not None:
        total = pace.steps or (pace.epochs or 1) * iterations
    rise = round(warmup * total)

    def by_steps(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    def by_time(step: int) -> float:
        share = pace.share if pace is not None else 0.0
        if share < warmup:
            return max(share / warmup, 0.1)
        return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))

    timed = pace is not None and pace.minutes is not None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, by_time if timed else by_steps)


class ClipGradients:
    """Shortens the gradient of all parameters of `optimizer` to `norm` before a step; 0 leaves it as it is."""

    def __init__(self, optimizer: torch.optim.Optimizer, norm: float = 1.0) -> None:
        self.optimizer, self.norm = optimizer, norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        if self.norm:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if getattr(engine, "scaler", None) is not None:  # the gradients are still scaled
            engine.scaler.unscale_(self.optimizer)  # type: ignore[attr-defined]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.norm)


class PenalizedLoss(nn.Module):
    """`loss` + `weight` times the penalty that the adapters of `network` put on their own parameters (SALT has one).

    With weight 0 it is `loss` itself. The penalty is :func:`samda.adapters.regularization`.
    """

    def __init__(self, loss: Callable[..., torch.Tensor], network: nn.Module, weight: float = 0.0) -> None:
        super().__init__()
        if weight and all(adapter.regularizer() is None for _, _, adapter in modules(network)):
            raise UsageError(f"regularization {weight}: no adapter of this network has a penalty; use salt, or set 0")
        self.loss, self.weight = loss, weight
        self._network = (network,)  # not as a submodule: the loss has no parameters of its own

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """(B, K, H, W) logits and (B, 1, H, W) class indices -> the loss, a scalar."""
        value = self.loss(logits, label)
        return value + self.weight * regularization(*self._network) if self.weight else value


class ParameterAverage:
    """An exponential moving average of the trained parameters, a <- d a + (1 - d) p after each step.

    The decay of step t is d = min(`decay`, t / (t + 9)), so that the start is soon forgotten. Attach it before the
    ValidationHandler: from the end of a round until :class:`BackToTraining` the network holds the average.

    With a `start_share` s the network holds (1 - s) a + s p_0 instead, p_0 the parameters at the start, those of the
    parent in a training that starts from a model (WiSE-FT, arXiv 2109.01903).

    Args:
        network: whose parameters; frozen ones stay.
        decay: in [0, 1); 0 disables averaging.
        start_share: in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float = 0.99, start_share: float = 0.0) -> None:
        if not 0 <= decay < 1 or not 0 <= start_share < 1:
            raise UsageError(f"decay and start_share of the average must lie in [0, 1), got {decay} and {start_share}")
        self.decay, self.start_share, self.steps = decay, start_share, 0
        self.parameters = trainable_parameters(network)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.start = {name: value.clone() for name, value in self.average.items()} if start_share else {}
        self._trained: dict[str, torch.Tensor] = {}  # while the network holds the average

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.apply)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present parameters."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        averages, values = list(self.average.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Let the network hold the average."""
        if self.steps:
            self._trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            self._set(self.average)
            for name, value in self.start.items():
                self.parameters[name].lerp_(value, self.start_share)

    @torch.no_grad()
    def back(self) -> None:
        """Let the network hold what the optimizer works on."""
        if self._trained:
            self._set(self._trained)
            self._trained = {}

    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.steps = state["steps"]
        for name, value in self.average.items():
            value.copy_(state["average"][name])


class BackToTraining:
    """Ends what :class:`ParameterAverage` began. Attach it behind all that reads the validated network."""

    def __init__(self, average: ParameterAverage) -> None:
        self.average = average

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.average.back)
