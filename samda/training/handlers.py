# SPDX-License-Identifier: Apache-2.0
"""Handlers of the training and validation engines, in the order in which train.json attaches them.

`CaseDice` scores a validation; `RecordEpoch` adds a row to the curve of the `TrainingRecord`, keeps the best parameters
and stops early; `Progress` shows the row.

MONAI's EarlyStopHandler and TensorBoardStatsHandler are not used: a resumed training has to remember how long ago its
best validation was, and a new one must not write before it starts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.errors import InputError
from samda.io import write_json
from samda.networks.ops import argmax
from samda.processes import exchange, is_main
from samda.progress import bar
from samda.training.pace import Pace

logger = logging.getLogger(__name__)


class CaseDice:
    """Mean Dice over cases and foreground classes, each pooled over the slices of a case on the slice grid.

    Dice = 2 |P & T| / (|P| + |T|). A missed class and a class found where there is none count 0; absent in both it does
    not count. Pooling counts slices without foreground, whose false positives a mean over slices would hide.

    It attaches like an ignite metric: `engine.state.metrics[name]` is the mean, `engine.state.metric_details[name]` the
    mean per class (None where the class never occurred). The number of the case is `batch["case"]`. Connected processes
    add up their counts, so the slices of a case may be spread over them. `classes` are names, background first. Pixels
    that `partial` labels leave open for a class do not count for it, nor does a case whose label lacks the class.
    """

    def __init__(self, classes: Sequence[str], partial: PartialLabels | None = None) -> None:
        self.classes = tuple(classes)
        self.possible = None if partial is None else partial.possible()
        self.reset()

    def reset(self, engine: Engine | None = None) -> None:
        """Forget everything."""
        self.counts: dict[int, torch.Tensor] = {}  # case -> (4, K): overlap, predicted, true, voxels of lacking labels

    def update(self, logits: torch.Tensor, label: torch.Tensor, cases: Sequence[int]) -> None:
        """Add a batch: (B, K, H, W) logits, (B, 1, H, W) class indices, and the number of the case of each item."""
        k = len(self.classes)
        predicted, true = argmax(logits, 1).flatten(1), label[:, 0].long().flatten(1)
        for p, t, case in zip(predicted, true, cases, strict=True):
            joint = torch.bincount(t * k + p, minlength=256 * k)[: 256 * k].view(256, k).cpu()
            inside = joint[:k]
            counts = torch.stack([inside.diagonal(), inside.sum(0), inside.sum(1), torch.zeros(k, dtype=torch.long)])
            if self.possible is not None:
                gaps = joint[OPEN:] * ~self.possible[OPEN:]
                counts[1] += gaps.sum(0)
                counts[3] += (joint[OPEN:IGNORED].sum(1, keepdim=True) * self.possible[OPEN:IGNORED]).sum(0)
            self.counts[int(case)] = self.counts.get(int(case), 0) + counts

    def merge(self, counts: Sequence[dict[int, torch.Tensor]]) -> None:
        """Take the sum of the counts of several processes, this one's among them."""
        self.counts = {}
        for shard in counts:
            for case, values in shard.items():
                self.counts[case] = self.counts.get(case, 0) + values

    def per_class(self) -> dict[str, float | None]:
        """Mean over the cases, per foreground class."""
        values: dict[str, float | None] = {}
        for k, name in enumerate(self.classes[1:], start=1):
            sums = [counts[:, k].tolist() for counts in self.counts.values()]
            dice = [
                2 * overlap / (found + true) for overlap, found, true, lacking in sums if found + true and not lacking
            ]
            values[name] = sum(dice) / len(dice) if dice else None
        return values

    def compute(self) -> float:
        """Mean over the classes; NaN if none occurred."""
        values = [value for value in self.per_class().values() if value is not None]
        return sum(values) / len(values) if values else math.nan

    def attach(self, engine: Engine, name: str) -> None:
        """Register with an evaluation engine."""

        def iteration(engine: Engine) -> None:
            output: Any = engine.state.output
            batch: Any = engine.state.batch
            self.update(output["pred"], output["label"], batch["case"])

        def epoch(engine: Engine) -> None:
            self.merge(exchange(self.counts))
            engine.state.metrics[name] = self.compute()
            engine.state.metric_details[name] = self.per_class()  # type: ignore[attr-defined]

        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, epoch)


