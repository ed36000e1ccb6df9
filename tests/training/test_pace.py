# SPDX-License-Identifier: Apache-2.0
"""How long a training lasts, and the parts of the recipe that follow from it."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_scans import TASK, write_case

from samda.embeddings import EmbeddingDataset
from samda.errors import InputError, UsageError
from samda.models.folder import load_model
from samda.training import Pace, ParameterAverage, build_schedule, pace, train

Keys = dict[str, Any]


@pytest.fixture
def by_steps(keys: Keys) -> Keys:
    return {key: value for key, value in keys.items() if key != "epochs"}


def curve(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "history.json").read_text("utf-8"))["epochs"]


@contextmanager
def interrupted_at(iteration: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block's training must end with an error behind this step."""
    step = Pace.step

    def fail(self: Pace, engine: Any) -> None:
        step(self, engine)
        if engine.state.iteration == iteration:
            raise MemoryError("no memory left")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Pace, "step", fail)
        yield


class At(Pace):
    """A training by time of which a given share is used."""

    used = 0.0

    @property
    def share(self) -> float:
        return self.used


def test_the_schedule_of_a_training_by_time_is_the_formula() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    at = At(minutes=1)
    schedule = build_schedule(optimizer, warmup=0.2, pace=at)
    for share, expected in (
        (0.0, 0.1),
        (0.1, 0.5),
        (0.2, 1.0),
        (0.6, 0.5),
        (0.8, (1 - math.sqrt(0.5)) / 2),
        (1.0, 0.0),
    ):
        at.used = share
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected, abs=1e-12)


def test_the_schedule_of_a_training_by_steps_is_that_of_its_epochs() -> None:
    rates = []
    for length in ({"epochs": 5, "iterations": 4}, {"pace": Pace(steps=20)}, {"iterations": 4, "pace": Pace(epochs=5)}):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = build_schedule(optimizer, warmup=0.2, **length)
        rates.append([])
        for _ in range(20):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            schedule.step()
    assert rates[0] == rates[1] == rates[2]


def test_two_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match=r"steps=5, minutes=1\.0"):
        Pace(steps=5, minutes=1.0)
    assert Pace().steps == pace.STEPS


def test_the_average_is_the_weighted_sum_of_what_was_trained(make_segmenter: Any) -> None:
    network = make_segmenter(adapters={"sam_da": {}})
    average = ParameterAverage(network, decay=0.8)
    assert not set(average.average) & {"image_encoder.pos_embed"}
    parameter = network.head_params()[0]
    value, expected = average.parameters[parameter], average.average[parameter].clone()
    for step in range(1, 60):
        with torch.no_grad():
            value.add_(1)
        average.update()
        decay = min(0.8, step / (step + 9))
        expected = decay * expected + (1 - decay) * value.detach()
    torch.testing.assert_close(average.average[parameter], expected)
    trained = value.detach().clone()
    average.apply()
    assert torch.equal(value, average.average[parameter])
    average.back()
    assert torch.equal(value, trained)


def test_a_share_of_the_start_stays_in_what_is_validated(make_segmenter: Any) -> None:
    network = make_segmenter()
    average = ParameterAverage(network, decay=0.0, start_share=0.25)
    parameter = network.head_params()[0]
    value = average.parameters[parameter]
    start = value.detach().clone()
    with torch.no_grad():
        value.add_(2.0)
    average.update()
    average.apply()
    torch.testing.assert_close(value.detach(), start + 0.75 * 2.0)
    average.back()
    torch.testing.assert_close(value.detach(), start + 2.0)


def test_a_decay_of_one_is_refused(make_segmenter: Any) -> None:
    with pytest.raises(UsageError, match="got 1"):
        ParameterAverage(make_segmenter(), decay=1)


