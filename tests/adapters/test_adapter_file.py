# SPDX-License-Identifier: Apache-2.0
"""Adapter files: what is written comes back, and everything else is refused before anything changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from adapter_tools import OneLayer, move, noise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from samda.adapters import attached, is_merged, load_adapters, merge, read_adapters, save_adapters
from samda.errors import AdapterError

Make = Callable[..., nn.Module]
SETTINGS = {"salt": {"r": 3, "rank": 2}, "lora": {"alpha": 2.0}}
SECTIONS = {
    "network": {"backbone": "vit_t", "num_classes": 3},
    "base": {"source": "mobile_sam.pt", "norms": (1.5, np.float32(0.25))},
    "task": {"classes": ["background", "spleen"]},
    "record": {"epochs": np.int64(7), "dice": {"liver": float("nan"), "spleen": 0.5}, "resumed": False, "note": None},
}


def model(seed: int = 3, **changes: Any) -> OneLayer:
    network = OneLayer(24, 10, SETTINGS | changes, seed=seed)
    move(network)
    return network


def fresh(**changes: Any) -> OneLayer:
    return OneLayer(24, 10, SETTINGS | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a trained model."""
    save_adapters(model(), tmp_path / "model", **SECTIONS)
    return tmp_path / "model"


def refused(network: OneLayer, source: Any) -> str:
    """The line that a refusal gives; the network is bit for bit what it was."""
    before = {key: tensor.clone() for key, tensor in [*network.state_dict().items(), *network.named_buffers()]}
    with pytest.raises(AdapterError) as caught:
        load_adapters(network, source)
    assert all(torch.equal(t, before[k]) for k, t in [*network.state_dict().items(), *network.named_buffers()])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of adapter.json; a value of ... deletes the key."""
    header = json.loads((folder / "adapter.json").read_text("utf-8")) | changes
    (folder / "adapter.json").write_text(json.dumps({k: v for k, v in header.items() if v is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change adapter.safetensors, with a sha256 that fits."""
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    edit(folder, sha256=hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest())