class ValidationProgress:
    """A bar over a validation on a terminal, lines elsewhere."""

    def attach(self, engine: Engine) -> None:
        """Register with an evaluation engine."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.bar.update())
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.bar.close())

    def start(self, engine: Engine) -> None:
        """Open the bar."""
        self.bar = bar("validating", engine.state.epoch_length or 0, "step")


class TrainingRecord:
    """The curve of a training and its best parameters; a checkpoint carries it through a resume.

    Attributes:
        history: one row per round: {"epoch" (number of the round), "step", "loss", "learning_rate", "seconds"} and,
            where validated, "mean_dice" and "dice" (class -> Dice).
        best_score, best_epoch: of the best validation; -inf and 0 before the first.
        best_state: the trainable parameters at that moment, on the CPU.
        apart_state: the best ones before the validation patients trained, too; empty where they never did.
        misses: validations since then.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.best_score, self.best_epoch, self.misses = -float("inf"), 0, 0
        self.best_state: dict[str, torch.Tensor] = {}
        self.apart_state: dict[str, torch.Tensor] = {}

    def validated(self, score: float, epoch: int, network: nn.Module, select: bool = True) -> bool:
        """Note a validation; True if it is better than every one before, or if the last one counts anyway."""
        if not select or score > self.best_score:
            self.best_score, self.best_epoch, self.misses = score, epoch, 0
            self.keep(network)
            return True
        self.misses += 1
        return False

    def keep(self, network: nn.Module) -> None:
        """Let the present parameters count as the best ones; the best validation stays what it was."""
        self.best_state = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}

    def restore_best(self, network: nn.Module) -> None:
        """Put the best parameters back into the network; the last ones stay where nothing was ever validated."""
        if self.best_state:
            network.load_state_dict(self.best_state)

    def restore_apart(self, network: nn.Module) -> None:
        """Put the best parameters into the network that did not see the validation patients."""
        if self.apart_state or self.best_state:
            network.load_state_dict(self.apart_state or self.best_state)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for key in vars(self):
            setattr(self, key, state.get(key, getattr(self, key)))  # an older samda had fewer


class RecordEpoch:
    """After each epoch (and its validation): a row of the curve, the best parameters, the decision to stop early.

    Attach it after the ValidationHandler. The curve is written to `folder`/history.json. Handlers that follow find the
    output of the engine as a list of one item, in which MONAI's own (StatsHandler, MLFlowHandler) look for the loss.
    `patience` counts validations without a better one before the training stops; 0 never stops it. Without `select`
    the last parameters count, and nothing stops early: a validation on the patient that trains says too little.
    """

    def __init__(
        self,
        record: TrainingRecord,
        network: nn.Module,
        evaluator: Evaluator,
        optimizer: torch.optim.Optimizer,
        patience: int = 0,
        folder: str | Path = ".",
        pace: Pace | None = None,
        select: bool = True,
    ) -> None:
        self.record, self.network, self.evaluator, self.pace = record, network, evaluator, pace
        self.optimizer, self.patience, self.folder, self.select = optimizer, patience, Path(folder), select

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
        epoch, record = engine.state.epoch, self.record
        loss = float(torch.stack(self._losses).mean())
        if not math.isfinite(loss):
            raise InputError(f"the loss of epoch {epoch} is not finite; lower learning_rate or set amp=False")
        row: dict[str, Any] = {"epoch": epoch, "step": engine.state.iteration}
        row |= {"loss": loss, "learning_rate": self._rates}
        row["seconds"] = round(engine.state.times.get(Events.EPOCH_COMPLETED.name) or 0.0, 3)
        validation = self.evaluator.state
        if validation.epoch == epoch and validation.metrics:  # not at every epoch when val_interval > 1
            row["mean_dice"] = validation.metrics[validation.key_metric_name]
            row["dice"] = validation.metric_details.get(validation.key_metric_name, {})
            record.validated(row["mean_dice"], epoch, self.network, self.select)
            if self.pace is not None:
                self.pace.validated()
        elif self.pace is not None and self.pace.joined:
            record.apart_state = record.apart_state or record.best_state
            record.keep(self.network)
        record.history.append(row)
        best = {"epoch": record.best_epoch, "mean_dice": record.best_score} if record.best_epoch else None
        if is_main():
            write_json(self.folder / "history.json", {"best": best, "epochs": record.history})
        self.stop_if_done(engine)

    def stop_if_done(self, engine: Engine) -> None:
        """Stop early; a resumed training that had stopped stays stopped."""
        if self.patience and self.record.misses >= self.patience:
            logger.info("no better validation in %d; stopping at epoch %d", self.record.misses, engine.state.epoch)
            engine.terminate()


class Progress:
    """A bar over the training on a terminal, lines elsewhere, and a log line per round. Attach it after
    :class:`RecordEpoch`.
    """

    def __init__(self, record: TrainingRecord, pace: Pace | None = None) -> None:
        self.record, self.pace = record, pace
        self.bar: Any = None  # until the training starts, which another handler may prevent

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.show)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Open the bar where the training starts from."""
        done, total, unit = self._progress(engine)
        self.bar = bar("training", total, unit, initial=done)

    def advance(self, engine: Engine) -> None:
        """One step further."""
        self.bar.update(self._progress(engine)[0] - self.bar.n)

    def show(self, engine: Engine) -> None:
        """The newest row."""
        row = self.record.history[-1]
        text = f"loss {row['loss']:.4f}"
        if "mean_dice" in row:
            text += f", mean Dice {row['mean_dice']:.4f} (best {self.record.best_score:.4f})"
        self.bar.set_postfix_str(text, refresh=False)
        done, total, unit = self._progress(engine)
        if self.pace is None or self.pace.epochs:
            done, total, unit = row["epoch"], engine.state.max_epochs or 0, "epoch"
        logger.info("%s %.0f/%.0f: %s", unit, done, total, text)

    def _progress(self, engine: Engine) -> tuple[float, float, str]:
        if self.pace is not None:
            return self.pace.progress(engine)
        return engine.state.iteration, (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0), "step"

    def close(self, engine: Engine) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar and let the error pass on."""
        self.close(engine)
        raise error
