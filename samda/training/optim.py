# SPDX-License-Identifier: Apache-2.0
"""Optimizer, learning rate schedule and penalty: what changes the parameters that adapters and class head declare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn

from samda.adapters.base import adapter_parameters, modules, regularization, trainable_parameters
from samda.errors import UsageError


def parameter_groups(network: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trainable parameters by full name, each in exactly one group: "adapters", "head" and "base" (what a baseline
    trains). Empty groups are omitted.
    """
    trainable = trainable_parameters(network)
    adapters = set(adapter_parameters(network))
    head = set(network.head_params())  # type: ignore[operator]
    groups: dict[str, dict[str, nn.Parameter]] = {"adapters": {}, "head": {}, "base": {}}
    for name, parameter in trainable.items():
        group = "adapters" if name in adapters else "head" if name in head else "base"
        groups[group][name] = parameter
    return {group: parameters for group, parameters in groups.items() if parameters}


def build_optimizer(
    network: nn.Module,
    learning_rate: float | Mapping[str, float] = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over the groups of :func:`parameter_groups`.

    Vectors and scalars (biases, scales and shifts of norms, gates, singular values) do not decay, matrices and kernels
    do; a group "adapters" therefore appears as "adapters" and "adapters/vectors". `learning_rate` is one rate, or a
    rate per group name ("adapters", "head", "base").
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
        if not 0 < rate < math.inf:
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
    optimizer: torch.optim.Optimizer, epochs: int, iterations: int, warmup: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine to zero, one step per iteration.

    Unlike MONAI's `WarmupCosineSchedule` it does not spend the first iteration at rate zero, and its state leaves the
    length of the training open, so one can resume with more epochs.

    With T = epochs x iterations (of an epoch) and w = round(warmup T), 0 <= warmup < 1, the rate of step t is
    multiplied by (t + 1) / (w + 1) for t < w, else by (1 + cos(pi (t - w) / (T - w))) / 2.
    """
    if not 0 <= warmup < 1:
        raise UsageError(f"warmup is a share of the training, in [0, 1); got {warmup}")
    total = max(1, epochs * iterations)
    rise = round(warmup * total)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
