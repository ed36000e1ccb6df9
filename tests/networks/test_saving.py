# SPDX-License-Identifier: Apache-2.0
"""State dicts of trained tensors only, under strict loaders and MONAI's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from ignite.engine import Engine
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.networks.utils import copy_model_state

from samda.errors import WeightsError
from samda.networks.segmenter import BASE_RESPONSE, SamSegmenter

Make = Callable[..., SamSegmenter]


@pytest.fixture
def trained(make_segmenter: Make) -> SamSegmenter:
    """A network whose trained tensors have moved."""
    network = make_segmenter(adapters={"lora": {"rank": 2}})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network


@pytest.fixture
def fresh(make_segmenter: Make) -> SamSegmenter:
    """The same network before training."""
    return make_segmenter(adapters={"lora": {"rank": 2}})


@torch.no_grad()
def same_answer(first: nn.Module, second: nn.Module) -> bool:
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    return torch.equal(first(image), second(image))


def test_only_what_is_trained_is_saved(trained: SamSegmenter) -> None:
    expected = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert set(trained.state_dict()) == expected | {BASE_RESPONSE}
    adapter = {name for name in expected if ".adapters.lora." in name}
    assert adapter and expected - adapter == set(trained.head_params())


def test_strict_loading(trained: SamSegmenter, fresh: SamSegmenter) -> None:
    assert not same_answer(trained, fresh)
    result = fresh.load_state_dict(trained.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert same_answer(trained, fresh)


def test_strict_loading_within_a_parent(trained: SamSegmenter, fresh: SamSegmenter) -> None:
    parents = [nn.ModuleDict({"student": network, "other": nn.Linear(2, 2)}) for network in (trained, fresh)]
    parents[1].load_state_dict(parents[0].state_dict(), strict=True)
    assert same_answer(trained, fresh)


def test_the_full_state_on_request(trained: SamSegmenter, make_segmenter: Make) -> None:
    trained.full_state_dict = True
    state = trained.state_dict()
    assert {name for name, _ in trained.named_parameters()} <= set(state)
    other = make_segmenter(weights=None, adapters={"lora": {"rank": 2}})
    other.load_state_dict(state, strict=True)
    assert same_answer(trained, other)


@pytest.mark.parametrize("lost", ["mask_decoder.mask_tokens.weight", "image_encoder.pos_embed"])
def test_a_lost_tensor_is_missed(trained: SamSegmenter, fresh: SamSegmenter, lost: str) -> None:
    trained.full_state_dict = True
    state = trained.state_dict()
    del state[lost]
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        fresh.load_state_dict(state, strict=True)


def test_other_classes_are_refused(trained: SamSegmenter, make_segmenter: Make) -> None:
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make_segmenter(num_classes=2, adapters={"lora": {"rank": 2}}).load_state_dict(trained.state_dict())


def test_full_training_saves_the_base(make_segmenter: Make) -> None:
    network = make_segmenter("tiny_vit", adapters={"full": {}})
    assert {name for name, _ in network.named_parameters()} == set(network.state_dict()) - {BASE_RESPONSE}


def test_monai_saver_and_loader(trained: SamSegmenter, fresh: SamSegmenter, tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    CheckpointSaver(
        save_dir=str(tmp_path), save_dict={"model": trained}, save_final=True, final_filename="model.pt"
    ).attach(engine)
    engine.run([0], max_epochs=1)
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(stored) == set(trained.state_dict())
    loader = Engine(lambda engine, batch: None)
    CheckpointLoader(load_path=str(tmp_path / "model.pt"), load_dict={"model": fresh}, strict=True).attach(loader)
    loader.run([0], max_epochs=1)
    assert same_answer(trained, fresh)


def test_monai_copy_model_state(trained: SamSegmenter, fresh: SamSegmenter) -> None:
    _, changed, unchanged = copy_model_state(fresh, trained)
    assert set(changed) == set(trained.state_dict()) and not unchanged
    assert same_answer(trained, fresh)


def test_parameters_do_not_load_onto_another_base(
    trained: SamSegmenter, make_segmenter: Make, tiny_weights: Path, tmp_path: Path
) -> None:
    """Whichever way: MONAI's tools know neither adapter.json nor the fingerprint in it."""
    state = torch.load(tiny_weights, weights_only=True)
    torch.save({name: 1.2 * tensor for name, tensor in state.items()}, tmp_path / "other.pth")
    other = make_segmenter(weights=tmp_path / "other.pth", adapters={"lora": {"rank": 2}})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for load in (lambda: other.load_state_dict(trained.state_dict()), lambda: copy_model_state(other, trained)):
        with pytest.raises(WeightsError, match=r"other base weights.*other\.pth"):
            load()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_full_state_leaves_the_switch_as_it_was(trained: SamSegmenter) -> None:
    state = trained.full_state()
    assert trained.full_state_dict is False
    assert "image_encoder.pos_embed" in state and not any(".adapters." in name for name in state)
