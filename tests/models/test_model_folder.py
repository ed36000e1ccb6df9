# SPDX-License-Identifier: Apache-2.0
"""A trained model as a folder: it answers as before, needs its base, and runs nobody's code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samda.errors import AdapterError, InputError, SamdaError, UsageError, WeightsError
from samda.models.folder import load_model, save_model
from samda.models.versions import activate, list_versions, load_version
from samda.networks.segmenter import SamSegmenter
from samda.task import Task
from tests.conftest import TINY_VIT

Make = Callable[..., SamSegmenter]
TASK = Task(name="organs", classes=("background", "liver", "spleen"), spacing=2.0, image_size=64)
RECORD = {"epochs": 3, "metrics": {"dice": {"liver": 0.5}}}
ADAPTERS = {"salt": {"rank": 2}, "lka": {}, "sam_da": {}}


def trained(network: SamSegmenter) -> SamSegmenter:
    """`network` with trained tensors moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return network


@torch.no_grad()
def answer(network: SamSegmenter) -> torch.Tensor:
    return network(torch.rand(1, 1, 64, 48, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@pytest.mark.parametrize("adapters", [ADAPTERS, {"full": {}}, {"decoder": {}}, {"head": {}}])
def test_answers_as_before(
    make_segmenter: Make, tiny_weights: Path, tiny_tinyvit_weights: Path, tmp_path: Path, kind: str, adapters: dict
) -> None:
    network = trained(make_segmenter(kind, adapters=adapters))
    save_model(network, tmp_path / "model", TASK, RECORD)
    assert {path.name for path in (tmp_path / "model").glob("[!.]*")} == {"adapter.json", "adapter.safetensors"}
    weights = tiny_weights if kind == "vit" else tiny_tinyvit_weights
    found, task, record = load_model(tmp_path / "model", weights=weights)
    assert torch.equal(answer(found), answer(network))
    assert (task, record) == (TASK, RECORD)
    assert not found.training


def test_merged_or_not_the_same_is_saved(make_segmenter: Make, tiny_weights: Path, tmp_path: Path) -> None:
    from samda.adapters import merge

    network = trained(make_segmenter(adapters={"salt": {"rank": 2}}))
    before = answer(network)
    merge(network)
    save_model(network, tmp_path, TASK, RECORD)
    assert torch.equal(answer(load_model(tmp_path, tiny_weights)[0]), before)


@pytest.mark.parametrize("adapters", [{"lora": {}}, {"full": {}}])
def test_the_base_inside(make_segmenter: Make, tmp_path: Path, adapters: dict) -> None:
    network = trained(make_segmenter("tiny_vit", adapters=adapters))
    save_model(network, tmp_path, TASK, RECORD, with_base=True)
    assert torch.equal(answer(load_model(tmp_path)[0]), answer(network))


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_a_base_of_no_file_travels_along(make_segmenter: Make, tmp_path: Path, kind: str) -> None:
    network = trained(make_segmenter(kind, weights=None, adapters={"lora": {}}))
    save_model(network, tmp_path, TASK, RECORD)
    found, _, _ = load_model(tmp_path)
    assert torch.equal(answer(found), answer(network))
    save_model(found, tmp_path / "again", TASK, RECORD, with_base=True)
    assert torch.equal(answer(load_model(tmp_path / "again")[0]), answer(network))


def test_the_published_base_is_found_by_itself(vit_t_weights: Path, tmp_path: Path) -> None:
    network = trained(SamSegmenter("vit_t", num_classes=3, weights=vit_t_weights, adapters={"sam_da": {}}))
    save_model(network, tmp_path, TASK, RECORD)
    stored = json.loads((tmp_path / "adapter.json").read_text("utf-8"))
    assert stored["network"] == {"backbone": "vit_t", "num_classes": 3, "in_channels": 1}
    assert stored["base"]["file"] == vit_t_weights.name
    assert torch.equal(answer(load_model(tmp_path)[0]), answer(network))


def test_another_base_is_refused(make_segmenter: Make, tiny_weights: Path, tmp_path: Path) -> None:
    save_model(make_segmenter(adapters={"lora": {}}), tmp_path / "model", TASK, RECORD)
    state = torch.load(tiny_weights, weights_only=True)
    state["image_encoder.neck.2.weight"] += 0.01
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"trained on test_vit \(tiny_vit.pth\).*holds test_vit \(other.pth\)"):
        load_model(tmp_path / "model", tmp_path / "other.pth")


def test_a_base_that_nobody_publishes_must_be_given(make_segmenter: Make, tiny_weights: Path, tmp_path: Path) -> None:
    """Unless it still lies where it lay, unchanged."""
    own = shutil.copy(tiny_weights, tmp_path / "own.pth")
    model = tmp_path / "model"
    save_model(make_segmenter(weights=own, adapters={"lora": {}}), model, TASK, RECORD)
    assert load_model(model)[0].base_report.path == Path(own)
    torch.save({}, own)
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"trained on the base weights own.pth; give that file as weights"):
            load_model(model)
        Path(own).unlink(missing_ok=True)