def test_a_training_by_time_ends_in_time(datalist: Path, tmp_path: Path, by_steps: Keys) -> None:
    start = time.monotonic()
    result = train(datalist, tmp_path / "model", TASK, overrides=by_steps, minutes=0.1, tracking="none")
    assert time.monotonic() - start < 3 * 6, "six seconds, of a machine that others may use, too"
    rows = curve(tmp_path / "model")
    assert rows[-1]["step"] >= 1 and "mean_dice" in rows[-1]
    assert result["mean_dice"] is not None
    load_model(tmp_path / "model", weights=by_steps["weights"])


def test_more_steps_stretch_the_schedule(datalist: Path, tmp_path: Path, by_steps: Keys) -> None:
    """Four steps, then eight more: the rates of the further rounds are those of a training of twelve."""
    keys = by_steps | {"val_interval": 2, "warmup": 0.0, "learning_rate": 0.01}
    train(datalist, tmp_path / "m", TASK, overrides=keys, steps=4, tracking="none")
    train(datalist, tmp_path / "m", TASK, overrides=keys, steps=12, tracking="none", resume=True)
    rows = curve(tmp_path / "m")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    totals = [4, 4, 12, 12, 12, 12]
    for row, begin, total in zip(rows[1:], [2, 4, 6, 8, 10], totals[1:], strict=True):
        expected = 0.01 * 0.5 * (1 + math.cos(math.pi * begin / total))
        if begin != 4:  # that round begins with the rate that the finished training left
            assert row["learning_rate"]["adapters/vectors"] == pytest.approx(expected)
    with pytest.raises(UsageError, match=r"the length was given in steps \(12\), now it is in minutes; give steps"):
        train(datalist, tmp_path / "m", TASK, overrides=keys, minutes=3, tracking="none", resume=True)


def test_more_minutes_leave_a_smaller_share_used() -> None:
    first = Pace(minutes=2)
    first._share = first._validated = 1.0
    longer, again = Pace(minutes=8), Pace(minutes=2)
    longer.load_state_dict(first.state_dict())
    again.load_state_dict(first.state_dict())
    assert (longer.share, again.share) == (0.25, 1.0)


