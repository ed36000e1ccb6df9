# SPDX-License-Identifier: Apache-2.0
"""Trainings that start from a trained model, on tiny scans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_scans import TASK, tiny_keys, write_datalist

from samda.adapters.adapter_file import read_adapters, save_adapters
from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.data.splits import Split
from samda.errors import AdapterError, UsageError, WeightsError
from samda.io import file_sha256
from samda.models.folder import load_model
from samda.networks.backbones import ViTConfig
from samda.networks.segmenter import SamSegmenter
from samda.task import Task
from samda.training import SoftTargets, parent_share, read_parent, start_from, train

LIVER = TASK | {"classes": ["background", "liver"], "labels": {"liver": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_datalist(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def settings(tiny_tinyvit_config: ViTConfig, tiny_tinyvit_weights: Path) -> dict[str, Any]:
    return tiny_keys(tiny_tinyvit_config, tiny_tinyvit_weights) | {"epochs": 1}


@pytest.fixture(scope="module")
def parent(data: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the liver."""
    folder = tmp_path_factory.mktemp("models") / "parent"
    train(data, folder, task=LIVER, overrides=settings, tracking="none", device="cpu")
    return folder


@pytest.fixture(scope="module")
def spleens(data: Path) -> Path:
    """The same scans, whose labels name the spleen only."""
    content = json.loads(data.read_text("utf-8")) | {"labels": {"background": 0, "spleen": 2, "other": 1}}
    path = data.with_name("spleens.json")
    path.write_text(json.dumps(content))
    return path


CHILD = {"epochs": 1, "views": 2, "batch_size": 4}
BOTH = {"classes": ["background", "liver", "spleen"]}


def logits(folder: Path, size: int = 64) -> torch.Tensor:
    network, task, _ = load_model(folder)
    images = torch.rand(3, task.network_channels, size, size + 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(images)


def test_it_goes_on_where_the_parent_ended(data: Path, parent: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "m", parent=parent, overrides=CHILD | {"learning_rate": 1e-9, "head_learning_rate": 1e-9},
          tracking="none", device="cpu")  # fmt: skip
    assert torch.allclose(logits(tmp_path / "m"), logits(parent), atol=1e-3)
    record = read_adapters(tmp_path / "m").record
    descent = record["training"]["parent"]
    assert descent["sha256"] == file_sha256(parent / "adapter.safetensors")
    assert (descent["model"], descent["classes"]) == ("parent", ["background", "liver"])
    assert descent["training"]["cases"] == {"training": 2, "validation": 1}


def test_the_result_is_a_mean_of_parent_and_child(data: Path, parent: Path, tmp_path: Path) -> None:
    """Two trainings that differ in the share alone: p_child = s p_parent + (1 - s) p_new."""
    for name, share in (("new", 0.0), ("mean", 0.25)):
        train(data, tmp_path / name, parent=parent, overrides=CHILD | {"parent_share": share}, tracking="none",
              device="cpu")  # fmt: skip
    old, new, mean = (read_adapters(folder).tensors for folder in (parent, tmp_path / "new", tmp_path / "mean"))
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert moved
    for name in moved:
        torch.testing.assert_close(mean[name], 0.25 * old[name] + 0.75 * new[name], rtol=1e-4, atol=1e-5)


def test_the_share_of_the_parent_follows_from_the_cases(parent: Path) -> None:
    known = read_parent(parent)  # of 2 + 1 cases
    assert known is not None
    few, many = (Split([{}] * (n - 1), [{}], "") for n in (2, 9))
    assert [parent_share(known, known.task, cases) for cases in (few, many)] == [0.5, 0.25]
    assert parent_share(known, known.task, few, 0.1) == 0.1
    grown = dataclasses.replace(known.task, classes=(*known.task.classes, "spleen"), labels=None)
    assert parent_share(known, grown, few) == parent_share(None, known.task, few) == 0.0


def test_exactly_kept_classes_have_the_logits_of_the_parent(spleens: Path, parent: Path, tmp_path: Path) -> None:
    result = train(spleens, tmp_path / "m", task=BOTH, parent=parent, keep_classes="exact", overrides=CHILD,
                   tracking="none", device="cpu")  # fmt: skip
    assert result["dice"]["liver"] is None  # nobody labeled it
    for size in (64, 96, 160):
        new, old = logits(tmp_path / "m", size), logits(parent, size)
        assert new.shape[1] == 3
        assert torch.equal(new[:, :2], old)
    before, after = (read_adapters(folder) for folder in (parent, tmp_path / "m"))
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name], tensor)
    statistics = [file.record["statistics"]["classes"]["liver"] for file in (before, after)]
    assert statistics[0] == statistics[1]
    grand = tmp_path / "task.yaml"
    grand.write_text("classes: [background, liver, spleen, x]\nlabels: {x: 1, liver: [], spleen: []}")
    train(spleens, tmp_path / "n", task=grand, parent=tmp_path / "m", keep_classes="exact", overrides=CHILD,
          tracking="none", device="cpu")  # fmt: skip
    assert torch.equal(logits(tmp_path / "n")[:, :3], logits(tmp_path / "m"))
    with pytest.raises(UsageError, match="beside frozen ones"):
        train(spleens, tmp_path / "o", task=grand, parent=tmp_path / "m", overrides=CHILD)


