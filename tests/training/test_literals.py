# SPDX-License-Identifier: Apache-2.0
"""Names of a stranger's data set in MONAI's configs, and adapter files: nothing in them is evaluated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from safetensors.torch import load_file

from samda.errors import UsageError
from samda.models.folder import load_model
from samda.task import Task
from samda.training import train
from samda.training.literals import decoded, literal

MARK = "SAMDA_MARK"
CODE = f"$__import__('pathlib').Path('{MARK}').touch()"
NAMES = [
    CODE,
    "$import os",
    "@output_dir",
    "%train.json",
    "a#b",
    "50%::x",
    "@::y",
    "'\"\\{}",
    "_target_",
    "%",
    "$",
    "é",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_means_itself_in_a_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"text": name, "list": [name, {"inner": name}], "keys": {name: [1], "b": name}}
    parser = ConfigParser({"x": json.loads(json.dumps(literal(values))), "output_dir": "wrong"})
    parser.resolve_macro_and_relative_ids()
    assert parser.get_parsed_content("x::text") == name
    assert parser.get_parsed_content("x") == values
    assert decoded(literal(values)) == values
    assert not Path(MARK).exists()


@pytest.mark.parametrize("values", [{"a": [1, "b", None], "c": 2.5}, "liver 5 % @ 3 mm", {"left lung": [1]}])
def test_plain_values_stay_as_they_are(values: Any) -> None:
    assert literal(values) == values


def test_hostile_names_everywhere_in_a_model_folder(
    datalist: Path, tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class names, task name and folders that MONAI would evaluate: the bundle loads, and predicts by its command."""
    place = tmp_path / "$x#1"
    place.mkdir()
    monkeypatch.chdir(place)
    shutil.copy(keys["weights"], "%w.pth")
    classes = ("background", CODE, "_target_")
    labels = {CODE: (1,), "_target_": (2,)}
    task = Task(name="%" + CODE, classes=classes, labels=labels, spacing=4.0, image_size=64, keep_largest=(CODE,))
    train(datalist, "@model", task, overrides=keys | {"epochs": 1, "weights": Path("%w.pth")})
    assert load_model("@model", weights="%w.pth")[1] == task
    for job in ("train", "inference"):
        workflow = ConfigWorkflow(
            str(Path("@model/configs").resolve() / f"{job}.json"),
            workflow_type="train" if job == "train" else "infer",
            logging_file=False,
            bundle_root=literal(str(Path("@model").resolve())),
            weights=literal("%w.pth"),
            dataset_dir=str(datalist),
        )
        workflow.initialize()
        assert workflow.channel_def == dict(zip("012", classes, strict=True))
        assert workflow.parser.get_parsed_content("_meta_::name").startswith("%" + CODE)
        assert workflow.parser.get_parsed_content("task_def") == task
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(datalist.parent / "d.nii.gz"), "--output_dir", "out", "--weights", "../w.pth"]
    Path("%w.pth").rename("w.pth")
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd="@model", capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr
    assert nib.load("@model/out/d.nii.gz").shape == nib.load(datalist.parent / "d.nii.gz").shape
    assert set(load_file("@model/adapter.safetensors"))
    assert not [*tmp_path.rglob(MARK)] and not [*datalist.parent.rglob(MARK)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'adapters: {{salt: {{}}}}\nlearning_rate: "{CODE}"\n', "__import__"),
        ("adapters: {salt: {rank: '@seed'}}\n", "'@seed'"),
        ("adapters: {salt: {}}\nweights: '%other.json'\n", "'%other.json'"),
        ("adapters: {salt: {_target_: os.getcwd}}\n", "'_target_'"),
        ("adapters: {salt: {}}\ntrain::loss::_target_: os.getcwd\n", "_target_"),
        ("adapters: {salt: {}}\ntrain#loss#_target_: os.getcwd\n", "_target_"),
        ("adapters: {salt: {}}\noutput_dir: /elsewhere\n", "'output_dir'"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_an_adapter_file_is_data(
    datalist: Path, tmp_path: Path, keys: dict[str, Any], text: str, words: str, suffix: str
) -> None:
    from samda.io import load_yaml

    file = tmp_path / f"own{suffix}"
    file.write_text(text if suffix == ".yaml" else json.dumps(load_yaml(text)))
    with pytest.raises(UsageError) as error:
        train(datalist, tmp_path / "model", Task(), adapters=file, overrides=keys)
    assert str(file) in str(error.value) and words in str(error.value)
    assert not Path(MARK).exists()
