# SPDX-License-Identifier: Apache-2.0
"""SAM-DA against its equations, written out here with one loop per head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import move, noise

from samda.adapters import base
from samda.adapters.attach import build_configs
from samda.adapters.sam_da import PromptAttention, SamDaAdapter, SamDaConfig
from samda.adapters.sites import DecoderSite, SiteInfo
from samda.errors import UsageError


def build(**settings: object) -> SamDaAdapter:
    site = DecoderSite(SiteInfo("decoder.0.layer", "decoder", "layer", 0, 256))
    adapter = SamDaConfig(**settings).build(site, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter += noise(*parameter.shape, seed=index, std=0.05, dtype=torch.float64)
    return adapter


def expected(side: PromptAttention, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    prompts = side.prompts if isinstance(side.widen, nn.Identity) else side.prompts @ side.widen.weight.T
    q, k, v = (
        F.linear(t, layer.weight, layer.bias)
        for t, layer in zip((tokens, prompts, prompts), (side.query, side.key, side.value), strict=True)
    )
    d = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        scores = (q[..., own] @ k[:, own].T / d**0.5).exp()
        parts.append(scores / scores.sum(-1, keepdim=True) @ v[:, own])
    tokens = tokens + side.gate * F.linear(torch.cat(parts, -1), side.out.weight, side.out.bias)
    return tokens @ (torch.eye(256, dtype=torch.float64) + side.residual).T  # Lt


@pytest.mark.parametrize("settings", [{}, {"num_prompts": 5, "num_heads": 4, "inner_dim": 64}, {"prompt_dim": 512}])
@pytest.mark.parametrize("side", ["image", "token", "both"])
def test_equations(side: str, settings: dict) -> None:
    adapter = build(side=side, **settings)
    queries, keys = noise(3, 4, 256, seed=1, dtype=torch.float64), noise(3, 30, 256, seed=2, dtype=torch.float64)
    new_queries, new_keys = adapter(queries, keys)
    heads = settings.get("num_heads", 8)
    for name, before, after in (("token", queries, new_queries), ("image", keys, new_keys)):
        if name in adapter.sides:
            assert torch.allclose(after, expected(adapter.sides[name], before, heads), atol=1e-10)
        else:
            assert after is before


def test_gradients_at_the_start_and_later(make_segmenter: Callable[..., nn.Module]) -> None:
    model = make_segmenter(adapters={"sam_da": {"side": "both"}})
    x = noise(1, 1, 64, 64, seed=5).sigmoid()
    for started in (True, False):
        model.zero_grad()
        model(x).square().mean().backward()
        for name, parameter in base.adapter_parameters(model).items():
            awake = name.endswith((".gate", ".residual"))
            assert bool(parameter.grad.any()) == (awake or not started) or name.endswith("key.bias"), name
        move(model)
    assert all(p.grad is None for name, p in base.base_parameters(model).items())


def test_the_bias_of_the_keys_has_no_effect() -> None:
    """It shifts all scores of a query alike, and a softmax does not see that: its gradient is rounding noise."""
    adapter, keys = build(), noise(1, 30, 256, seed=2, dtype=torch.float64)
    before = adapter(keys, keys)[1]
    adapter.sides["image"].key.bias.data.add_(1.0)
    assert torch.allclose(adapter(keys, keys)[1], before, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 395_522),
        ({"num_prompts": 64}, 395_522 + 2 * 62 * 256),
        ({"side": "token"}, 395_522),
        ({"side": "both"}, 2 * 395_522),
        ({"prompt_dim": 512}, 658_690),
    ],
)
def test_counts(settings: dict, count: int, make_segmenter: Callable[..., nn.Module]) -> None:
    model = make_segmenter(adapters={"sam_da": settings})
    assert base.count_parameters(model)["sam_da"] == count


def test_the_encoder_stays_out_of_it(make_segmenter: Callable[..., nn.Module]) -> None:
    model = make_segmenter(adapters={"sam_da": {}})
    assert not model.encoder_adapted
    x = noise(2, 1, 64, 48, seed=5).sigmoid()
    embedding = model.encode(x)
    assert not embedding["embedding"].requires_grad
    assert torch.equal(model(embedding), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": "keys"}, "side must be one of image, token, both, got 'keys'"),
        ({"num_prompts": 0}, "num_prompts must be an integer of at least 1"),
        ({"inner_dim": 100}, "inner_dim must be a multiple of num_heads 8, got 100"),
        ({"prompt_dim": -1}, "prompt_dim must be an integer or null"),
        ({"prompts": 4}, "unknown key 'prompts'; did you mean 'num_prompts'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_configs({"sam_da": settings})