def test_a_new_class_is_learned_beside_one_that_is_not_labeled(spleens: Path, parent: Path, tmp_path: Path) -> None:
    result = train(spleens, tmp_path / "m", task=BOTH, parent=parent, overrides=CHILD | {"epochs": 15},
                   tracking="none", device="cpu")  # fmt: skip
    assert result["dice"]["spleen"] > 0.8
    new, old = logits(tmp_path / "m"), logits(parent)
    assert not torch.equal(new[:, :2], old)
    agree = (new[:, :2].argmax(1) == old.argmax(1)).float().mean()
    assert agree > 0.9


@pytest.mark.parametrize("head", ["pyramid", "sam"])
def test_new_classes_begin_as_background(
    make_segmenter: Callable[..., SamSegmenter], head: str, tmp_path: Path
) -> None:
    task = Task(classes=("background", "a", "b"), image_size=64)
    old = make_segmenter("tiny_vit", num_classes=3, head=head)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in old.head_params():
            old.get_parameter(name).normal_(0, 0.1, generator=generator)
    base = {"fingerprint": old.fingerprint(), "file": old.base_report.path.name, "sha256": old.base_report.sha256}
    network = {"backbone": old.config.to_json(), "num_classes": 3, "in_channels": 1, "head": old.head_config.to_json()}
    save_adapters(old, tmp_path, network=network, base=base, task=task.to_dict())
    (tmp_path / "base.safetensors").touch()  # not read: the network has its weights
    wider = make_segmenter("tiny_vit", num_classes=5, head=head)
    grown = start_from(wider, read_parent(tmp_path), Task(classes=("background", "a", "b", "c", "d"), image_size=64))
    images = torch.rand(2, 1, 64, 64, generator=generator)
    with torch.no_grad():
        found, expected = grown(images), old(images)
    if head == "pyramid":  # further tokens of the head sam take part in its attention
        torch.testing.assert_close(found[:, :3], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 3:], found[:, :1].expand(-1, 2, -1, -1), rtol=1e-4, atol=1e-4)


def test_the_parent_says_what_labels_leave_open(parent: Path, make_segmenter: Callable[..., SamSegmenter]) -> None:
    source, task, _ = load_model(parent)
    start = read_parent(parent)
    assert start is not None
    gaps = PartialLabels(("background", "liver", "spleen"), sets=((1,), (1, 2)))
    wide = Task.from_dict(BOTH, task)
    network = SamSegmenter(start.file.network["backbone"], 3, head="pyramid", adapters=["ssf"],
                           weights=source.base_report.path)  # fmt: skip
    targets = SoftTargets(start_from(network, start, wide), start, gaps, None)
    images = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    label = torch.full((1, 1, 64, 64), OPEN, dtype=torch.uint8)
    label[..., :16], label[..., 16:32], label[..., 32:40] = 2, OPEN + 1, IGNORED
    _, found = targets({"image": images, "label": label})
    with torch.no_grad():
        q = source(images).softmax(1)
    torch.testing.assert_close(found[..., 40:], F.pad(q, (0, 0, 0, 0, 0, 1))[..., 40:])
    assert found[..., :16].eq(torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1)).all()
    assert found[..., 16:40].eq(-0.5).all()  # the spleen is possible, of which the parent knows nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"classes": ["background", "spleen"]}}, "lacks the class 'liver'"),
        ({"task": {"classes": ["background", "spleen", "liver"]}}, "orders the classes"),
        ({"keep_classes": "exact"}, "has no class beyond those"),
        ({"backbone": "vit"}, "has the backbone"),
        ({"head": {"type": "pyramid", "stride": 4}}, "has the head"),
        ({"adapters": ["ssf", "norm"]}, "holds the adapters ssf, this model has ssf, norm"),
        ({"parent": None, "keep_classes": "exact"}, "keep_classes needs a model"),
        ({"parent": "nowhere"}, "no model folder nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    data: Path,
    parent: Path,
    tiny_vit_config: ViTConfig,
    tiny_weights: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    changes: dict,
    message: str,
) -> None:
    own = {"parent": parent, "overrides": dict(CHILD)} | changes
    if own["parent"] is None:
        own["overrides"] |= settings
    if own.pop("backbone", None):
        own["overrides"] |= tiny_keys(tiny_vit_config, tiny_weights)
        own["head"] = {"type": "pyramid", "levels": ["block_0", "block_1", "embedding"]}
    with pytest.raises((AdapterError, UsageError), match=message) as caught:
        train(data, tmp_path / "m", tracking="none", device="cpu", **({"task": LIVER} | own))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m" / "adapter.json").exists()


def test_other_base_weights_are_refused(data: Path, parent: Path, tmp_path: Path, tiny_tinyvit_weights: Path) -> None:
    state = torch.load(tiny_tinyvit_weights)
    torch.save({name: tensor * 1.5 if tensor.ndim > 1 else tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"another answer|norm of"):
        train(data, tmp_path / "m", parent=parent, overrides=CHILD | {"weights": str(tmp_path / "w.pt")},
              tracking="none", device="cpu")  # fmt: skip
