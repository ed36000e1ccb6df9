# SPDX-License-Identifier: Apache-2.0
"""What a training has seen so far: its curve, and its best parameters. A checkpoint carries it through a resume."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

__all__ = ["TrainingRecord"]


class TrainingRecord:
    """The curve of a training, its best parameters, and how many validations have passed since.

    Attributes:
        history: one row per epoch: {"epoch", "loss", "learning_rate", "seconds"} and, where validated, "mean_dice" and
            "dice" (class -> Dice).
        best_score, best_epoch: of the best validation; -inf and 0 before the first.
        best_state: the trainable parameters at that moment, on the CPU.
        misses: validations since then.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.best_score, self.best_epoch, self.misses = -float("inf"), 0, 0
        self.best_state: dict[str, torch.Tensor] = {}

    def validated(self, score: float, epoch: int, network: nn.Module) -> bool:
        """Note a validation; True if it is better than every one before."""
        if score > self.best_score:
            self.best_score, self.best_epoch, self.misses = score, epoch, 0
            self.best_state = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
            return True
        self.misses += 1
        return False

    def restore_best(self, network: nn.Module) -> None:
        """Put the best parameters back into the network; the last ones stay where nothing was ever validated."""
        if self.best_state:
            network.load_state_dict(self.best_state)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for key in vars(self):
            setattr(self, key, state[key])
