# SPDX-License-Identifier: Apache-2.0
"""The baselines: what they train, what they save, and what may join them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import OneLayer, move, noise

from samda.adapters import base
from samda.adapters.adapter_file import load_adapters, save_adapters
from samda.adapters.attach import attach, build_configs, detach
from samda.adapters.baselines import BottleneckConfig
from samda.adapters.sites import ChainSite, SiteInfo
from samda.errors import AdapterError, UsageError

Make = Callable[..., nn.Module]


def image() -> torch.Tensor:
    return noise(2, 1, 64, 48, seed=5).sigmoid()


def declared(name: str, model: nn.Module) -> set[str]:
    names = {key for key, _ in model.named_parameters()}
    decoder = {key for key in names if key.startswith("mask_decoder.")}
    return {"head": set(model.head_params()), "decoder": decoder, "full": names}[name]


@pytest.mark.parametrize("name", ["head", "decoder", "full"])
def test_what_a_baseline_trains(name: str, make_segmenter: Make) -> None:
    plain, model = make_segmenter(), make_segmenter(adapters={name: {}})
    # not bit for bit: PyTorch multiplies with a weight that requires gradients by another routine
    assert torch.allclose(model(image()), plain(image()), atol=1e-5)
    expected = declared(name, model)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == expected
    before = {key: p.clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(image()).square().mean().backward()
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved <= expected
    assert moved >= set(model.head_params())
    assert any(key.startswith("image_encoder.") for key in moved) == (name == "full")
    counts = base.count_parameters(model)
    assert counts["trainable"] == sum(before[key].numel() for key in expected)
    assert counts[name] == counts["trainable"] - (0 if name == "head" else counts["head"])


@pytest.mark.parametrize("name", ["head", "decoder", "full"])
def test_a_file_holds_what_a_baseline_trained(name: str, make_segmenter: Make, tmp_path: Path) -> None:
    model = make_segmenter(adapters={name: {}})
    with torch.no_grad():
        for index, parameter in enumerate(base.trainable_parameters(model).values()):
            parameter += noise(*parameter.shape, seed=index, std=0.01)
    save_adapters(model, tmp_path)
    loaded, strict = (make_segmenter(adapters={name: {}}) for _ in range(2))
    load_adapters(loaded, tmp_path)
    strict.load_state_dict(model.state_dict())
    assert torch.equal(loaded(image()), model(image()))
    assert torch.equal(strict(image()), model(image()))


def test_baselines_cannot_be_switched_or_merged(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"decoder": {}})
    with pytest.raises(AdapterError, match="'decoder'"), base.disabled(model, ["decoder"]):
        pass
    with pytest.raises(AdapterError, match="cannot be merged"):
        base.merge(model, ["decoder"])
    assert base.merge(model) == []
    with base.disabled(model):
        assert not base.is_merged(model)


def test_the_decoder_baseline_joins_an_encoder_adapter(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"decoder": {}, "lora": {}, "sam_da": {}})
    counts = base.count_parameters(model)
    assert counts["trainable"] == counts["decoder"] + counts["lora"] + counts["sam_da"] + counts["head"]
    detach(model)
    assert base.count_parameters(model)["trainable"] == counts["head"]


@pytest.mark.parametrize("first", ["full", "salt"])
def test_nothing_builds_on_weights_that_move(first: str, make_segmenter: Make) -> None:
    model = make_segmenter(adapters={first: {}})
    other = {"full": "salt", "salt": "full"}[first]
    with pytest.raises(AdapterError, match="'full' trains the base weights that 'salt' builds on"):
        attach(model, build_configs({other: {}}))
    assert list(base.attached(model)) == [first]


def test_a_model_without_decoder_is_refused() -> None:
    with pytest.raises(AdapterError, match="no mask decoder"):
        attach(OneLayer(3, 4), build_configs({"decoder": {}}))


@pytest.mark.parametrize("bias", [True, False])
def test_bottleneck_formula(bias: bool) -> None:
    site = ChainSite(SiteInfo("encoder.0.attn.after", "tokens", "attn.after", 0, 12))
    adapter = BottleneckConfig(width=3, bias=bias).build(site, torch.Generator().manual_seed(0)).double()
    adapter.up.weight.data += noise(12, 3, dtype=torch.float64)
    x = noise(2, 4, 5, 12, dtype=torch.float64)
    z = F.linear(x, adapter.down.weight, adapter.down.bias)
    z = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    assert torch.allclose(adapter(x), x + F.linear(z, adapter.up.weight, adapter.up.bias), atol=1e-12)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 12 * 3 + (3 + 12 if bias else 0)


def test_only_up_learns_in_the_first_step(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"bottleneck": {}})
    model(image()).square().mean().backward()
    live = {key.rsplit(".bottleneck.")[1] for key, p in base.adapter_parameters(model).items() if p.grad.any()}
    assert live == {"up.weight", "up.bias"}
    move(model)
    model(image()).square().mean().backward()
    assert all(p.grad.any() for p in base.adapter_parameters(model).values())


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="width must be an integer of at least 1, got 0"):
        build_configs({"bottleneck": {"width": 0}})
    with pytest.raises(UsageError, match="'full': unknown key 'rank'; choose from seed"):
        build_configs({"full": {"rank": 4}})
