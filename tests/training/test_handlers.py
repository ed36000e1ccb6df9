# SPDX-License-Identifier: Apache-2.0
"""Handlers of the engines: curve, early stop and progress; Dice pooled over the slices of a case."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler, from_engine

from samda import progress
from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.errors import InputError
from samda.training import CaseDice, Progress, RecordEpoch, TrainingRecord, ValidationProgress


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


def logits_of(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits whose argmax is `labels` (B, H, W)."""
    return F.one_hot(labels, classes).movedim(-1, 1).float() * 5


def test_dice_is_pooled_over_the_slices_of_a_case() -> None:
    metric = CaseDice(["background", "organ"])
    true = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]]])  # two slices of one case, the second empty
    predicted = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 0]]])
    metric.update(logits_of(predicted, 2), true[:, None], [0, 0])
    assert metric.compute() == pytest.approx(2 * 1 / (3 + 2))  # not the mean of 2/3 and 0


def test_cases_and_classes_are_averaged() -> None:
    metric = CaseDice(["background", "a", "b"])
    true = torch.tensor([[[1, 1, 2, 0]], [[1, 0, 0, 0]]])
    predicted = torch.tensor([[[1, 0, 2, 0]], [[0, 0, 0, 0]]])
    metric.update(logits_of(predicted, 3), true[:, None], torch.tensor([0, 1]))
    assert metric.per_class() == {"a": pytest.approx((2 / 3 + 0) / 2), "b": pytest.approx(1.0)}
    assert metric.compute() == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("true", "predicted", "expected"),
    [([0, 0], [0, 0], math.nan), ([0, 0], [1, 0], 0.0), ([1, 0], [0, 0], 0.0), ([1, 0], [1, 0], 1.0)],
    ids=["absent in both", "only predicted", "missed", "equal"],
)
def test_the_rules_for_absent_classes(true: list[int], predicted: list[int], expected: float) -> None:
    metric = CaseDice(["background", "organ"])
    metric.update(logits_of(torch.tensor([[predicted]]), 2), torch.tensor([[[true]]]), [0])
    assert metric.compute() == pytest.approx(expected, nan_ok=True)


def test_it_attaches_to_an_engine_and_starts_anew_each_run() -> None:
    label = torch.tensor([[[[1, 0]]]])
    engine = Engine(lambda engine, batch: {"pred": logits_of(label[:, 0], 2), "label": batch["label"]})
    engine.state.metric_details = {}  # MONAI's evaluators have it
    CaseDice(["background", "organ"]).attach(engine, "dice")
    for other in (label, 1 - label):  # right, then wrong everywhere
        engine.run([{"label": other, "case": torch.tensor([3])}])
    assert engine.state.metrics["dice"] == 0.0
    assert engine.state.metric_details["dice"] == {"organ": 0.0}


def test_what_partial_labels_leave_open_does_not_count() -> None:
    metric = CaseDice(["background", "a", "b"], PartialLabels(("background", "a", "b"), sets=((2,),)))
    true = torch.tensor([[[1, 1, OPEN, OPEN, IGNORED, IGNORED]], [[1, 2, 2, 0, IGNORED, IGNORED]]])
    predicted = torch.tensor([[[1, 2, 1, 2, 1, 2]], [[1, 2, 0, 0, 2, 1]]])
    metric.update(logits_of(predicted, 3), true[:, None], [0, 1])
    # a of case 0: one of two found, one false; b is not labeled in case 0, in case 1 one of two is found
    assert metric.per_class() == {"a": pytest.approx((2 / (2 + 2) + 1) / 2), "b": pytest.approx(2 / 3)}
