# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler, from_engine

from samda import progress
from samda.errors import InputError
from samda.training import Progress, RecordEpoch, TrainingRecord, ValidationProgress


def run(
    folder: Path,
    scores: list[float],
    patience: int = 0,
    loss: float = 2.0,
    interval: int = 1,
    follow: Callable[[Engine], None] = lambda engine: None,
) -> tuple[TrainingRecord, torch.nn.Module]:
    """Train a parameter that counts epochs, with the given validation scores."""
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD([{"params": network.parameters(), "name": "adapters"}], lr=0.5)

    def step(engine: Engine, batch: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            network.weight += 0.5
        return {"loss": torch.tensor(loss + batch)}

    class Score:
        def attach(self, engine: Engine, name: str) -> None:
            @engine.on(Events.EPOCH_COMPLETED)
            def _(engine: Engine) -> None:
                engine.state.metrics[name] = scores[engine.state.epoch - 1]

    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        [0],
        network,
        iteration_update=lambda e, b: {},
        key_val_metric={"dice": Score()},
        decollate=False,
    )
    record, trainer = TrainingRecord(), Engine(step)
    ValidationHandler(interval, evaluator).attach(trainer)
    RecordEpoch(record, network, evaluator, optimizer, patience, folder).attach(trainer)
    Progress(record).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
    trainer.run([0, 1], max_epochs=len(scores))
    return record, network


def test_the_best_parameters_are_kept_and_restored(tmp_path: Path) -> None:
    record, network = run(tmp_path, [0.1, 0.7, 0.3, 0.7])
    assert (record.best_epoch, record.best_score, record.misses) == (2, 0.7, 2)
    assert network.weight.item() == 4.0  # half a step per iteration
    record.restore_best(network)
    assert network.weight.item() == 2.0


def test_it_stops_after_so_many_validations_without_a_better_one(tmp_path: Path) -> None:
    record, _ = run(tmp_path, [0.1, 0.5, 0.4, 0.3, 0.9], patience=2)
    assert [row["epoch"] for row in record.history] == [1, 2, 3, 4]


def test_the_curve_is_written(tmp_path: Path) -> None:
    run(tmp_path, [0.1, 0.5, 0.4])
    curve = json.loads((tmp_path / "history.json").read_text("utf-8"))
    assert curve["best"] == {"epoch": 2, "mean_dice": 0.5}
    assert [row["loss"] for row in curve["epochs"]] == [2.5, 2.5, 2.5]
    assert [row["mean_dice"] for row in curve["epochs"]] == [0.1, 0.5, 0.4]
    assert curve["epochs"][0]["learning_rate"] == {"adapters": 0.5}


def test_epochs_without_validation_have_no_dice(tmp_path: Path) -> None:
    record, _ = run(tmp_path, [0.1, 0.5, 0.4, 0.2], interval=2)
    assert ["mean_dice" in row for row in record.history] == [False, True, False, True]
    assert record.best_epoch == 2


def test_handlers_of_monai_that_follow_find_the_loss(tmp_path: Path) -> None:
    """As its `--tracking mlflow` reads it: that adds its handler behind ours."""
    usual = DEFAULT_MLFLOW_SETTINGS["configs"]["trainer"]["output_transform"]
    assert usual == "$monai.handlers.from_engine(['loss'], first=True)"
    seen: list[float] = []
    run(tmp_path, [0.1, 0.5], follow=lambda e: seen.append(from_engine(["loss"], first=True)(e.state.output).item()))
    assert seen == [2.0, 3.0, 2.0, 3.0]


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the loss of epoch 1 is not finite; lower learning_rate"):
        run(tmp_path, [0.1], loss=float("nan"))


def test_an_error_before_the_bar_is_open_is_the_one_that_is_raised() -> None:
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.STARTED, lambda: 1 / 0)
    Progress(TrainingRecord()).attach(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run([0], max_epochs=1)


def test_nothing_is_printed_into_a_pipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [0.1, 0.2])
    assert capfd.readouterr() == ("", "")


def test_a_long_validation_writes_lines(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    engine = Engine(lambda engine, batch: None)
    ValidationProgress().attach(engine)
    engine.run([0, 1, 2], max_epochs=1)
    lines = capfd.readouterr().err.splitlines()
    assert [text.partition(",")[0] for text in lines] == [f"validating: {n} of 3 steps" for n in (1, 2, 3)]
