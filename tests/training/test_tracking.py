# SPDX-License-Identifier: Apache-2.0
"""What a training wrote for TensorBoard, read back; MLflow's part is in integration/."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_scans import CLASSES, TASK

from samda.data.transforms import build_preprocessing
from samda.errors import UsageError
from samda.models.folder import load_model
from samda.report import paint
from samda.task import Task
from samda.training import SliceDataset, train
from samda.training.tracking import OLDEST_MLFLOW, mlflow_settings, scalars, trackers

Keys = dict[str, Any]


def events(folder: Path) -> EventAccumulator:
    """Two files that one process begins within a second may be read in either order, so nothing is purged for it."""
    guidance = {"images": 0, "scalars": 0}
    return EventAccumulator(str(folder / "tensorboard"), guidance, purge_orphaned_data=False).Reload()


def test_tensorboard_holds_the_curve_and_the_pictures_of_the_best(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    task = Task.from_dict(TASK | {"context": 1})
    result = train(datalist, tmp_path / "model", task, overrides=keys | {"epochs": 3})
    found = events(tmp_path / "model")
    rows = json.loads((tmp_path / "model" / "history.json").read_text("utf-8"))["epochs"]
    for name in scalars(rows[0]):
        steps = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in steps] == [1, 2, 3]
        np.testing.assert_allclose([value for _, value in steps], [scalars(row)[name] for row in rows], rtol=1e-6)
    expected = {"loss", "dice/mean", *(f"dice/{name}" for name in CLASSES[1:])}
    assert expected <= set(found.Tags()["scalars"]) and "learning_rate/head" in found.Tags()["scalars"]

    assert found.Tags()["images"] == [f"validation/{number}" for number in (1, 2, 3, 4)]
    best = [event for event in found.Images("validation/1") if event.step == result["best_epoch"]]
    picture = np.asarray(Image.open(io.BytesIO(best[0].encoded_image_string)))
    case = {"id": "c", "image": str(datalist.parent / "c.nii.gz"), "label": str(datalist.parent / "c_label.nii.gz")}
    slices = SliceDataset([case], build_preprocessing(task, labels=True), task, part="validation")
    item = slices[1]  # foreground lies in slices 1 to 6; the first of four shown
    network, _, _ = load_model(tmp_path / "model", weights=keys["weights"])
    predicted = network(item["image"][None]).detach()[0].argmax(0).numpy()
    image = item["image"][1:2].numpy()  # the slice between its neighbors
    columns = [paint(image), paint(image, item["label"][0].numpy()), paint(image, predicted)]
    # one slice by itself rounds otherwise than in a batch, so a pixel may change its class
    assert picture.shape == (64, 3 * 64, 3)
    assert np.mean(picture != np.concatenate(columns, axis=1)) <= 0.002


def test_a_resumed_training_goes_on_and_a_new_one_starts_anew(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    task, model = Task.from_dict(TASK), tmp_path / "model"
    train(datalist, model, task, overrides=keys | {"epochs": 1})
    train(datalist, model, task, overrides=keys | {"epochs": 2}, resume=True)
    assert sorted(event.step for event in events(model).Scalars("loss")) == [1, 2]
    train(datalist, model, task, overrides=keys | {"epochs": 1}, overwrite=True)
    assert [event.step for event in events(model).Scalars("loss")] == [1]
    assert len(list((model / "tensorboard").iterdir())) == 1


def test_tracking_none_writes_nothing_and_changes_no_bit(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    for name, tracking in (("with", "tensorboard"), ("without", "none")):
        train(datalist, tmp_path / name, Task.from_dict(TASK), overrides=keys, tracking=tracking)
    assert not (tmp_path / "without" / "tensorboard").exists()
    a, b = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("with", "without"))
    assert a == b


def test_what_is_refused_writes_no_events(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    train(datalist, tmp_path / "model", Task.from_dict(TASK), overrides=keys | {"epochs": 1}, tracking="none")
    with pytest.raises(UsageError, match="already holds a training"):
        train(datalist, tmp_path / "model", Task.from_dict(TASK), overrides=keys)
    assert not (tmp_path / "model" / "tensorboard").exists()


def test_none_stands_alone() -> None:
    with pytest.raises(UsageError, match=r"^tracking 'none' stands alone, got 'none,tensorboard'; leave out one"):
        trackers("none,tensorboard")


def test_names_of_trackers() -> None:
    assert trackers("none") == [] and trackers("tensorboard") == ["tensorboard"] and trackers(()) == []
    with pytest.raises(UsageError, match="tracking 'tensorbord' is unknown; did you mean 'tensorboard'"):
        trackers("tensorbord")


@pytest.mark.parametrize(
    ("version", "have"), [(None, "it is not installed"), ("3.14.0", "this environment has 3.14.0")]
)
def test_a_missing_or_old_mlflow_is_one_line(
    version: str | None, have: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        (tmp_path / f"mlflow-{version}.dist-info").mkdir()
        (tmp_path / f"mlflow-{version}.dist-info" / "METADATA").write_text(f"Name: mlflow\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as caught:
        trackers("tensorboard,mlflow")
    remedy = "pip install 'samda[mlflow]'"
    assert str(caught.value) == f"tracking 'mlflow' needs mlflow {OLDEST_MLFLOW} or newer, {have}: {remedy}"


def test_mlflow_settings_are_monais_but_for_the_handler() -> None:
    settings = mlflow_settings()
    assert settings["handlers_id"]["trainer"] == {"id": "train#trainer", "handlers": "train#handlers"}
    assert settings["configs"]["tracking_uri"] == "$monai.utils.path_to_sqlite_uri(@output_dir + '/mlruns.db')"
    assert settings["configs"]["trainer"]["_target_"] == "samda.training.MLflow"


def test_scalars_leave_out_what_was_not_measured() -> None:
    row = {"loss": 1.5, "learning_rate": {"head": 0.1, "adapters/vectors": 0.2}}
    assert scalars(row) == {"loss": 1.5, "learning_rate/head": 0.1, "learning_rate/adapters/vectors": 0.2}
    assert scalars(row | {"mean_dice": 0.5, "dice": {"a": 0.5, "b": None}})["dice/a"] == 0.5
    assert "dice/b" not in scalars(row | {"mean_dice": 0.5, "dice": {"a": 0.5, "b": None}})
