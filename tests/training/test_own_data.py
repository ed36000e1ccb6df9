# SPDX-License-Identifier: Apache-2.0
"""From every layout: looked at, a task suggested, trained with it, predicted, scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from own_data import WRITERS

from samda.data.datalists import read_datalist
from samda.data.readers import read_scan
from samda.data.suggest import check_and_suggest
from samda.errors import InputError, UsageError
from samda.inference.dicom_out import write_dicom
from samda.inference.evaluate import evaluate
from samda.inference.folder import find_cases, predict_folder
from samda.inference.predict import Predictor
from samda.models.folder import load_model
from samda.task import Task
from samda.training import build_task, train
from tests.inference.test_dicom_out import SHAPE, blobs, write_series
from tests.inference.test_dicom_out import TASK as ORGANS

EXPECTED = {  # layout -> modality, channels, classes
    "csv": ("CT", 1, ("background", "class_1", "class_2")),
    "nnunet": ("MR", 2, ("background", "liver", "spleen")),
    "masks": ("image", 3, ("background", "foreground")),
    "dicom": ("CT", 1, ("background", "class_1", "class_2")),
}
SMALL = {"salt": {"rank": 2}, "dka": {"width": 2, "large_kernel": 5, "small_kernel": 3}, "sam_da": {}}


@pytest.fixture(params=WRITERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "data").mkdir()
    (tmp_path / "scratch").mkdir()
    return request.param, WRITERS[request.param](tmp_path / "data", tmp_path / "scratch")


def test_check_train_predict_evaluate(place: tuple[str, Path], tmp_path: Path, keys: dict[str, Any]) -> None:
    layout, dataset = place
    report, suggestion = check_and_suggest(dataset)
    assert report.problems == [] and report.data.layout == layout
    assert suggestion is not None
    task = suggestion.task
    assert (task.modality, task.in_channels, task.classes) == EXPECTED[layout]
    assert (task.image_size, task.spacing) == ((112, 0.5) if layout == "masks" else (96, 2.03))
    (tmp_path / "task.yaml").write_text(suggestion.to_yaml(), encoding="utf-8")
    result = train(dataset, tmp_path / "model", tmp_path / "task.yaml", SMALL, overrides=keys | {"epochs": 1})
    assert {"salt", "dka", "sam_da", "head"} < set(result["parameters"])
    network, loaded, _ = load_model(tmp_path / "model", weights=keys["weights"])
    assert loaded == task and network.in_channels == task.in_channels
    section = "test" if read_datalist(dataset).cases["test"] else "training"
    done = predict_folder(Predictor(network, task), find_cases(dataset, section), tmp_path / "out")
    assert not done.failed and len(done.done) == len(read_datalist(dataset).cases[section])
    if section == "test":
        found = nib.load(tmp_path / "out" / "t.nii.gz")
        assert found.shape == (40, 36, 8)
    elif layout == "masks":
        assert sitk.ReadImage(str(tmp_path / "out" / "a.png")).GetSize() == (56, 40)
    if section == "training":
        scores = evaluate(tmp_path / "out", dataset, task)
        assert sorted(scores.cases) == ["a", "b", "c"] and not scores.failed


def test_without_a_task_the_suggested_one_is_taken(place: tuple[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "samda")
    task = build_task(None, dataset=place[1])
    assert task == check_and_suggest(place[1])[1].task  # type: ignore[union-attr]
    assert "no task given" in caplog.text and f"modality: {task.modality}" in caplog.text


def test_channels_that_the_task_does_not_declare(tmp_path: Path, keys: dict[str, Any]) -> None:
    (tmp_path / "data").mkdir()
    dataset = WRITERS["nnunet"](tmp_path / "data", tmp_path)
    task = Task(classes=("background", "liver", "spleen"), modality="MR", spacing=4.0, image_size=64)
    with pytest.raises(InputError, match=r"2 channel files \(b_0000.nii.gz, b_0001.nii.gz\) where one channel is"):
        train(dataset, tmp_path / "model", task, overrides=keys)


def test_each_channel_reaches_the_network_on_its_own_scale(tmp_path: Path) -> None:
    """A network that answers with the second channel: the label map is the part where that is bright."""
    (tmp_path / "data").mkdir()
    dataset = WRITERS["nnunet"](tmp_path / "data", tmp_path)
    task = Task(modality="MR", in_channels=2, spacing=4.0, image_size=64)
    case = read_datalist(dataset).cases["test"][0]
    second = nib.load(case["image"][1])
    bright = np.zeros(second.shape, np.float32)
    bright[3:-3, 3:-3] = 3000  # the body
    bright[10:30, 10:20] = 7000
    nib.save(nib.Nifti1Image(bright, second.affine), case["image"][1])

    def network(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1] == 2
        return torch.cat([torch.full_like(images[:, :1], 0.5), images[:, 1:]], dim=1)

    labels = Predictor(network, task).predict(case).labels
    assert np.array_equal(labels[12:28, 12:18], np.ones((16, 6, 8), np.uint8))
    assert labels[:8].sum() == labels[32:].sum() == labels[:, :8].sum() == labels[:, 22:].sum() == 0


def test_wrong_keys_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="config key 'epoch' is unknown; did you mean 'epochs'"):
        train(tmp_path / "nowhere", tmp_path / "model", overrides={"epoch": 3})
    with pytest.raises(UsageError, match="'epochs' must be a whole number, got 'many'"):
        train(tmp_path / "nowhere", tmp_path / "model", overrides={"epochs": "many"})


def test_segments_and_contours_train_as_the_label_maps_that_they_were_made_of(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    rows = ["image,label,id"]
    for k, kind in enumerate(("dicom-seg", "rtstruct", "dicom-seg"), 1):
        labels, case = np.roll(blobs(), k, axis=0), tmp_path / "data" / f"c{k}"
        values = np.random.default_rng(k).integers(-900, 0, SHAPE) + 300 * labels.astype(int)
        series = write_series(case / "ct", "axial", values.astype(np.int16), SeriesInstanceUID=f"1.2.3.4.{k}")
        write_dicom(kind, case / "label.dcm", labels, ORGANS, series)
        nib.save(nib.Nifti1Image(labels, read_scan(series).affine), tmp_path / f"c{k}.nii.gz")
        rows.append(f"data/c{k}/ct,c{k}.nii.gz,c{k}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    task = Task(classes=ORGANS.classes[:3], spacing=2.0, image_size=64, window=(-900, 900))
    ids = {"liver": (1,), "kidney_left": (2,)}
    for name, data in (("dicom", tmp_path / "data"), ("nifti", tmp_path / "pairs.csv")):
        own = dataclasses.replace(task, labels=ids if name == "nifti" else None)
        train(data, tmp_path / name, own, overrides=keys, device="cpu", tracking="none")
    dicom, nifti = (
        json.loads((tmp_path / name / "history.json").read_text("utf-8"))["epochs"] for name in ("dicom", "nifti")
    )
    assert [row["loss"] for row in dicom] == [row["loss"] for row in nifti] and len(dicom) == keys["epochs"]
    assert [row["mean_dice"] for row in dicom] == [row["mean_dice"] for row in nifti]