def test_content(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    header = json.loads((folder / "adapter.json").read_text("utf-8"))
    assert list(header) == ["format_version", "sha256", "adapters", "network", "base", "task", "record"]
    assert header["format_version"] == 1
    assert header["sha256"] == hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    assert header["adapters"]["lora"] == {
        "type": "lora",
        "seed": 0,
        "layers": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        "rank": 4,
        "alpha": 2.0,
    }
    assert header["base"]["norms"] == [1.5, 0.25]
    assert header["record"] == {"epochs": 7, "dice": {"liver": None, "spleen": 0.5}, "resumed": False, "note": None}
    with safe_open(folder / "adapter.safetensors", "pt") as stored:
        assert sorted(stored.keys()) == [
            "layer.adapters.lora.down",
            "layer.adapters.lora.up",
            "layer.adapters.salt.left",
            "layer.adapters.salt.right",
            "layer.adapters.salt.scale",
            "layer.adapters.salt.shift",
            "layer.adapters.salt.signature",
        ]


def test_what_is_read(folder: Path) -> None:
    file, original = read_adapters(folder), model()
    assert file.adapters == attached(original)
    assert file.network == SECTIONS["network"]
    assert file.task == SECTIONS["task"]
    for name, tensor in original.state_dict().items():
        if "adapters" in name:
            assert torch.equal(file.tensors[name], tensor)


@pytest.mark.parametrize("form", ["folder", "file", "read", "moved"])
def test_ways_to_load(form: str, folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "renamed.safetensors"
    alone.write_bytes((folder / "adapter.safetensors").read_bytes())
    source = {
        "folder": str(folder),
        "file": folder / "adapter.safetensors",
        "read": read_adapters(folder),
        "moved": alone,
    }[form]
    network, x = fresh(), noise(5, 10)
    merge(network)
    load_adapters(network, source)
    assert not is_merged(network)
    assert torch.equal(network(x), model()(x))


def test_parameters_stay_the_same_objects(folder: Path) -> None:
    """An optimizer that was built before goes on with what was loaded."""
    network = fresh()
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    load_adapters(network, folder)
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before


def test_free_settings_may_differ(folder: Path) -> None:
    load_adapters(fresh(salt={"r": 3, "rank": 2, "init": "paper", "seed": 9}), folder)


def test_a_file_of_another_precision(folder: Path) -> None:
    network = fresh().double()
    load_adapters(network, folder)
    assert torch.allclose(network(noise(5, 10).double()).float(), model()(noise(5, 10)), atol=1e-5)


def test_head_and_baselines_are_in_the_file(make_segmenter: Make, tmp_path: Path) -> None:
    network = make_segmenter(adapters={"sam_da": {}})
    with torch.no_grad():
        network.mask_decoder.mask_tokens.weight += 1
    save_adapters(network, tmp_path)
    size = (tmp_path / "adapter.safetensors").stat().st_size
    trainable = 395_522 + 3 * (256 + 139_808)
    assert size == pytest.approx(4 * trainable, rel=0.01)
    loaded = make_segmenter(adapters={"sam_da": {}}, adapter_file=tmp_path / "adapter.safetensors")
    assert torch.equal(loaded.mask_decoder.mask_tokens.weight, network.mask_decoder.mask_tokens.weight)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter.safetensors", lambda b: b[:-4], "not the file that adapter.json describes (sha256); copy the folder"),
        ("adapter.safetensors", lambda b: b + b"\0", "not the file that adapter.json describes"),
        ("adapter.json", lambda b: b[:-9], "is not a JSON file"),
        ("adapter.json", lambda b: b.replace(b"null", b"NaN"), "NaN is not JSON"),
        ("adapter.json", lambda b: b"\x80" + b, "is not a JSON file"),
        ("adapter.json", lambda b: b"[]", "has no format_version"),
        ("adapter.json", lambda b: b"[" * 10**5, "is not a JSON file"),
    ],
)
def test_damaged_files(name: str, damage: Callable[[bytes], bytes], message: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    line = refused(fresh(), folder)
    assert message in line
    assert str(path) in line


def test_truncated_safetensors_without_a_header(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "alone.safetensors"
    path.write_bytes((folder / "adapter.safetensors").read_bytes()[:-4])
    assert f"{path}: is not a safetensors file or is cut short" in refused(fresh(), path)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory); give the folder of a trained" in refused(
        fresh(), tmp_path / "no"
    )
    (folder / "adapter.safetensors").unlink()
    assert "adapter.safetensors: cannot be read" in refused(fresh(), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format version 2, this samda reads up to 1; update samda"),
        ({"format_version": "1"}, "has no format_version"),
        ({"format_version": True}, "has no format_version"),
        ({"recrod": {}}, "unknown key 'recrod'; did you mean 'record'"),
        ({"task": ...}, "lacks 'task'; copy the folder again"),
        ({"task": []}, "'task' must be an object, got list"),
        ({"adapters": {"salt": {"type": "slat"}}}, "there is no adapter 'slat'; did you mean 'salt'"),
        ({"adapters": {"lora": {"type": "lora", "rnak": 4}}}, "unknown key 'rnak'; did you mean 'rank'"),
        ({"adapters": {"lora": {"type": "lora", "rank": 4}}}, "adapter 'lora' lacks the setting 'alpha'"),
        ({"adapters": {"lora": [1]}}, "settings must be a mapping"),
        ({"sha256": None}, "not the file that adapter.json describes"),
    ],
)
def test_headers(changes: dict, message: str, folder: Path) -> None:
    edit(folder, **changes)
    line = refused(fresh(), folder)
    assert message in line
    assert str(folder) in line


