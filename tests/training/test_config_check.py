# SPDX-License-Identifier: Apache-2.0
"""Wrong keys and values are refused; names of a stranger's data set and adapter files are not evaluated."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from safetensors.torch import load_file

from samda.errors import AdapterError, UsageError, WeightsError
from samda.models.folder import load_model
from samda.task import Task
from samda.training import check_config, train
from samda.training.config_check import decoded, literal

OWN = {"type": "vit", "name": "own", "embed_dim": 8, "depth": 1, "num_heads": 1, "global_blocks": [0]}
REFERENCE: dict[str, Any] = {
    "epochs": 10,
    "rate": 0.1,
    "learning_rate": 0.01,
    "head_learning_rate": 0.01,
    "validation_fraction": 0.2,
    "fold": None,
    "image_size": None,
    "spacing": None,
    "backbone": "vit_t",
    "weights": "pretrained",
    "patience": 5,
    "seed": 0,
    "weight_decay": 0.1,
    "regularization": 0.0,
    "amp": True,
    "task": None,
    "name": "x",
    "device": "$torch.device('cpu')",
    "adapters": {"sam_da": {}},
    "warmup": 0.05,
    "empty_share": 0.1,
    "augmentation": 1.0,
    "train": {
        "sampler": {"_target_": "samda.training.SliceSampler", "foreground": "@f"},
        "augmentation": {"_target_": "samda.data.transforms.build_augmentation", "task": "@task_def"},
        "dataloader": {"_target_": "monai.data.DataLoader", "dataset": "@train::dataset", "num_workers": 2},
        "loss": {"_target_": "samda.training.DiceCELoss", "softmax": True, "batch": True},
        "handlers": [],
    },
}


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 3},
        {"rate": 1},
        {"epochs": 1, "patience": 0, "weight_decay": 0},
        {"epochs": "$2 * 5"},
        {"task": {"classes": ["background", "b"]}, "image_size": 64, "spacing": 2},
        {"task": {"classes": "$@names"}, "backbone": "@chosen", "weights": "$@bundle_root + '/base.pth'"},
        {"adapters": {"salt": {"rank": 4}, "wide": {"type": "lka"}}},
        {"adapters": {"salt": {"rank": "$2 + 2"}}},
        {"backbone": OWN, "weights": None},
        {"backbone": OWN, "weights": "@chosen"},
        {"head_learning_rate": None, "warmup": 0, "empty_share": 0.99, "augmentation": 0},
        {"adapters": {"full": {}}},
        {"train": {"augmentation": None, "loss": "@own_loss"}},
        {"train": {"dataloader": {"_target_": "monai.data.DataLoader", "pin_memory": True, "drop_last": True}}},
        {"train": {"loss": {"_target_": "DiceFocalLoss", "softmax": True, "lambda_focal": 0.5}}},
        {"train": {"loss": {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1}}},
        {"train": {"loss": {"_target_": "$@chosen", "softmax": True, "anything": 1}}},
        {"learning_rate": 1, "head_learning_rate": 0, "validation_fraction": 0.5, "fold": 0, "weights": __file__},
        {"learning_rate": "$1e-3", "fold": "@rank"},
        {"device": "cpu"},
        {"_meta_": {}, "tracking_uri": "sqlite:///x"},
        {"train": {"sampler": {"_target_": "samda.training.SliceSampler", "seed": 3}}},
    ],
)
def test_valid_configs_pass(change: dict[str, Any]) -> None:
    check_config(REFERENCE | change, REFERENCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "config key 'epoch' is unknown; did you mean 'epochs'?"),
        ({"train": {"samplr": {}}}, "config key 'train::samplr' is unknown; did you mean 'sampler'?"),
        (
            {"train": {"sampler": {"_target_": "samda.training.SliceSampler", "empty_shar": 0.3}}},
            "config key 'train::sampler::empty_shar' is unknown; did you mean 'empty_share'?",
        ),
        (
            {"train": {"dataloader": {"_target_": "monai.data.DataLoader", "num_workrs": 1}}},
            "config key 'train::dataloader::num_workrs' is unknown; did you mean 'num_workers'?",
        ),
        (
            {"train": {"loss": {"_target_": "DiceFocalLoss", "sotfmax": True}}},
            "config key 'train::loss::sotfmax' is unknown; did you mean 'softmax'?",
        ),
        (
            {"train": {"loss": {"_target_": "DiceFocalLos"}}},
            "config key 'train::loss::_target_': there is no component 'DiceFocalLos'; "
            "give a class or function of MONAI, or its full path",
        ),
        ({"train": {"loss": {"_target_": 5}}}, "config key 'train::loss::_target_' must be text, got 5"),
        *[
            (
                {"train": {"loss": value}},
                f"config key 'train::loss' must be a mapping with _target_, got {value!r}; "
                "or set its keys, train::loss::KEY",
            )
            for value in (5, None, "dice", {"softmax": True})
        ],
        ({"warmup": 1}, "config key 'warmup' must be at least 0 and below 1, got 1"),
        ({"warmup": math.nan}, "config key 'warmup' must be at least 0 and below 1, got nan"),
        ({"empty_share": -0.1}, "config key 'empty_share' must be at least 0 and below 1, got -0.1"),
        ({"augmentation": -1}, "config key 'augmentation' must be at least 0, got -1"),
        ({"augmentation": math.nan}, "config key 'augmentation' must be at least 0, got nan"),
        ({"augmentation": math.inf}, "config key 'augmentation' must be at least 0, got inf"),
        ({"backbone": OWN}, "no published weights for backbone 'own'; give a file, or weights=None"),
        ({"epochs": True}, "config key 'epochs' must be a whole number, got True"),
        ({"epochs": 1.5}, "config key 'epochs' must be a whole number, got 1.5"),
        ({"rate": "fast"}, "config key 'rate' must be a number, got 'fast'"),
        ({"amp": "false"}, "config key 'amp' must be true or false, got 'false'"),
        ({"adapters": ["salt"]}, "config key 'adapters' must be a mapping, got ['salt']"),
        ({"name": 3}, "config key 'name' must be text, got 3"),
        ({"epochs": 0}, "config key 'epochs' must be at least 1, got 0"),
        ({"seed": 2**63}, f"config key 'seed' must be at least 0 and at most {2**63 - 1}, got {2**63}"),
        ({"patience": -1}, "config key 'patience' must be at least 0, got -1"),
        ({"weight_decay": math.nan}, "config key 'weight_decay' must be at least 0, got nan"),
        ({"weight_decay": math.inf}, "config key 'weight_decay' must be at least 0, got inf"),
        ({"regularization": -0.1}, "config key 'regularization' must be at least 0, got -0.1"),
        ({"learning_rate": 0}, "config key 'learning_rate' must be above 0, got 0"),
        ({"learning_rate": math.nan}, "config key 'learning_rate' must be above 0, got nan"),
        ({"learning_rate": math.inf}, "config key 'learning_rate' must be above 0, got inf"),
        ({"head_learning_rate": -1}, "config key 'head_learning_rate' must be at least 0, got -1"),
        ({"validation_fraction": 0.6}, "config key 'validation_fraction' must be above 0 and at most 0.5, got 0.6"),
        ({"fold": -1}, "config key 'fold' must be at least 0, got -1"),
        ({"fold": "a"}, "config key 'fold' must be a whole number, got 'a'"),
        ({"spacing": "wide"}, "config key 'spacing' must be a number, got 'wide'"),
        (
            {"image_size": 17},
            "task 'segmentation': image_size must be a multiple of 16 from 16 to 4096, got 17",
        ),
        ({"task": "no.yaml"}, "there is no task file 'no.yaml'; give a YAML or JSON file with the classes"),
        ({"task": {"clases": []}}, "task: unknown key 'clases'; did you mean 'classes'?"),
        ({"backbone": "vit_x"}, "unknown backbone 'vit_x'; did you mean 'vit_t'?"),
        ({"backbone": {"type": "resnet"}}, "backbone type 'resnet' is unknown; choose from tiny_vit, vit"),
        ({"adapters": {"slat": {}}}, "there is no adapter 'slat'; did you mean 'salt'?"),
        ({"adapters": {"salt": {"rnk": 2}}}, "adapter 'salt': unknown key 'rnk'; did you mean 'rank'?"),
    ],
)
def test_wrong_keys_and_types_are_refused_by_their_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_config(REFERENCE | change, REFERENCE)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"full": {}, "salt": {}}, "'full' trains the base weights that 'salt' builds on; attach only one of them"),
        ({"a.b": {"type": "salt"}}, "adapter name 'a.b' cannot be used; choose letters, digits and underscores"),
    ],
)
def test_adapters_that_no_network_takes(adapters: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as error:
        check_config(REFERENCE | {"adapters": adapters}, REFERENCE)
    assert str(error.value) == message


def test_weights_that_the_network_does_not_take_are_not_looked_for() -> None:
    """MONAI's `load(net_override={"weights": ...})` sets those of the network itself."""
    reference = REFERENCE | {
        "network_def": {"_target_": "samda.networks.segmenter.SamSegmenter", "weights": "@weights"}
    }
    with pytest.raises(UsageError, match="no published weights for backbone 'own'"):
        check_config(reference | {"backbone": OWN}, reference)
    own = {"backbone": OWN, "network_def": reference["network_def"] | {"weights": "base.pth"}}
    check_config(reference | own, reference)


def test_weights_must_exist_when_a_path_names_them() -> None:
    with pytest.raises(WeightsError, match=r"there is no weights file no\.pth; give its path"):
        check_config(REFERENCE | {"weights": "no.pth"}, REFERENCE)
    with pytest.raises(WeightsError, match=r"there is no weights file no\.pth"):  # as adapt.json has it
        check_config({"weights": "no.pth"}, {"weights": None})


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
