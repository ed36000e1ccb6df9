# SPDX-License-Identifier: Apache-2.0
"""`--report`: what it says is what happened, also when the job fails."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from samda.adaptation.engine import Adaptation
from samda.cli import main as cli
from samda.cli.run_report import RunReport, outcome_of
from samda.errors import InputError, UsageError
from samda.models.folder import load_model

TASK = {"name": "cube", "classes": ["background", "cube"], "spacing": 2.0, "image_size": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two cases, named as nobody should read in a report, and a model trained with `--report`."""
    place = tmp_path_factory.mktemp("cubes")
    cases = []
    for seed, name in enumerate(("jane_doe", "john_roe")):
        label = np.zeros((30, 34, 6), np.uint8)
        label[8 + seed : 18, 10:20, 1:5] = 1
        image = np.random.default_rng(seed).normal(0, 5, label.shape) + 150 * label
        for kind, array in (("image", image.astype(np.int16)), ("label", label)):
            nib.Nifti1Image(array, np.diag([2.0, 2.0, 5.0, 1.0])).to_filename(place / f"{name}_{kind}.nii.gz")
        cases.append({"id": name, "image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz"})
    (place / "dataset.json").write_text(json.dumps({"training": cases}))
    (place / "cube.yaml").write_text(yaml.safe_dump(TASK))
    train = ["train", "-d", place / "dataset.json", "-o", place / "model", "--task", place / "cube.yaml", "--quiet"]
    more = ["--epochs", "1", "--set", "views=1", "--tracking", "none", "--report", place / "train.json", "--profile"]
    assert cli.main([*map(str, train), "--head", "sam", *map(str, more)]) == 0
    return place


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path, *hidden: str) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    for name in ("jane", "john", *hidden):
        assert name not in text, "no names"
    return json.loads(text)


def test_train(place: Path) -> None:
    found = read(place / "train.json", str(place))
    assert (found["command"], found["exit_code"], found["exit_reason"], found["error"]) == ("train", 0, "done", None)
    expected = {
        (sha256(place / f"{name}_image.nii.gz"), sha256(place / f"{name}_label.nii.gz"))
        for name in ("jane_doe", "john_roe")
    }
    assert {(entry["input_sha256"], entry["label_sha256"]) for entry in found["inputs"]} == expected
    assert all(entry["case_id"] == f"case-{entry['input_sha256'][:12]}" for entry in found["inputs"])
    assert found["config"]["task"] == [{"file": "cube.yaml", "sha256": sha256(place / "cube.yaml")}]
    assert found["config"]["epochs"] == 1 and found["config"]["set"] == ["views=1"]
    assert found["result"]["epochs"] == 1 and found["result"]["parameters"]["sam_da"] == 395_522
    seconds = found["seconds"]
    assert 0 < seconds["encode"] < seconds["train"] < seconds["total"]
    assert seconds["import"] + seconds["hash"] + seconds["train"] <= seconds["total"] + 0.01
    assert found["peak_memory_mb"]["rss"] > 100
    assert found["versions"]["samda"] and found["versions"]["torch"]


def shares(found: dict[str, Any], shown: str) -> set[str]:
    """Names of the phases of a report, which are those that were shown; their times are within the whole."""
    lines = [line.split() for line in shown.splitlines() if line.endswith(" %")]
    assert [" ".join(words[:-4]) for words in lines] == [*found["profile"], "everything else", "total"]
    seconds = [float(words[-4]) for words in lines]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.1)
    assert sum(found["profile"].values()) <= found["seconds"]["total"] + 0.1
    return set(found["profile"])


