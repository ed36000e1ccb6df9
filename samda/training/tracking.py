# SPDX-License-Identifier: Apache-2.0
"""Where the curve of a training is shown: TensorBoard and MLflow."""

from __future__ import annotations

import copy
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from ignite.engine import Engine, Events
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.handlers import MLFlowHandler, TensorBoardHandler
from monai.networks.utils import eval_mode
from monai.utils import version_geq

from samda.data.labels import OPEN
from samda.errors import UsageError, nearest
from samda.networks.head import map_levels
from samda.output import output_of
from samda.processes import is_main
from samda.report import paint, pick_slices
from samda.training.handlers import TrainingRecord

TRACKERS = ("tensorboard", "mlflow")
OLDEST_MLFLOW = "3.15.2"  # what MONAI 1.6 asks for
EVENTS = "events.out.tfevents.*"
SHOWN = 4  # validation slices with pictures


def trackers(names: str | Sequence[str]) -> list[str]:
    """The trackers in "tensorboard", "mlflow", "tensorboard,mlflow" or "none"; a package that one lacks is refused."""
    if not isinstance(names, str | Sequence):
        raise UsageError(f"tracking must be names of trackers or 'none', got {names!r}")
    chosen = [name.strip() for name in names.split(",")] if isinstance(names, str) else [str(name) for name in names]
    if chosen in ([], ["none"]):
        return []
    for name in chosen:
        if name == "none":
            raise UsageError(f"tracking 'none' stands alone, got {','.join(chosen)!r}; leave out one or the other")
        if name not in TRACKERS:
            raise UsageError(f"tracking {name!r} is unknown; {nearest(name, (*TRACKERS, 'none'))}")
    if "mlflow" in chosen:
        try:
            found = importlib.metadata.version("mlflow")
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not version_geq(found, OLDEST_MLFLOW):
            have = f"this environment has {found}" if found else "it is not installed"
            raise UsageError(
                f"tracking 'mlflow' needs mlflow {OLDEST_MLFLOW} or newer, {have}: pip install 'samda[mlflow]'"
            )
    return chosen


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of the curve by name: "loss", "learning_rate/GROUP" and, where validated, "dice/mean" and "dice/CLASS"."""
    values = {"loss": row["loss"]}
    values |= {f"learning_rate/{group}": rate for group, rate in row["learning_rate"].items()}
    if "mean_dice" in row:
        values["dice/mean"] = row["mean_dice"]
        values |= {f"dice/{name}": value for name, value in row["dice"].items() if value is not None}
    return values


class TensorBoard(TensorBoardHandler):
    """Writes every epoch to TensorBoard, and pictures whenever a validation was the best so far.

    Attach it after :class:`RecordEpoch`. A new training replaces the events of an older one in `folder`; a resumed one
    continues behind its checkpoint. Pictures show slices of `dataset`, the validation slices, beside label and
    prediction: `folder` holds patient images.
    """

    def __init__(self, record: TrainingRecord, network: nn.Module, dataset: Any, folder: str | Path) -> None:
        self.record, self.network, self.dataset, self.folder = record, network, dataset, Path(folder)
        self.slices = getattr(dataset, "slices", dataset)  # of an EmbeddingDataset
        self.shown = pick_slices(self.slices.foreground.numpy(), SHOWN)
        self.internal_writer = True

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        if is_main():
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
            engine.add_event_handler(Events.COMPLETED, self.close)

    def start(self, engine: Engine) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a training needs it

        output = output_of(self.folder)
        if engine.state.epoch == 0:
            for path in self.folder.glob(EVENTS):
                if output is None or output.owns(path):
                    path.unlink()
        purge = engine.state.epoch + 1 if engine.state.epoch else None  # epochs behind the checkpoint come again
        before = set(self.folder.glob(EVENTS))
        self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        for path in set(self.folder.glob(EVENTS)) - before:
            if output is not None:
                output.note(path, None)

    def write(self, engine: Engine) -> None:
        """Write the newest row of the curve."""
        row = self.record.history[-1]
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["epoch"])
        if self.record.best_epoch == row["epoch"]:
            for number, picture in enumerate(self.pictures(), start=1):
                self._writer.add_image(f"validation/{number}", picture, row["epoch"], dataformats="HWC")
        self._writer.flush()  # a training that is killed leaves its curve

    @torch.no_grad()
    def pictures(self) -> list[np.ndarray]:
        """Slice, label and present prediction side by side, for each slice shown: (H, 3 W, 3) uint8."""
        device = next(self.network.parameters()).device
        embedded, task = self.slices is not self.dataset, self.slices.task
        pictures = []
        with eval_mode(self.network):
            for index in self.shown:
                item = self.slices.view(index, 0)
                if embedded:
                    pyramid = self.dataset[index]["pyramid"]
                    logits = self.network(map_levels(lambda level: level[None].to(device), pyramid))
                else:
                    logits = self.network(item["image"][None].to(device))
                # the slice without its neighbors; two channels make no color
                image = item["image"].numpy()[task.context :][: 3 if task.in_channels == 3 else 1]
                label, predicted = item["label"][0].numpy(), logits[0].argmax(0).cpu().numpy()
                label = np.where(label < OPEN, label, 0)
                pictures.append(np.concatenate([paint(image), paint(image, label), paint(image, predicted)], axis=1))
        return pictures


class MLflow(MLFlowHandler):
    """MONAI's MLFlowHandler for a samda training: every epoch as one step, `settings` as parameters of the run.

    A resumed training continues its run where that is unfinished; a new one always has a run of its own, named as the
    model folder unless `run_name` is given, also where several trainings share a server. Further arguments are those of
    MONAI's handler (tracking_uri, experiment_name, ...).
    """

    def __init__(
        self,
        record: TrainingRecord,
        settings: Mapping[str, Any],
        folder: str | Path,
        run_name: str | None = None,
        **more: Any,
    ) -> None:
        self.record, self.settings = record, settings
        more |= {"run_name": run_name or str(Path(folder).resolve()), "iteration_log": False, "epoch_log": True}
        Path(folder).mkdir(parents=True, exist_ok=True)  # for the database
        super().__init__(epoch_logger=self.write, close_on_complete=True, **more)

    def start(self, engine: Engine) -> None:
        """Open the run."""
        if engine.state.epoch == 0:  # MONAI would go on with any unfinished run of this name
            self._set_experiment()
            self.cur_run = self.client.create_run(self.experiment.experiment_id, run_name=self.run_name)  # type: ignore
            values = {_mlflow_name(key): str(value)[:500] for key, value in self.settings.items()}
            self.experiment_param = values  # 500 letters are MLflow's limit
        super().start(engine)

    def write(self, engine: Engine) -> None:
        """Log the newest row of the curve."""
        row = self.record.history[-1]
        self._log_metrics({_mlflow_name(name): value for name, value in scalars(row).items()}, step=row["epoch"])


def mlflow_settings() -> dict[str, Any]:
    """MONAI's settings for `--tracking mlflow` with :class:`MLflow` at the trainer, and nothing at the validator.

    Neither MONAI's handler for the validator nor its copy of the config is needed: the rows hold the validation, and
    the settings are parameters of the run.
    """
    settings: dict[str, Any] = copy.deepcopy(DEFAULT_MLFLOW_SETTINGS)
    ours = {"_target_": "samda.training.MLflow", "record": "@record", "folder": "@output_dir"}
    ours |= {"settings": "$@checkpoint.settings", "_disabled_": "@is_not_rank0"}
    ours |= {key: f"@{key}" for key in ("tracking_uri", "experiment_name", "run_name")}
    settings["configs"] |= {"trainer": ours, "experiment_name": "samda", "save_execute_config": False}
    del settings["configs"]["validator"], settings["configs"]["evaluator"]
    return settings


def _mlflow_name(text: str) -> str:
    """`text` with what MLflow does not allow in a name replaced."""
    return re.sub(r"[^\w\-. :/]", "_", text)