def test_task_and_network_must_agree(make_segmenter: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the network has 4 classes, task 'organs' has 3"):
        save_model(make_segmenter(num_classes=4), tmp_path / "model", TASK, RECORD)
    with pytest.raises(InputError, match="the network has 3 input channels, task 'organs' has 1"):
        save_model(make_segmenter(in_channels=3), tmp_path / "model", TASK, RECORD)
    assert not (tmp_path / "model").exists()


NETWORK = {"backbone": TINY_VIT.to_json(), "num_classes": 3, "in_channels": 1}


@pytest.mark.parametrize(
    ("section", "values", "error", "message"),
    [
        ("network", {"backbone": "vit_t", "classes": 3}, UsageError, "network: unknown key 'classes'"),
        ("network", {}, InputError, "network lacks 'backbone'; copy the model folder again"),
        ("base", {}, InputError, "base lacks 'file'"),
        ("base", {"file": None, "sha256": None, "fingerprint": {}}, InputError, "describes no network"),
        ("network", {"backbone": 3, "num_classes": 3, "in_channels": 1}, UsageError, "unknown backbone 3"),
        ("network", {"backbone": {"type": "vit"}, "num_classes": "3", "in_channels": 1}, UsageError, "got '3'"),
        ("network", NETWORK | {"head": "fpn"}, UsageError, "no class head 'fpn'"),
        ("network", NETWORK | {"head": {"type": "pyramid", "widths": [8] * 3 + [10**9]}}, UsageError, "widths"),
        ("network", NETWORK | {"head": {"type": "pyramid", "levels": ["4", "8", "16"]}}, UsageError, "no level '4'"),
        ("task", {"windo": [0, 1]}, InputError, "task: unknown key 'windo'; did you mean 'window'"),
        ("task", {}, InputError, "the network has 3 classes, task 'segmentation' has 2"),
        ("base", {"fingerprint": {}, "file": "x", "url": "y"}, UsageError, "base: unknown key 'url'"),
    ],
)
def test_changed_files_are_refused(
    make_segmenter: Make,
    tiny_weights: Path,
    tmp_path: Path,
    section: str,
    values: dict,
    error: type[SamdaError],
    message: str,
) -> None:
    save_model(make_segmenter(adapters={"lora": {}}), tmp_path, TASK, RECORD)
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {section: values}))
    with pytest.raises(error, match=message):
        load_model(tmp_path, tiny_weights)


VIT = TINY_VIT.to_json()


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("network", {"num_classes": 20_000}),
        ("network", {"backbone": VIT | {"depth": 10**9}}),
        ("network", {"backbone": VIT | {"embed_dim": 10**9}}),
        ("network", {"backbone": VIT | {"global_blocks": [0] * 10**6}}),
        ("network", {"backbone": VIT | {"embed_dim": 8000, "depth": 60}}),
        ("network", {"head": {"type": "pyramid"}}),
        ("adapters", {"inner_dim": 8 * 10**6}),
        ("adapters", {"num_prompts": 10**7}),
        ("adapters", {"prompt_dim": 10**9}),
        ("adapters", {"prompt_dim": 10**30}),
    ],
)
def test_settings_that_ask_for_more_than_the_file_holds_take_no_memory(
    make_segmenter: Make, tiny_weights: Path, tmp_path: Path, section: str, values: dict
) -> None:
    save_model(make_segmenter(adapters={"sam_da": {}}), tmp_path, TASK, RECORD)
    path = tmp_path / "adapter.json"
    header = json.loads(path.read_text("utf-8"))
    place = header["adapters"]["sam_da"] if section == "adapters" else header["network"]
    place |= values
    if "num_classes" in values:
        header["task"]["classes"] = ["background", *map(str, range(values["num_classes"] - 1))]
    path.write_text(json.dumps(header))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(SamdaError) as error:
        load_model(tmp_path, tiny_weights)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "base.safetensors", "versions/active.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_special_files_and_links_out_of_the_folder_are_not_read(
    make_segmenter: Make, tiny_weights: Path, tmp_path: Path, name: str, kind: str
) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    network = make_segmenter(adapters={"sam_da": {}})
    save_model(network, model, TASK, RECORD, with_base=True)
    (model / "versions").mkdir()
    (model / "versions" / "active.json").write_text('{"stack": ["source"], "history": []}')
    load_version(model)
    elsewhere.mkdir()
    shutil.move(model / name, elsewhere / "file")
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero" if kind == "device" else elsewhere / "file")
    with pytest.raises((AdapterError, InputError, WeightsError)) as error:
        load_version(model)
    assert str(model / name) in str(error.value)


def test_a_link_to_the_model_folder_is_followed_and_versions_elsewhere_are_not(
    make_segmenter: Make, tiny_weights: Path, tmp_path: Path
) -> None:
    save_model(make_segmenter(adapters={"sam_da": {}}), tmp_path / "model", TASK, RECORD)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert load_version(tmp_path / "link", weights=tiny_weights)[3] == "source"
    (tmp_path / "versions" / "a").mkdir(parents=True)
    (tmp_path / "versions" / "a" / "adapter.json").write_text("{}")
    (tmp_path / "model" / "versions").symlink_to(tmp_path / "versions")
    for call in (list_versions, load_version, lambda model: activate(model, "a", force=True)):
        with pytest.raises(InputError, match=r"versions is a link to"):
            call(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["a"]


def test_no_other_file_is_opened(make_segmenter: Make, tiny_weights: Path, tmp_path: Path) -> None:
    save_model(make_segmenter(adapters={"lora": {}}), tmp_path, TASK, RECORD)
    for name in ("last.pt", "model.pt", "configs", "scripts.py"):
        (tmp_path / name).write_bytes(b"\x80\x04not a pickle")
    load_model(tmp_path, tiny_weights)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("task", "image_size", 10_000_000, "image_size must be a multiple of 16 from 16 to 4096"),
        ("task", "spacing", -1.5, "spacing must be positive"),
        ("network", "num_classes", 10**9, "the network has 1000000000 classes"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(
    make_segmenter: Make, tiny_weights: Path, tmp_path: Path, section: str, key: str, value: float, message: str
) -> None:
    save_model(make_segmenter(), tmp_path, TASK, RECORD)
    header = json.loads((tmp_path / "adapter.json").read_text("utf-8"))
    header[section][key] = value
    (tmp_path / "adapter.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, weights=tiny_weights)
