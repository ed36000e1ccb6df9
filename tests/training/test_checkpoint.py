# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from samda.errors import InputError, UsageError
from samda.io import write_text
from samda.output import open_output
from samda.training import Checkpoint, Resume, SaveCheckpoint, TrainingRecord, train
from samda.training.checkpoint import check_model_folder


class Toy:
    """A training whose every step depends on parameters, momentum, schedule and all global random generators."""

    def __init__(
        self, folder: Path, epochs: int, resume: bool = False, overwrite: bool = False, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - what libraries draw from
        random.seed(0)
        self.network = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.record = TrainingRecord()
        objects = {
            "network": self.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "record": self.record,
        }
        checkpoint = Checkpoint(folder, objects, {"seed": 0} | settings, resume, overwrite)
        self.engine = Engine(self.step)
        Resume(checkpoint).attach(self.engine)
        self.engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda e: self.record.validated(-e.state.epoch, e.state.epoch, self.network)
        )
        SaveCheckpoint(checkpoint).attach(self.engine)
        self.engine.state.epoch_length = 3
        self.engine.run(range(3), max_epochs=epochs)

    def step(self, engine: Engine, batch: int) -> None:
        x = torch.rand(4, 3) + random.random() + np.random.rand()  # noqa: NPY002
        self.optimizer.zero_grad()
        self.network(x).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Toy(tmp_path / "whole", epochs=5)
    Toy(tmp_path / "parts", epochs=2)
    resumed = Toy(tmp_path / "parts", epochs=5, resume=True)
    assert torch.equal(whole.network.weight, resumed.network.weight)
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]
    assert (resumed.record.best_epoch, resumed.record.misses) == (1, 4)
    assert torch.equal(whole.record.best_state["weight"], resumed.record.best_state["weight"])
    assert resumed.engine.state.epoch == 5


def test_a_finished_training_resumes_to_itself(tmp_path: Path) -> None:
    first = Toy(tmp_path, epochs=2)
    again = Toy(tmp_path, epochs=2, resume=True)
    assert torch.equal(first.network.weight, again.network.weight)


def test_a_folder_that_holds_a_training_is_not_overwritten(tmp_path: Path) -> None:
    Toy(tmp_path, epochs=1)
    with pytest.raises(UsageError, match="already holds a training; resume it, overwrite it or choose another folder"):
        Toy(tmp_path, epochs=1)
    weight = Toy(tmp_path, epochs=1, overwrite=True).network.weight
    assert torch.equal(weight, Toy(tmp_path / "other", epochs=1).network.weight)
    with pytest.raises(UsageError, match="exclude each other"):
        Checkpoint(tmp_path, {}, {}, resume=True, overwrite=True)


@pytest.mark.parametrize(("resume", "why"), [(False, "it would be lost"), (True, "there is no last.pt to resume from")])
def test_a_finished_model_without_its_checkpoint_is_not_overwritten(tmp_path: Path, resume: bool, why: str) -> None:
    with open_output(tmp_path):
        write_text(tmp_path / "adapter.json", "{}")
    with pytest.raises(UsageError) as error:
        check_model_folder(tmp_path, resume=resume)
    remedy = "overwrite it or choose another folder"
    assert str(error.value) == f"{tmp_path} already holds a model, and {why}; {remedy}"
    check_model_folder(tmp_path, overwrite=True)


def test_changed_settings_are_refused(tmp_path: Path) -> None:
    Toy(tmp_path, epochs=1, rate=0.1)
    with pytest.raises(UsageError, match=r"resume: rate was 0\.1 and is now 0\.2"):
        Toy(tmp_path, epochs=2, resume=True, rate=0.2)


def test_resume_without_a_checkpoint_starts_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Toy(tmp_path, epochs=1, resume=True)
    assert "nothing to resume" in caplog.text
    assert (tmp_path / "last.pt").exists()


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"last\.pt cannot be read"):
        Toy(tmp_path, epochs=1, resume=True)


def test_the_interval_keeps_the_last_epoch(tmp_path: Path) -> None:
    epochs = []

    class Spy(Checkpoint):
        def save(self, engine: Engine) -> None:
            epochs.append(engine.state.epoch)

    engine = Engine(lambda engine, batch: None)
    SaveCheckpoint(Spy(tmp_path, {}, {}), interval=2).attach(engine)
    engine.run(range(1), max_epochs=5)
    assert epochs == [2, 4, 5]


@pytest.mark.parametrize(("name", "words"), [("file", "is a file"), ("file/model", "is a file")])
def test_a_place_that_can_be_no_folder_is_refused_at_once(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=words):
        check_model_folder(tmp_path / name)
    with pytest.raises(UsageError, match=words):  # before anything is read: there is no data set
        train(tmp_path / "none", tmp_path / name)
    check_model_folder(tmp_path / "new" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "to look makes nothing"


def test_half_a_checkpoint_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        Toy(tmp_path, epochs=1, late=lambda: 0)  # which no file can hold
    assert [path.name for path in tmp_path.iterdir()] == [".samda"]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_not_resumed_from(tmp_path: Path, share: float) -> None:
    Toy(tmp_path, epochs=1)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "last.pt") as file:
        starts = [info.header_offset for info in file.infolist() if info.file_size > 1000]
    content[starts[0] + int(share * 1000) + 100] ^= 4  # in the values of a tensor or the pickle
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"last\.pt cannot be read"):
        Toy(tmp_path, epochs=2, resume=True)
