# SPDX-License-Identifier: Apache-2.0
"""The moving average of the trained parameters: it validates, and it is what is saved.

ignite's EMAHandler is not used: it copies the whole network, and almost all of this one is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Engine, Events

from samda.adapters.base import trainable_parameters
from samda.errors import UsageError


class ParameterAverage:
    """An exponential moving average of the trained parameters, a <- d a + (1 - d) p after each step.

    The decay of step t is d = min(`decay`, t / (t + 9)), so that the start is soon forgotten. Attach it before the
    ValidationHandler: from the end of a round until :class:`BackToTraining` the network holds the average.

    Args:
        network: whose parameters; frozen ones stay.
        decay: in [0, 1); 0 disables averaging.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay of the average must lie in [0, 1), got {decay}")
        self.decay, self.steps = decay, 0
        self.parameters = trainable_parameters(network)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
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
