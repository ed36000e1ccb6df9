# SPDX-License-Identifier: Apache-2.0
"""LoRA against W + alpha / rank B A."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import OneLayer, move, noise

from samda.adapters import base
from samda.adapters.attach import attach, build_configs
from samda.errors import AdapterError, UsageError


@pytest.mark.parametrize(
    ("settings", "scale"), [({"rank": 3}, 1.0), ({"rank": 4, "alpha": 2.0}, 0.5), ({"alpha": 16}, 4)]
)
def test_formula(settings: dict, scale: float) -> None:
    model, x = OneLayer(24, 10, {"lora": settings}, dtype=torch.float64), noise(7, 10, dtype=torch.float64)
    move(model)
    a, b = model.adapter.down, model.adapter.up
    weight = model.layer.weight + scale * b @ a
    assert torch.allclose(model(x), F.linear(x, weight, model.layer.bias), atol=1e-12)
    base.merge(model)
    assert torch.allclose(model.layer.merged_weight, weight, atol=1e-12)


def test_initialization() -> None:
    adapter = OneLayer(300, 400, {"lora": {"rank": 8}}).adapter
    assert adapter.down.abs().max().item() == pytest.approx(400**-0.5, rel=1e-2)
    assert not adapter.up.any()


def test_only_the_second_factor_learns_in_the_first_step() -> None:
    model = OneLayer(24, 10, {"lora": {}})
    model(noise(7, 10)).square().sum().backward()
    assert not model.adapter.down.grad.any()
    assert model.adapter.up.grad.any()


def test_a_rank_that_no_layer_can_use_is_refused(make_segmenter: Callable[..., nn.Module]) -> None:
    model = make_segmenter()
    state = model.state_dict()
    with pytest.raises(AdapterError, match=r"rank 33 exceeds what encoder\.0\.attn\.qkv can use; choose at most 32"):
        attach(model, build_configs({"norm": {}, "lora": {"rank": 33}}))
    assert base.attached(model) == {}
    assert set(model.state_dict()) == set(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2.0}, "rank must be an integer"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"r": 4}, "unknown key 'r'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_configs({"lora": settings})
