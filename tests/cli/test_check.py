# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samda.cli import main as cli
from samda.task import Task

AFFINE = np.diag([-9.0, 8.0, 5.0, 1.0])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A CSV of three CT volumes of (20, 18, 4) voxels with one organ of id 4."""
    rows = ["image,label"]
    for name in "abc":
        image = np.full((20, 18, 4), -1000, np.int16)
        image[2:-2, 2:-2] = 30
        label = np.zeros(image.shape, np.uint8)
        label[5:9, 6:12, 1:3] = 4
        image[label > 0] = 110
        for kind, array in (("image", image), ("label", label)):
            path = tmp_path / "my data" / kind / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.Nifti1Image(array, AFFINE).to_filename(path)
        rows.append(f"image/{name}.nii.gz,label/{name}.nii.gz")
    (tmp_path / "my data" / "pairs.csv").write_text("\n".join(rows))
    return tmp_path / "my data"


def samda(capsys: pytest.CaptureFixture, *args: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_sound_data_set(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task = tmp_path / "task.yaml"
    code, out, err = samda(capsys, "check", place, "-o", task, "--backbone", "vit_b", "--device", "cpu")
    assert (code, err) == (0, "")
    for line in (
        f"data set        {place} (CSV of pairs: pairs.csv)",
        "cases           training 3, validation 0, test 0; 3 with label",
        "shape           20 x 18 x 4 voxels",
        "spacing         9 x 8 x 5 mm",
        "orientation     LAS (3)",
        "intensity       1 % -1000, 50 % 30, 99 % 110",
        "extremes        -1000 to 110",
        "4            -     144      3",
        "no problems",
        f"suggested task, written to {task}",
    ):
        assert line in out.splitlines(), line
    assert task.read_text("utf-8") in out
    assert Task.from_file(task).labels == {"foreground": (4,)}
    assert f"#   samda train -d '{place}' -o MODEL --task {task} --backbone vit_b" in task.read_text("utf-8")
    code, out, _ = samda(capsys, "check", place, "--task", task)
    assert code == 0 and "suggested task" not in out


def test_problems_come_with_exit_code_1(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "label" / "b.nii.gz").unlink()
    (place / "image" / "c.nii.gz").write_bytes(b"no scan")
    code, out, err = samda(capsys, "check", place, "--json", "-o", tmp_path / "task.yaml")
    result = json.loads(out)
    assert code == 1
    assert err.startswith("samda check: ") and "2 problems" in err and len(err.splitlines()) == 1
    assert [(p["case"], p["kind"], p["stops"]) for p in result["problems"]] == [
        ("b", "missing", True),
        ("c", "unreadable", True),
    ]
    assert result["task"]["labels"] == {"foreground": [4]} and result["batch_size"] in (1, 2, 4, 8)
    assert Path(result["task_file"]) == tmp_path / "task.yaml" and result["cases"][0]["shape"] == [20, 18, 4]
    code, out, _ = samda(capsys, "check", place)
    assert "2 problems, 2 of which stop a training" in out
    assert f"error   case b: there is no file {place / 'label' / 'b.nii.gz'}; check the paths" in out


def test_scans_alone(place: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = samda(capsys, "check", place / "image")
    assert code == 1 and "scans without labels" in out and "suggested task" not in out
    assert "error   no case has image and label (3 without label)" in out
    assert err.startswith("samda check: ") and "1 problem" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["NOWHERE"], 1, ["NOWHERE", "does not exist"]),
        (["DATA", "-o", "task.txt"], 2, ["task.txt", ".yaml"]),
        (["DATA", "-o", "OWN"], 2, ["exists", "--overwrite"]),
        (["DATA", "-o", "new.yaml", "--task", "OWN"], 2, ["leave out one"]),
        (["DATA", "--task", "OWN"], 2, ["unknown key 'clases'; did you mean 'classes'?"]),
        (["DATA", "--task", "abdomen"], 2, ["task 'abdomen' is neither", "did you mean 'abdomen_"]),
        (["DATA", "--task", "no.yaml"], 1, ["task file 'no.yaml' does not exist"]),
        (["DATA", "--backbone", "vit_x"], 2, ["unknown backbone 'vit_x'"]),
    ],
)
def test_refusals(
    args: list[str], code: int, words: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("clases: [background, liver]\n")
    paths = {"DATA": place, "OWN": own}
    texts = [str(paths.get(arg, arg.replace("NOWHERE", str(tmp_path / "NOWHERE")))) for arg in args]
    found, out, err = samda(capsys, "check", *texts)
    assert (found, out) == (code, "")
    assert err.startswith("samda check: ") and len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert own.read_text("utf-8") == "clases: [background, liver]\n"


def test_train_refuses_a_wrong_key_before_it_begins(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = samda(capsys, "train", "-d", place, "-o", tmp_path / "m", "--set", "epoch=3")
    assert (code, out) == (2, "")
    assert err == ("samda train: config key 'epoch' is unknown; did you mean 'epochs'? (see samda train --help)\n")
    assert not (tmp_path / "m").exists()