def test_profiles_tell_where_the_time_went(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trained = set(json.loads((place / "train.json").read_text("utf-8"))["profile"])
    common = {"imports", "reading", "preprocessing", "encoding", "head", "writing"}
    assert trained == common | {"gradient steps"}
    job = ["-m", place / "model", "-i", place / "jane_doe_image.nii.gz", "-o", tmp_path / "out", "--profile"]
    assert cli.main([*map(str, ["predict", *job, "--report", tmp_path / "run.json"])]) == 0
    assert shares(json.loads((tmp_path / "run.json").read_text("utf-8")), capsys.readouterr().err) == common | {
        "loading"
    }
    assert cli.main(["predict", *map(str, job[:-1])]) == 0 and " %" not in capsys.readouterr().err
    assert cli.main(["adapt", *map(str, job), "--overwrite"]) == 0
    assert common <= set(re.findall(r"^([a-z ]+?) +\d", capsys.readouterr().err, re.MULTILINE))


def test_predict_names_model_and_inputs_as_adapt_does(place: Path, tmp_path: Path) -> None:
    predict = ["predict", "-m", place / "model", "-i", place / "dataset.json", "--section", "training"]
    command = [*predict, "-o", tmp_path / "out", "--report", tmp_path / "run.json"]
    assert cli.main([str(part) for part in command]) == 0
    found = read(tmp_path / "run.json", str(place), str(tmp_path))
    assert [entry["outcome"] in ("done", "empty") for entry in found["inputs"]] == [True, True]
    assert sum(entry["seconds"] for entry in found["inputs"]) == pytest.approx(found["seconds"]["predict"], abs=0.2)
    network, task, record = load_model(place / "model")
    hashes = Adaptation(network, task, record).hashes
    assert {key: found[key] for key in hashes} == hashes
    assert found["task"] == task.to_dict() and found["model_version"] == "source"
    assert json.loads((place / "train.json").read_text("utf-8"))["adapter_sha256"] == hashes["adapter_sha256"]


def test_a_case_that_fails_is_in_the_report(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "scans").mkdir()
    shutil.copy(place / "jane_doe_image.nii.gz", tmp_path / "scans" / "jane_doe.nii.gz")
    (tmp_path / "scans" / "john_roe.nii.gz").write_bytes(b"no scan")
    command = ["predict", "-m", place / "model", "-i", tmp_path / "scans", "-o", tmp_path / "out"]
    assert cli.main([str(part) for part in (*command, "--report", tmp_path / "run.json")]) == 1
    found = read(tmp_path / "run.json", str(tmp_path))
    assert (found["exit_code"], found["exit_reason"]) == (1, "failed")
    broken = f"case-{hashlib.sha256(b'no scan').hexdigest()[:12]}"
    assert found["error"] == f"1 of 2 cases failed: {broken}"
    outcomes = {entry["case_id"]: entry["outcome"] for entry in found["inputs"]}
    assert broken in outcomes and outcomes[broken] not in ("done", "empty") and len(outcomes) == 2
    assert "1 of 2 cases failed: john_roe" in capsys.readouterr().err, "the person at the screen sees the name"


def test_evaluate(place: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name in ("jane_doe", "john_roe"):
        shutil.copy(place / f"{name}_label.nii.gz", tmp_path / "maps" / f"{name}.nii.gz")
    evaluate = ["evaluate", "--task", place / "cube.yaml", "-i", tmp_path / "maps", "-l", place / "dataset.json"]
    command = [*evaluate, "-o", tmp_path / "scores", "--report", tmp_path / "run.json"]
    assert cli.main([str(part) for part in command]) == 0
    found = read(tmp_path / "run.json")
    assert [entry["outcome"] for entry in found["inputs"]] == ["done", "done"]
    assert found["inputs"][0]["label_sha256"] == sha256(place / "jane_doe_label.nii.gz")
    dice = found["result"]["classes"]["cube"]["dice"]
    assert (dice["mean"], dice["n"]) == (1.0, 2)


@pytest.mark.parametrize(
    ("change", "code", "reason", "words"),
    [
        (["--set", "epoch=3"], 2, "usage", "'epoch' is unknown"),
        (["--task", "nothing.yaml"], 1, "failed", "does not exist"),
    ],
)
def test_a_job_that_fails_says_so(
    place: Path, tmp_path: Path, change: list[str], code: int, reason: str, words: str
) -> None:
    command = ["train", "-d", place / "dataset.json", "-o", tmp_path / "m", "--report", tmp_path / "run.json", *change]
    assert cli.main([str(part) for part in command]) == code
    found = read(tmp_path / "run.json")
    assert (found["exit_code"], found["exit_reason"]) == (code, reason)
    assert found["inputs"] == [] and "hash" not in found["seconds"]  # no scan was read for that
    assert words in found["error"] and "\n" not in found["error"] and found["seconds"]["total"] >= 0


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cases = [(tmp_path, "is a folder")]
    cases += [(Path("/proc/run.json"), "cannot be written")] if sys.platform == "linux" else []
    for where, words in cases:
        command = ["train", "-d", place / "dataset.json", "-o", tmp_path / "m", "--report", where]
        assert cli.main([str(part) for part in command]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_a_report_that_fails_in_the_end_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = tmp_path / "lost"
    lost.mkdir()
    finished = RunReport._write

    def write(report: RunReport, error: BaseException | None) -> None:
        shutil.rmtree(lost)
        lost.write_text("a file has taken the folder's place")
        finished(report, error)

    monkeypatch.setattr(RunReport, "_write", write)
    image = ["predict", "-m", place / "model", "-i", place / "jane_doe_image.nii.gz", "-o", tmp_path / "out"]
    assert cli.main([*map(str, image), "--quiet", "--report", str(lost / "run.json")]) == 1
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("samda predict: ") and last.endswith("written: File exists")
    assert (tmp_path / "out").is_dir() and any((tmp_path / "out").iterdir())


def test_quiet_prints_the_result_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    predict = ["predict", "-m", place / "model", "-i", place / "john_roe_image.nii.gz", "-o", tmp_path / "out"]
    assert cli.main([str(part) for part in (*predict, "--quiet", "--json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 0
    assert all("no foreground found" in line for line in err.splitlines()), "a warning may stay"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, (0, "done", None)),
        (KeyboardInterrupt(), (130, "interrupted", None)),
        (UsageError("a"), (2, "usage", "a")),
        (InputError("a\n b"), (1, "failed", "a b")),
        (MemoryError("x"), (1, "out of memory", "unexpected MemoryError: x")),
        (ZeroDivisionError("x"), (1, "unexpected", "unexpected ZeroDivisionError: x")),
    ],
)
def test_how_a_run_can_end(error: BaseException | None, expected: tuple) -> None:
    assert outcome_of(error) == expected
