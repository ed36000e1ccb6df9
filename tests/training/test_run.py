# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from safetensors.torch import load_file, save_file
from tiny_scans import TASK, write_case

from samda.data.slices import SliceGrid
from samda.data.transforms import build_preprocessing
from samda.errors import AdapterError, InputError, UsageError, WeightsError
from samda.inference.volume import VolumeInferer
from samda.io import packaged
from samda.models.folder import load_model
from samda.networks.weights import read_state
from samda.task import Task
from samda.training import Progress, train
from samda.training.config_check import literal
from samda.training.run import find_overlay

Keys = dict[str, Any]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def curve(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "history.json").read_text("utf-8"))["epochs"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal tensors; "_extra_state" of a state dict is the answer of the base, which a model file lacks."""
    keys = a.keys() - {"_extra_state"}
    return keys == b.keys() - {"_extra_state"} and all(torch.equal(a[key], b[key]) for key in keys)


def test_a_training_writes_a_model_that_loads(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    result = train(datalist, tmp_path / "model", Task.from_dict(TASK), overrides=keys, head="sam")
    assert result["epochs"] == 2 and 0 <= result["mean_dice"] <= 1
    assert result["parameters"]["sam_da"] == 395_522
    assert result["embeddings"]["views"] == 2
    network, task, record = load_model(tmp_path / "model", weights=keys["weights"])
    assert task == Task.from_dict(TASK)
    assert record["metrics"]["mean_dice"] == result["mean_dice"]
    statistics = record["statistics"]
    assert (statistics["cases"], statistics["slices"], statistics["classes"]["liver"]["slices"]) == (2, 16, 12)
    rows = [row for layer in statistics["features"] for key in ("mean", "std") for row in layer[key]]
    assert [len(row) for row in rows] == [256] * (2 * 2 * task.num_classes)
    assert statistics["classes"]["liver"]["area_mm2"][3] == pytest.approx(80 * 4.2 * 3.9, rel=0.15)  # 8 x 10 voxels
    assert record["training"]["cases"] == {"training": 2, "validation": 1}
    assert same(dict(network.state_dict()), tensors(tmp_path / "model"))


def test_a_training_with_context_is_saved_and_predicts_with_it(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    task = Task.from_dict(TASK | {"context": 1, "keep_largest": ["liver"]})
    train(datalist, tmp_path / "model", task, overrides=keys)
    network, loaded, record = load_model(tmp_path / "model", weights=keys["weights"])
    assert loaded == task and network.in_channels == 3
    assert (record["statistics"]["slices"], len(record["statistics"]["body"]["intensity"])) == (16, 1)
    metadata = json.loads((tmp_path / "model" / "configs" / "metadata.json").read_text("utf-8"))
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 1, "the scan has one channel"
    data = build_preprocessing(task, labels=False)({"image": str(datalist.parent / "d.nii.gz")})
    grid = SliceGrid.from_volume(data["image"], data["image"].affine, task)
    plain = grid.extract(data["image"], range(8))[:, 0]
    stacked = torch.stack([plain[[max(i - 1, 0), i, min(i + 1, 7)]] for i in range(8)])
    with torch.no_grad():
        expected = grid.restore(network(stacked).softmax(1))
    inferer = VolumeInferer(task, output="probabilities", batch_size=3, amp="off")
    torch.testing.assert_close(inferer(data["image"][None], network)[0].as_tensor(), expected, rtol=1e-4, atol=1e-5)
    shutil.rmtree(tmp_path / "model")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(datalist, tmp_path / name, TASK, overrides=keys | {"seed": seed})
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert not same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added in the same order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_and_resumed_equals_uninterrupted(datalist: Path, tmp_path: Path, keys: Keys, one_thread: None) -> None:
    """`kill -9` in mid-training, then resume: parameters and curve equal those of a run that was never stopped."""
    keys |= {"epochs": 6}
    code = f"""
import time, torch
torch.set_num_threads(1)
from samda.training import Progress, train
show = Progress.show
def slow(self, engine):  # leave the killer time between two epochs
    show(self, engine)
    time.sleep(0.5)
Progress.show = slow
train({str(datalist)!r}, {str(tmp_path / "parts")!r}, {TASK!r}, overrides={keys!r})
"""
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    train(datalist, tmp_path / "whole", TASK, overrides=keys)
    until = time.monotonic() + 120
    while not (tmp_path / "parts" / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.7)  # into a later epoch
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 1 <= len(curve(tmp_path / "parts")) < 6 and not (tmp_path / "parts" / "adapter.safetensors").exists()
    train(datalist, tmp_path / "parts", TASK, overrides=keys, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_resuming_continues_augmentation_and_dropout(
    datalist: Path, tmp_path: Path, keys: Keys, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images instead of embeddings, dropout in the adapters, an error in the third epoch."""
    adapters = {"lka": {"act": "both", "dropout": 0.5}}
    train(datalist, tmp_path / "whole", TASK, adapters, overrides=keys | {"epochs": 4})
    show = Progress.show

    def fail(self: Progress, engine: Engine) -> None:
        show(self, engine)
        if engine.state.epoch == 3:
            raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", fail)
        with pytest.raises(MemoryError, match="no memory left"):
            train(datalist, tmp_path / "parts", TASK, adapters, overrides=keys | {"epochs": 4})
    train(datalist, tmp_path / "parts", TASK, adapters, overrides=keys | {"epochs": 4}, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_the_best_parameters_are_the_ones_that_are_saved(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    """A learning rate that destroys what was learned: the model folder holds the best epoch, not the last."""
    result = train(
        datalist, tmp_path / "model", TASK, overrides=keys | {"epochs": 8, "learning_rate": 0.02, "patience": 0}
    )
    scores = [row["mean_dice"] for row in curve(tmp_path / "model")]
    assert result["best_epoch"] == scores.index(max(scores)) + 1
    last = torch.load(tmp_path / "model" / "last.pt", weights_only=True)
    assert same(tensors(tmp_path / "model"), last["record"]["best_state"])
    assert same(tensors(tmp_path / "model"), torch.load(tmp_path / "model" / "models" / "model.pt", weights_only=True))


def test_a_single_patient_validates_on_blocks_of_its_slices(tmp_path: Path, keys: Keys) -> None:
    case = write_case(tmp_path, "a", shape=(40, 36, 20))
    (tmp_path / "one.json").write_text(json.dumps({"training": [case]}))
    result = train(tmp_path / "one.json", tmp_path / "model", TASK, overrides=keys)
    assert "one patient only: 4 axial slices" in result["split"]
    assert result["embeddings"]["slices"] == 16


def test_adapters_by_overlay_are_taken_together(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    result = train(datalist, tmp_path / "model", TASK, adapters=["lka", "sam_da"], overrides=keys | {"epochs": 1})
    assert [name for name in result["parameters"] if name in ("lka", "sam_da")] == ["lka", "sam_da"]
    assert result["embeddings"] is None  # LKA changes the encoder


def test_the_penalty_of_salt_is_a_setting(datalist: Path, tmp_path: Path, keys: Keys, one_thread: None) -> None:
    """Weight 0 is the training without it; another weight holds what SALT changes back."""
    found = {}
    for name, further in {"default": {}, "zero": {"regularization": 0}, "strong": {"regularization": 10.0}}.items():
        train(datalist, tmp_path / name, TASK, {"salt": {"rank": 4}}, overrides=keys | further)
        found[name] = tensors(tmp_path / name)
    assert same(found["default"], found["zero"])
    assert not same(found["default"], found["strong"])
    changes = {
        name: sum(v.norm() for key, v in values.items() if key.endswith(".shift")) for name, values in found.items()
    }
    assert 0 < changes["strong"] < changes["zero"]
    with pytest.raises(UsageError, match=r"regularization 1\.0"):
        train(datalist, tmp_path / "none", TASK, overrides=keys | {"regularization": 1.0})


def test_the_base_weights_are_copied_when_asked_for(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    train(datalist, tmp_path / "plain", TASK, overrides=keys | {"epochs": 1})
    assert not (tmp_path / "plain" / "base.safetensors").exists()
    train(datalist, tmp_path / "whole", TASK, overrides=keys | {"epochs": 1}, with_base=True)
    a, _, _ = load_model(tmp_path / "whole")
    b, _, _ = load_model(tmp_path / "plain", weights=keys["weights"])
    assert same(dict(a.state_dict()), dict(b.state_dict()))


def test_overlays_that_disagree_need_a_word(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    with pytest.raises(UsageError, match="the overlays disagree on 'learning_rate'"):
        train(datalist, tmp_path / "model", TASK, adapters=["decoder", "dka"], overrides=keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adapters: [", "YAML or JSON"),
        ("", "must hold a mapping with the key `adapters`"),
        ("- salt\n", "must hold a mapping with the key `adapters`"),
        ("adapters: salt\n", "must hold a mapping with the key `adapters`"),
        (
            "adapters: {}\nvalidation_fraction: 9e-1\n",
            "config key 'validation_fraction' must be above 0 and at most 0.5, got 0.9",
        ),
        ("adapters: {salt: {}, salt: {}}\n", "key 'salt'"),
    ],
)
def test_overlays_that_are_none(datalist: Path, tmp_path: Path, keys: Keys, text: str, words: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        train(datalist, tmp_path / "model", TASK, adapters=tmp_path / "own.yaml", overrides=keys)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "own.yaml" in str(error.value) or "config key" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "config key 'epoch' is unknown; did you mean 'epochs'?"),
        ({"epochs": "many"}, "config key 'epochs' must be a whole number, got 'many'"),
        ({"train::loss::batches": True}, "config key 'train::loss::batches' is unknown; did you mean 'batch'?"),
        ({"train::lss::batch": True}, "config key 'train::lss' is unknown; did you mean 'loss'?"),
        ({"resume": True}, "override 'resume' is an argument of its own; give it there"),
        (
            {"tensorboard": False},
            "override 'tensorboard' is not taken; give tracking='none' (--tracking none) for false",
        ),
        ({"dataset_dir": "x"}, "override 'dataset_dir' is not taken; give dataset (--data)"),
        ({"epochs::x": 3}, "config key 'epochs::x' has no place in the config; set the key above it as a whole"),
        (
            {"train::handlers::99::x": 1},
            "config key 'train::handlers::99::x' has no place in the config; set the key above it as a whole",
        ),
    ],
)
def test_wrong_keys_are_refused_before_any_work(
    datalist: Path, tmp_path: Path, keys: Keys, change: Keys, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        train(datalist, tmp_path / "model", TASK, overrides=keys | change)
    assert str(error.value) == message
    assert not (tmp_path / "model").exists()


def test_wrong_names_are_refused_with_the_nearest(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    with pytest.raises(UsageError, match=r"no adapter overlay 'flagshp'; did you mean 'flagship'"):
        train(datalist, tmp_path / "model", TASK, adapters="flagshp", overrides=keys)
    with pytest.raises(UsageError, match="there is no adapter 'slat'; did you mean 'salt'"):
        train(datalist, tmp_path / "model", TASK, adapters={"slat": {}}, overrides=keys)
    with pytest.raises(UsageError, match=r"there is no task file 'nowhere.yaml'"):
        train(datalist, tmp_path / "model", "nowhere.yaml", overrides=keys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": 5}, "adapters must be names, files or a mapping of name to settings, got 5"),
        ({"adapters": [5]}, "adapters must be names, files or a mapping of name to settings, got [5]"),
        ({"tracking": None}, "tracking must be names of trackers or 'none', got None"),
    ],
)
def test_arguments_of_another_type_are_refused(tmp_path: Path, arguments: Keys, message: str) -> None:
    with pytest.raises(UsageError) as error:
        train(tmp_path / "none", tmp_path / "model", TASK, **arguments)
    assert str(error.value) == message


def test_null_and_arguments_that_a_component_passes_on(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    keys |= {"epochs": 1, "weights": None, "train::dataloader::drop_last": True}
    keys |= {"train::loss": {"_target_": "DiceFocalLoss", "softmax": True, "to_onehot_y": True}}
    for rate, share in ((None, 10 / 3), (0, 1)):  # what suits the head, and the rate of the adapters
        changes = {"head_learning_rate": rate, "learning_rate": 0.003}
        train(datalist, tmp_path / "model", TASK, overrides=keys | changes, head="sam", overwrite=True)
        rates = curve(tmp_path / "model")[0]["learning_rate"]
        assert rates["head"] == pytest.approx(share * rates["adapters"])


def test_numbers_of_numpy_and_paths_are_taken(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    shutil.copyfile(keys["weights"], tmp_path / "base#1.pth")
    keys |= {"epochs": np.int64(1), "amp": np.True_, "weights": tmp_path / "base#1.pth", "learning_rate": np.float32(1)}
    sizes = {key: np.int64(v) if type(v) is int else v for key, v in dict(keys["backbone"]).items()}
    keys |= {"fold": np.int64(0), "image_size": np.int64(48), "spacing": np.float32(5), "backbone": sizes}
    result = train(datalist, tmp_path / "model", TASK, {"lora": {"rank": np.int64(3)}}, overrides=keys)
    config = json.loads((tmp_path / "model" / "adapter.json").read_text("utf-8"))
    assert (result["epochs"], config["task"]["image_size"], config["task"]["spacing"]) == (1, 48, 5.0)
    assert config["adapters"]["lora"]["rank"] == 3


def test_labels_without_foreground_end_in_one_line(tmp_path: Path, keys: Keys) -> None:
    cases = [write_case(tmp_path, name, empty=True) for name in "ab"]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    with pytest.raises(InputError) as error:
        train(tmp_path / "list.json", tmp_path / "model", TASK, overrides=keys)
    assert "labels hold no foreground (liver, spleen)" in str(error.value) and "\n" not in str(error.value)


def test_a_finished_training_is_not_overwritten_by_chance(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    train(datalist, tmp_path / "model", TASK, overrides=keys)
    before = tensors(tmp_path / "model")
    with pytest.raises(UsageError, match="already holds a training"):
        train(datalist, tmp_path / "model", TASK, overrides=keys | {"seed": 1})
    with pytest.raises(UsageError, match="resume: seed was 0 and is now 1"):  # before the data are read
        train(tmp_path / "gone.json", tmp_path / "model", TASK, overrides=keys | {"seed": 1}, resume=True)
    assert same(before, tensors(tmp_path / "model"))
    train(datalist, tmp_path / "model", TASK, overrides=keys | {"seed": 1}, overwrite=True)
    assert not same(before, tensors(tmp_path / "model"))


def test_a_copy_without_the_hidden_folder_goes_on_but_is_not_overwritten(
    datalist: Path, tmp_path: Path, keys: Keys
) -> None:
    train(datalist, tmp_path / "model", TASK, overrides=keys | {"epochs": 1})
    copy = shutil.copytree(tmp_path / "model", tmp_path / "copy", ignore=shutil.ignore_patterns(".samda"))
    for how in ("resume", "overwrite"):
        with pytest.raises(UsageError, match=r"adapter\.json, .*copy its hidden \.samda"):
            train(datalist, copy, TASK, overrides=keys, **{how: True})
    assert same(tensors(tmp_path / "model"), tensors(copy))
    begun = tmp_path / "begun"  # a training that was stopped, copied in the same way
    begun.mkdir()
    for name in ("last.pt", "history.json"):
        shutil.copy(copy / name, begun)
    train(datalist, begun, TASK, overrides=keys, resume=True)
    train(datalist, tmp_path / "model", TASK, overrides=keys, resume=True)
    assert same(tensors(tmp_path / "model"), tensors(begun))


def test_a_resume_says_what_differs(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    train(datalist, tmp_path / "model", TASK, overrides=keys | {"epochs": 1})
    before = tensors(tmp_path / "model")
    other = read_state(keys["weights"])
    save_file({name: tensor + 0.1 for name, tensor in other.items()}, tmp_path / "other.safetensors")
    changes: list[tuple[Keys, str]] = [
        ({"warmup": 0.2}, "warmup was 0.05 and is now 0.2"),
        ({"empty_share": 0.3}, "empty_share was 0.1 and is now 0.3"),
        ({"dice_background": True}, "dice_background was False and is now True"),
        ({"train::augmentation::tissue": 0.5}, "train::augmentation::tissue was 1.0 and is now 0.5"),
        ({"weights": str(tmp_path / "other.safetensors")}, "other base weights: .*other.safetensors"),
    ]
    for change, words in changes:
        with pytest.raises((UsageError, WeightsError), match=words):
            train(datalist, tmp_path / "model", TASK, overrides=keys | {"epochs": 2} | change, resume=True)
    assert same(before, tensors(tmp_path / "model"))


def test_more_epochs_can_be_added_on_resume(datalist: Path, tmp_path: Path, keys: Keys) -> None:
    train(datalist, tmp_path / "model", TASK, overrides=keys)
    assert train(datalist, tmp_path / "model", TASK, overrides=keys | {"epochs": 3}, resume=True)["epochs"] == 3
    without = {key: value for key, value in keys.items() if key != "epochs"}
    assert train(datalist, tmp_path / "model", TASK, overrides=without, resume=True)["epochs"] == 3, "as it was"
    for change, words in (({"epochs": 2}, "the length was 3 epochs, 2 is less"), ({"steps": 9}, "it is in steps")):
        with pytest.raises(UsageError, match=words):  # before the data are read
            train(tmp_path / "gone.json", tmp_path / "model", TASK, overrides=without | change, resume=True)


@pytest.mark.parametrize("name", ["case#3", "@home", "$HOME", "%x", "it's"])
def test_folders_may_have_any_name(datalist: Path, tmp_path: Path, keys: Keys, name: str) -> None:
    """MONAI reads #, @, $ and % in texts; a path means itself."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copytree(datalist.parent, folder / "scans")
    train(folder / "scans" / "datalist.json", folder / "model", TASK, overrides=keys | {"epochs": 1})
    assert (folder / "model" / "adapter.safetensors").exists()


def test_literal_leaves_plain_values_alone() -> None:
    values = {"a": [1, "b", None], "c": 2.5}
    assert literal(values) == values
    assert eval(literal("x#y@z")[1:]) == "x#y@z"


OVERLAYS = sorted(packaged("configs", "adapters").glob("**/*.yaml"))


def test_there_are_fifteen_overlays() -> None:
    assert len(OVERLAYS) == 15


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_trains_by_the_command_that_it_states(
    path: Path, datalist: Path, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = path.read_text("utf-8").splitlines()[:2]
    assert first == f"# samda train --data DATA --output MODEL --task TASK.yaml --adapter {path.stem}"
    assert second.startswith("# python -m monai.bundle run ") and f"configs/adapters/{path.name}" in second
    assert find_overlay(path.stem) == path
    monkeypatch.chdir(tmp_path)
    few = {"epochs": 1, "empty_share": 0.0, "batch_size": 12, "augmentation": 0.0}
    result = train(datalist, "model", TASK, adapters=path.stem, overrides=keys | few)
    assert result["epochs"] == 1
    try:
        load_model("model", weights=keys["weights"])
    except AdapterError as error:
        pytest.fail(str(error))
