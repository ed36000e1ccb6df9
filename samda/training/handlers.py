# SPDX-License-Identifier: Apache-2.0
"""Handlers of the training engine: the curve and the best parameters, the decision to stop, the progress bar."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from samda.errors import InputError
from samda.files import write_json
from samda.processes import is_main
from samda.progress import bar
from samda.training.record import TrainingRecord

__all__ = ["Progress", "RecordEpoch"]

logger = logging.getLogger(__name__)


class RecordEpoch:
    """After each epoch (and its validation): a row of the curve, the best parameters, the decision to stop early.

    Attach it after the ValidationHandler. The curve is written to `folder`/history.json. Handlers that follow find the
    output of the engine as a list of one item, in which MONAI's own (StatsHandler, MLFlowHandler) look for the loss.

    Args:
        record: where all of it is kept.
        network: whose trainable parameters are kept when a validation is the best so far.
        evaluator: the validation engine.
        optimizer: for the learning rates of the curve.
        patience: validations without a better one before the training stops; 0 never stops it.
        folder: where history.json goes.
    """

    def __init__(
        self,
        record: TrainingRecord,
        network: nn.Module,
        evaluator: Evaluator,
        optimizer: torch.optim.Optimizer,
        patience: int = 0,
        folder: str | Path = ".",
    ) -> None:
        self.record, self.network, self.evaluator = record, network, evaluator
        self.optimizer, self.patience, self.folder = optimizer, patience, Path(folder)

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self.stop_if_done)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        """Forget the losses of the epoch before."""
        self._losses: list[torch.Tensor] = []
        self._rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def add_loss(self, engine: Engine) -> None:
        """Note the loss of an iteration, without waiting for the device; leave the output as MONAI's handlers take it.

        Their usual `from_engine(["loss"], first=True)` finds a number in a list of outputs, but a tuple in a single
        one. The batch is not taken apart for that (`decollate`): it would wait for the device at every step.
        """
        state: Any = engine.state
        self._losses.append(state.output["loss"].detach())
        state.output = [state.output]

    def finish(self, engine: Engine) -> None:
        """Write the row, keep the best."""
        epoch = engine.state.epoch
        loss = float(torch.stack(self._losses).mean())
        if not math.isfinite(loss):
            raise InputError(f"the loss of epoch {epoch} is not finite; lower learning_rate or set amp=False")
        row: dict[str, Any] = {"epoch": epoch, "loss": loss, "learning_rate": self._rates}
        row["seconds"] = round(engine.state.times.get(Events.EPOCH_COMPLETED.name) or 0.0, 3)
        validation = self.evaluator.state
        if validation.epoch == epoch and validation.metrics:  # not at every epoch when val_interval > 1
            row["mean_dice"] = validation.metrics[validation.key_metric_name]
            row["dice"] = validation.metric_details.get(validation.key_metric_name, {})
            self.record.validated(row["mean_dice"], epoch, self.network)
        self.record.history.append(row)
        best = (
            {"epoch": self.record.best_epoch, "mean_dice": self.record.best_score} if self.record.best_epoch else None
        )
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "history.json", {"best": best, "epochs": self.record.history})
        self.stop_if_done(engine)

    def stop_if_done(self, engine: Engine) -> None:
        """Stop early; a resumed training that had stopped stays stopped."""
        if self.patience and self.record.misses >= self.patience:
            logger.info("no better validation in %d; stopping at epoch %d", self.record.misses, engine.state.epoch)
            engine.terminate()


class Progress:
    """A bar over the epochs on a terminal, a log line per epoch everywhere else (which stays silent unless asked for).

    Attach it after :class:`RecordEpoch`.
    """

    def __init__(self, record: TrainingRecord) -> None:
        self.record = record
        self.bar: Any = None  # until the training starts, which another handler may prevent

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.advance)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Open the bar at the epoch that the training starts from."""
        total = engine.state.max_epochs or 0
        self.bar = bar("training", total, "epoch", initial=engine.state.epoch)

    def advance(self, engine: Engine) -> None:
        """One epoch further."""
        row = self.record.history[-1]
        text = f"loss {row['loss']:.4f}"
        if "mean_dice" in row:
            text += f", mean Dice {row['mean_dice']:.4f} (best {self.record.best_score:.4f})"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(1)
        logger.info("epoch %d/%d: %s", row["epoch"], engine.state.max_epochs, text)

    def close(self, engine: Engine) -> None:
        """Close the bar."""
        self.bar.close()

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar and let the error pass on."""
        if self.bar is not None:
            self.bar.close()
        raise error