def test_a_training_by_steps_resumes_bit_for_bit(
    datalist: Path, tmp_path: Path, by_steps: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven steps, a validation every four, two slices renewed per step; an error behind the second validation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keys = by_steps | {"val_interval": 4, "views": 3, "renewed_views": 2.0}
    train(datalist, tmp_path / "whole", TASK, overrides=keys, steps=11, tracking="none")
    with interrupted_at(10, monkeypatch):
        train(datalist, tmp_path / "parts", TASK, overrides=keys, steps=11, tracking="none")
    train(datalist, tmp_path / "parts", TASK, overrides=keys, steps=11, tracking="none", resume=True)
    torch.set_num_threads(threads)
    assert [row["step"] for row in curve(tmp_path / "whole")] == [4, 8, 11]
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_validation_patients_train_in_the_end_and_a_resume_knows_it(
    tmp_path: Path, by_steps: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps, a round of three: at 9 of 12 steps the third patient joins; the error comes behind that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = [write_case(tmp_path, name, seed) for seed, name in enumerate("abc")]
    (tmp_path / "three.json").write_text(json.dumps({"training": cases}))
    keys = by_steps | {"val_interval": 3, "renewed_views": 0.0}
    drawn: list[int] = []  # numbers of the cases that train, the late one is 2
    get = EmbeddingDataset.__getitem__

    def note(self: EmbeddingDataset, key: Any) -> dict[str, Any]:
        item = get(self, key)
        if isinstance(key, tuple):
            drawn.append(item["case"])
        return item

    monkeypatch.setattr(EmbeddingDataset, "__getitem__", note)

    def run(name: str, **more: Any) -> dict[str, Any]:
        overrides = keys | more.pop("keys", {})
        return train(
            tmp_path / "three.json", tmp_path / name, TASK, overrides=overrides, steps=12, tracking="none", **more
        )

    result = run("joined", keys={"join_validation": 0.7})
    size = keys["batch_size"]
    assert set(drawn[: 9 * size]) == {0, 1} and 2 in drawn[9 * size :]
    rows = curve(tmp_path / "joined")
    assert [(row["step"], "mean_dice" in row) for row in rows] == [(3, True), (6, True), (9, True), (12, False)]
    assert result["best_epoch"] <= 3 and "train, too" in result["split"]
    run("apart", keys={"join_validation": 1.0})
    assert all("mean_dice" in row for row in curve(tmp_path / "apart"))
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("joined", "apart"))
    assert not all(torch.equal(one[key], two[key]) for key in one)

    with interrupted_at(11, monkeypatch):
        run("parts", keys={"join_validation": 0.7})
    run("parts", keys={"join_validation": 0.7}, resume=True)
    torch.set_num_threads(threads)
    two = load_file(tmp_path / "parts" / "adapter.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_one_patient_keeps_the_last_parameters(
    tmp_path: Path, by_steps: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    case = write_case(tmp_path, "a", shape=(40, 36, 20))
    (tmp_path / "one.json").write_text(json.dumps({"training": [case]}))
    keys = by_steps | {"patience": 1, "val_interval": 1}
    with caplog.at_level("INFO"):
        result = train(tmp_path / "one.json", tmp_path / "model", TASK, overrides=keys, steps=5, tracking="none")
    assert result["best_epoch"] == result["epochs"] == 5
    assert "the patient trains and validates" in caplog.text


@pytest.mark.parametrize("together", [1, 4])
def test_new_views_take_the_places_of_the_oldest(together: int) -> None:
    class Slices:
        foreground = torch.ones(5, dtype=torch.bool)
        late = torch.zeros(5, dtype=torch.bool)

        def __len__(self) -> int:
            return 5

        def view(self, index: int, view: int) -> dict[str, Any]:
            return {"image": torch.full((1, 32, 32), 10.0 * index + view), "label": torch.full((1, 32, 32), view)}

    class Pool(torch.nn.Module):
        def encode(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            encoded.append(image[:, 0, 0, 0].tolist())
            return {"embedding": image.mean((2, 3), keepdim=True).expand(-1, 4, 2, 2)}

    encoded: list[list[float]] = []  # batches
    dataset = EmbeddingDataset(Slices(), Pool(), views=3, first=2, batch_size=together)
    assert dataset.latest.tolist() == [1] * 5
    dataset.renew(12)  # everything twice, two slices once more
    assert sorted(dataset.latest.tolist()) == [3, 3, 3, 4, 4]
    for index, latest in enumerate(dataset.latest.tolist()):
        held = {int(dataset[turn, index]["label"][0, 0, 0]) for turn in range(1, 9)}
        assert held == {0, latest - 1, latest}
        values = {float(dataset[turn, index]["pyramid"]["embedding"][0, 0, 0]) for turn in range(1, 9)}
        assert values == {10.0 * index + view for view in held}
    batches = encoded.copy()
    assert max(map(len, batches)) == together
    encoded.clear()
    again = EmbeddingDataset(Slices(), Pool(), views=3, first=2, batch_size=together)
    again.load_state_dict(dataset.state_dict())
    assert all(batch in batches for batch in encoded), "a slice may round otherwise beside others"
    for slot in range(3):
        assert torch.equal(again.pyramids[slot]["embedding"], dataset.pyramids[slot]["embedding"])
        assert torch.equal(again.labels[slot], dataset.labels[slot])
    assert again.renewed == 12


def test_cuts_keep_labels_and_levels_together() -> None:
    class Slices:
        foreground = torch.ones(1, dtype=torch.bool)
        late = torch.zeros(1, dtype=torch.bool)

        def __len__(self) -> int:
            return 1

        def view(self, index: int, view: int) -> dict[str, Any]:
            rows = torch.arange(96).view(1, -1, 1) // 16
            return {"image": (rows * 6 + rows.mT).float(), "label": (rows * 6 + rows.mT).to(torch.uint8)}

    class Pool(torch.nn.Module):
        def encode(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"fine": image[..., ::4, ::4], "coarse": image[..., ::16, ::16]}

    dataset = EmbeddingDataset(Slices(), Pool(), crop=64)
    assert dataset[0]["label"].shape == (1, 96, 96)
    assert dataset.cut_share == pytest.approx(4 / 9) and EmbeddingDataset(Slices(), Pool(), crop=None).cut_share == 1
    seen = set()
    for turn in range(1, 20):
        item = dataset[turn, 0]
        assert item["label"].shape == (1, 64, 64) and item["pyramid"]["coarse"].shape == (1, 4, 4)
        assert torch.equal(item["label"][..., ::16, ::16].half(), item["pyramid"]["coarse"])
        assert torch.equal(item["label"][..., ::4, ::4].half(), item["pyramid"]["fine"])
        seen.add(int(item["label"][0, 0, 0]))
    assert len(seen) > 3


def test_the_closed_form_start_is_the_solution_of_the_unchanged_slices(
    datalist: Path, tmp_path: Path, by_steps: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head holds before the first step are the scores of the ridge regression over view 0."""
    from samda.embeddings import draw, labeled_batches
    from samda.training import datasets

    seen: dict[str, Any] = {}
    build = datasets.build_dataset

    def look(*args: Any, **settings: Any) -> Any:
        dataset = build(*args, **settings)
        if settings["part"] == "training":
            network, slices = settings["network"], dataset.slices
            seen["own"] = {key: value.clone() for key, value in network.state_dict().items()}
            generator = torch.Generator().manual_seed(draw(0, "first"))  # of the pixels, a part is drawn in order
            order = torch.randperm(len(slices), generator=generator).tolist()
            network.fit_closed_form(labeled_batches(dataset, order), slices.counts)
            seen["expected"] = {key: value.clone() for key, value in network.state_dict().items()}
        return dataset

    monkeypatch.setattr("samda.training.build_dataset", look)
    train(datalist, tmp_path / "model", TASK, overrides=by_steps, steps=1, tracking="none")
    assert any(bool(value.any()) for key, value in seen["own"].items() if ".linear." in key)
    for key, value in seen["own"].items():
        torch.testing.assert_close(value, seen["expected"][key])


def test_lengths_heads_and_labels_that_do_not_fit_are_refused(datalist: Path, tmp_path: Path, by_steps: Keys) -> None:
    with pytest.raises(UsageError, match="steps=3, minutes=1"):
        train(datalist, tmp_path / "model", TASK, overrides=by_steps, steps=3, minutes=1.0)
    with pytest.raises(UsageError, match="minutes=1"):
        train(datalist, tmp_path / "model", TASK, overrides=by_steps | {"epochs": 2}, minutes=1.0)
    with pytest.raises(UsageError, match="'pyramide'"):
        train(datalist, tmp_path / "model", TASK, overrides=by_steps, head="pyramide")
    with pytest.raises(UsageError, match="'minutes' must be above 0"):
        train(datalist, tmp_path / "model", TASK, overrides=by_steps, minutes=0.0)
    cases = [write_case(tmp_path, name, empty=True) for name in "ab"]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    with pytest.raises(InputError, match="no foreground"):
        train(tmp_path / "list.json", tmp_path / "model", TASK, overrides=by_steps)


def test_rounds_without_a_validation_are_as_long_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the validation patients train nothing validates; the rounds are tenths of the time all the same."""
    now = [0.0]
    monkeypatch.setattr("samda.training.pace.clock", lambda: now[0])
    loader = SimpleNamespace(sampler=SimpleNamespace(start_at=lambda place: None), batch_size=1)
    state, ends = SimpleNamespace(iteration=0, dataloader=loader), []
    engine: Any = SimpleNamespace(
        state=state, terminate=lambda: None, terminate_epoch=lambda: ends.append(state.iteration)
    )
    timer = Pace(minutes=10)
    timer.start(engine)
    while not timer.ended:
        now[0] += 1
        state.iteration += 1
        timer.step(engine)
    lengths = [b - a for a, b in itertools.pairwise([0, *ends])]
    assert 9 <= len(ends) <= 11 and min(lengths[:-1]) > 0.09 * ends[-1]
