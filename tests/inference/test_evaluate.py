# SPDX-License-Identifier: Apache-2.0
"""Pairs of files to scores, tables and refusals."""

from __future__ import annotations

import csv
import json
import logging
import math
import resource
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.datalists import find_pairs
from samda.errors import InputError, SamdaError, UsageError
from samda.inference.evaluate import evaluate, format_table, score_files
from samda.metrics import ClassScores
from samda.task import Task

AFFINE = np.diag([-2.0, 1.0, 5.0, 1.0])


@pytest.fixture
def task() -> Task:
    """Two organs, with other ids in the label files."""
    return Task(classes=("background", "liver", "aorta"), labels={"liver": (5,), "aorta": (52, 53)}, nsd_tolerance=2.0)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def boxes(liver: int, aorta: int, shift: int = 0) -> np.ndarray:
    """A liver of 4 x 4 x 4 voxels, an aorta of 2 x 2 x 4 voxels; 0 leaves a structure out."""
    array = np.zeros((12, 14, 8), np.uint8)
    array[2 + shift : 6 + shift, 2:6, 2:6] = liver
    array[9:11, 9:11, 2:6] = aorta
    return array


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases: shifted by a voxel (2 mm); the aorta missed; and no aorta in either."""
    for name, prediction, label in (
        ("a", boxes(1, 2, shift=1), boxes(5, 52)),
        ("b", boxes(1, 0), boxes(5, 53)),
        ("c", boxes(1, 0), boxes(5, 0)),
    ):
        save(tmp_path / "out" / f"{name}.nii.gz", prediction)
        label[..., 0] = 7  # an id that the task does not take
        save(tmp_path / "labels" / f"{name}.nii.gz", label)
    return tmp_path / "out", tmp_path / "labels"


def test_scores_of_files(tmp_path: Path, task: Task) -> None:
    prediction, label = save(tmp_path / "p.nii.gz", boxes(1, 0, shift=1)), save(tmp_path / "l.nii.gz", boxes(5, 52))
    liver, aorta = score_files(prediction, label, task, nsd_tolerance_mm=1.0)
    # cubes one voxel of 2 mm apart: 48 of 64 voxels shared; of 56 surface voxels 36 coincide, 4 are 1 mm away, 16 2 mm
    volumes = {"predicted_ml": pytest.approx(0.64), "label_ml": pytest.approx(0.64)}  # 64 voxels of 10 mm3
    assert liver == ClassScores("both", 0.75, 0.6, 2.0, pytest.approx(40 / 56), **volumes)
    diagonal = math.sqrt(24**2 + 14**2 + 40**2)
    assert aorta == ClassScores("missed", 0.0, 0.0, pytest.approx(diagonal), 0.0, 0.0, pytest.approx(0.16))


def test_evaluates_folders(tmp_path: Path, task: Task) -> None:
    told: dict[str, str] = {}
    result = evaluate(*folders(tmp_path), task, output=tmp_path / "scores", on_case=told.__setitem__)
    assert told == {"a": "done", "b": "done", "c": "done"}
    assert result.exit_code == 0
    assert [[s.status for s in scores] for scores in result.cases.values()] == [
        ["both", "both"],
        ["both", "missed"],
        ["both", "absent"],
    ]
    summary = result.summary()["classes"]
    assert summary["liver"]["dice"]["mean"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert (summary["aorta"]["dice"]["mean"], summary["aorta"]["dice"]["n"]) == (0.5, 2)
    assert (summary["aorta"]["missed"], summary["aorta"]["absent"]) == (1, 1)
    # 16 voxels found and shared of 16 + 16 in the labels; the liver shares 48 + 64 + 64 of 3 x 64
    assert summary["aorta"]["pooled_dice"] == pytest.approx(2 * 16 / (16 + 32))
    assert summary["liver"]["pooled_dice"] == pytest.approx(176 / 192)


@pytest.mark.parametrize("turn", [[[0, -1], [1, 1], [2, 1]], [[2, 1], [0, -1], [1, -1]]])
def test_one_grid_stored_in_another_order(tmp_path: Path, task: Task, turn: list) -> None:
    label = nib.Nifti1Image(boxes(5, 52), AFFINE)
    prediction = nib.Nifti1Image(boxes(1, 2, shift=1), AFFINE).as_reoriented(np.array(turn))
    assert prediction.affine.tolist() != AFFINE.tolist()
    for name, image in (("p", prediction), ("l", label)):
        nib.save(image, tmp_path / f"{name}.nii.gz")
    liver, aorta = score_files(tmp_path / "p.nii.gz", tmp_path / "l.nii.gz", task, nsd_tolerance_mm=1.0)
    assert (liver.dice, aorta.dice) == (0.75, 1.0)
    assert liver.hd95_mm == 2.0


def test_files_of_scores(tmp_path: Path, task: Task) -> None:
    evaluate(*folders(tmp_path), task, output=tmp_path / "scores", nsd_tolerance_mm=1.0)
    assert sorted(p.name for p in (tmp_path / "scores").iterdir()) == [".samda", "metrics.csv", "metrics.json"]
    values = json.loads((tmp_path / "scores" / "metrics.json").read_text("utf-8"))
    assert values["nsd_tolerance_mm"] == 1.0
    assert values["cases"]["a"]["liver"]["dice"] == 0.75
    assert values["cases"]["c"]["aorta"] == {
        "status": "absent",
        "dice": None,
        "iou": None,
        "hd95_mm": None,
        "nsd": None,
        "predicted_ml": 0.0,
        "label_ml": 0.0,
    }
    assert values["summary"]["classes"]["aorta"]["nsd"] == pytest.approx(
        {"mean": 0.5, "std": math.sqrt(0.5), "median": 0.5, "n": 2}
    )
    assert {"dice", "iou", "hd95_mm", "nsd", "missed", "extra", "absent", "mean"} <= set(values["definitions"])
    with (tmp_path / "scores" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"], row["status"]) for row in rows[::3]] == [
        ("a", "liver", "both"),
        ("b", "aorta", "missed"),
    ]
    assert float(rows[0]["hd95_mm"]) == 2.0
    assert rows[5]["dice"] == ""


def test_scores_that_cannot_be_written_are_shown(tmp_path: Path, task: Task) -> None:
    predictions, labels = folders(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # as a full disk
    try:
        result = evaluate(predictions, labels, task, tmp_path / "scores")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(result.cases) == {"a", "b", "c"} and "3 scored, 0 failed" in format_table(result)
    with pytest.raises(SamdaError, match=r"the scores were not written: .*make room"):
        result.check()
    assert [path.name for path in (tmp_path / "scores").iterdir()] == [".samda"]


def test_the_table_states_its_rules_and_counts(tmp_path: Path, task: Task) -> None:
    table = format_table(evaluate(*folders(tmp_path), task))
    lines = table.splitlines()
    assert lines[0] == "# cases: 3 scored, 0 failed"
    assert (
        "# missed: in the label, not in the prediction: Dice, IoU and NSD 0, HD95 the diagonal of the volume" in lines
    )
    assert "# NSD tolerance: 2 mm" in lines
    (aorta,) = [line.split() for line in lines if line.startswith("aorta")]
    # half of the diagonal, sqrt(24^2 + 14^2 + 40^2) / 2 = 24.35
    assert aorta == ["aorta", "0.500", "(2)", "0.500", "(2)", "24.4", "(2)", "0.500", "(2)", "0.667", "1", "0", "1"]
    assert lines[-1].startswith("all")


def test_what_cannot_be_compared_is_listed(tmp_path: Path, task: Task, caplog: pytest.LogCaptureFixture) -> None:
    out, labels = folders(tmp_path)
    save(out / "shape.nii.gz", boxes(1, 2)[:-1])
    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    save(out / "place.nii.gz", boxes(1, 2), moved)
    save(out / "class.nii.gz", boxes(1, 9))
    save(out / "fraction.nii.gz", boxes(1, 2) * np.float32(0.5))
    (out / "broken.nii.gz").write_bytes(b"none")
    for name in ("shape", "place", "class", "fraction", "broken", "unpredicted"):
        save(labels / f"{name}.nii.gz", boxes(5, 52))
    save(out / "unlabeled.nii.gz", boxes(1, 2))
    with caplog.at_level(logging.WARNING):
        result = evaluate(out, labels, task)
    assert list(result.cases) == ["a", "b", "c"]
    words = {
        "shape": "11 x 14 x 8 voxels",
        "place": "0.50 mm from",
        "class": "9",
        "fraction": "fractions",
        "broken": "cannot be read",
        "unpredicted": "unpredicted.nii.gz",
    }
    assert sorted(result.failed) == sorted(words)
    for case, word in words.items():
        assert word in result.failed[case]
        assert f"not scored: {case}: " in format_table(result)
    assert result.exit_code == 1
    assert "no label for 1 predictions: unlabeled" in caplog.text


def test_labels_that_the_task_does_not_know_are_refused(tmp_path: Path) -> None:
    task = Task(classes=("background", "liver"))  # id k is class k
    prediction, label = save(tmp_path / "p.nii.gz", boxes(1, 0)), save(tmp_path / "l.nii.gz", boxes(1, 52))
    with pytest.raises(InputError, match=r"l\.nii\.gz .* 52"):
        score_files(prediction, label, task, 1.0)


def test_pairs_by_name(tmp_path: Path) -> None:
    for name in ("x_0000", "y"):
        save(tmp_path / "out" / f"{name}.nii.gz", boxes(1, 0))
    (tmp_path / "out" / "y.json").write_text("{}")
    (tmp_path / "out" / ".hidden.nii.gz").write_text("")
    for name in ("x", "y", "z"):
        save(tmp_path / "labels" / f"{name}.nii", boxes(1, 0))
    pairs, ids = find_pairs(tmp_path / "out", tmp_path / "labels")
    out, labels = tmp_path / "out", tmp_path / "labels"
    assert pairs == {
        "x": (out / "x_0000.nii.gz", labels / "x.nii"),
        "y": (out / "y.nii.gz", labels / "y.nii"),
        "z": (None, labels / "z.nii"),
    }
    assert ids is None
    assert find_pairs(out / "y.nii.gz", labels / "z.nii")[0] == {"z": (out / "y.nii.gz", labels / "z.nii")}


def test_pairs_of_a_data_set(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "images" / f"{name}.nii.gz", boxes(1, 0))
        save(tmp_path / "labels" / f"{name}.nii.gz", boxes(1, 0))
    entries = [{"image": f"images/{n}.nii.gz", "label": f"labels/{n}.nii.gz"} for n in ("a", "b", "c")]
    content = {"labels": {"background": 0, "liver": 1}, "training": entries[:1], "test": entries[1:]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    save(tmp_path / "out" / "b.nii.gz", boxes(1, 0))
    pairs, ids = find_pairs(tmp_path / "out", tmp_path)
    assert {case: prediction is not None for case, (prediction, _) in pairs.items()} == {"b": True, "c": False}
    assert ids == {"background": (0,), "liver": (1,)}
    with pytest.raises(InputError, match=r"no prediction .b, .* label .a, "):
        find_pairs(tmp_path / "out", tmp_path, "training")
    with pytest.raises(InputError, match=r"training \(1\), validation \(0\), test \(2\)"):
        find_pairs(tmp_path / "out", tmp_path, "validation")


def test_pictures(tmp_path: Path) -> None:
    array = np.zeros((10, 12), np.uint8)
    array[2:6, 2:6] = 1
    for folder, moved in (("out", np.roll(array, 1, 1)), ("labels", array)):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(moved), str(tmp_path / folder / "photo.png"))
    result = evaluate(tmp_path / "out", tmp_path / "labels", Task(classes=("background", "mole")))
    (score,) = result.cases["photo"]
    assert (score.dice, score.hd95_mm) == (0.75, 1.0)


def test_refuses(tmp_path: Path, task: Task) -> None:
    out, labels = folders(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, kind, message in (
        ((out, labels, task, None, -1.0), UsageError, "NSD tolerance"),
        ((tmp_path / "empty", labels, task), InputError, "no label maps"),
        ((out, tmp_path / "empty", task), InputError, "no label files"),
        ((tmp_path / "nowhere", labels, task), InputError, "nowhere"),
        ((out, tmp_path / "nowhere", task), InputError, "nowhere"),
    ):
        with pytest.raises(kind, match=message):
            evaluate(*arguments)


def test_partial_labels_do_not_count(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, label = boxes(1, 2, shift=1), boxes(5, 0)
    label[6, 2:6, 2:6] = 9  # what the prediction has beyond the label is left open
    save(tmp_path / "out" / "a.nii.gz", prediction)
    save(tmp_path / "a_label.nii.gz", label)
    case = {"id": "a", "image": "a.nii.gz", "label": "a_label.nii.gz", "unlabeled": ["aorta"]}
    save(tmp_path / "a.nii.gz", prediction)
    content = {"labels": {"background": 0, "liver": 5, "aorta": [52, 53], "ignore": 9}, "training": [case]}
    (tmp_path / "data.json").write_text(json.dumps(content))
    liver, aorta = evaluate(tmp_path / "out", tmp_path / "data.json", task).cases["a"]
    assert liver.dice == pytest.approx(2 * 48 / (48 + 64))  # of the cube that is 16 voxels ahead, 48 count
    assert aorta.status == "unlabeled" and math.isnan(aorta.dice)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluate("~/out", "~/data.json", task).cases["a"][1].status == "unlabeled"