NAME = "layer.adapters.lora.up"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({NAME: torch.zeros(24, 5)}), f"{NAME} has shape (24, 5), this model (24, 4)"),
        (lambda t: t.update({NAME: torch.zeros(24, 4, dtype=torch.int64)}), f"{NAME} holds values that are not finite"),
        (lambda t: t[NAME].fill_(float("inf")), f"{NAME} holds values that are not finite numbers"),
        (
            lambda t: t.update({NAME: torch.full((24, 4), 1e300, dtype=torch.float64)}),
            f"{NAME} holds values that are not",
        ),
        (lambda t: t.pop(NAME), f"lacks {NAME}; build the network with the adapters and classes of the file"),
        (lambda t: t.update({"layer.weight": torch.zeros(24, 10)}), "holds layer.weight, which this model lacks"),
        (lambda t: t["layer.adapters.salt.signature"].neg_()[0].neg_().add_(1), "encoder.0.mlp.fc1: "),
    ],
)
def test_tensors(change: Callable, message: str, folder: Path) -> None:
    edit_tensors(folder, change)
    line = refused(fresh(), folder)
    assert message in line
    assert str(folder) in line


def test_salt_of_other_base_weights_names_the_layer(tmp_path: Path) -> None:
    save_adapters(model(seed=4), tmp_path)
    line = refused(fresh(), tmp_path)
    assert line.startswith(
        f"encoder.0.mlp.fc1: {tmp_path} was trained in another singular basis of this weight; load the"
    )


def test_salt_with_its_basis_refuses_other_base_weights_too(tmp_path: Path) -> None:
    settings = {"salt": {"r": 3, "rank": 2, "save_basis": True}}
    save_adapters(model(seed=4, **settings), tmp_path)
    assert "was trained on another base weight" in refused(fresh(**settings), tmp_path)


def test_salt_of_flipped_signs_is_put_right(tmp_path: Path) -> None:
    network, x = model(), noise(5, 10)
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, 1, 1, -1])
    other, expected = fresh(), network(x)
    salt = other.layer.adapters["salt"]
    salt.u, salt.vt = salt.u * signs, salt.vt * signs[:, None]
    salt.signature[1:] *= signs
    save_adapters(network, tmp_path)
    load_adapters(other, tmp_path)
    assert torch.allclose(other(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: OneLayer(24, 10), "holds the adapters salt, lora, this model has none; attach those"),
        (lambda: OneLayer(24, 10, {"lora": {"alpha": 2.0}}), "this model has lora"),
        (
            lambda: fresh(lora={"alpha": 4.0}),
            "adapter 'lora' has alpha 2.0, this model has 4.0; build the network with",
        ),
        (lambda: fresh(lora={"type": "salt"}), "adapter 'lora' has type 'lora', this model has 'salt'"),
        (lambda: fresh(salt={"r": 3, "rank": 2, "activation": None}), "has activation 'relu', this model has None"),
    ],
)
@pytest.mark.filterwarnings("ignore:salt")
def test_other_adapters_and_settings(network: Callable[[], OneLayer], message: str, folder: Path) -> None:
    assert message in refused(network(), folder)


@pytest.mark.parametrize("value", [{1, 2}, b"x", object])
def test_only_plain_values_are_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"record of adapter\.json takes plain values only"):
        save_adapters(model(), tmp_path / "new", record={"a": [0, value]})
    assert not (tmp_path / "new").exists()


def test_what_is_not_finite_is_not_saved(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    network = model()
    with torch.no_grad():
        network.layer.adapters["lora"].up[0, 0] = float("nan")
    with pytest.raises(
        AdapterError, match=r"layer\.adapters\.lora\.up holds values that are not finite; nothing was saved"
    ):
        save_adapters(network, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_again_replaces(folder: Path) -> None:
    network = model()
    move(network, seed=40)
    save_adapters(network, folder)
    loaded = fresh()
    load_adapters(loaded, folder)
    assert torch.equal(loaded(noise(5, 10)), network(noise(5, 10)))
    assert len(list(folder.iterdir())) == 2
