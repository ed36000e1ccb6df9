# SPDX-License-Identifier: Apache-2.0
"""SSF: scale and shift of the levels that the head `pyramid` reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from adapter_tools import move, noise

from samda.adapters import base
from samda.adapters.attach import attach, build_configs, default_scope, scope_parameters
from samda.adapters.sites import LevelSite, SiteInfo
from samda.errors import AdapterError
from samda.networks.segmenter import SamSegmenter

Make = Callable[..., SamSegmenter]


@pytest.mark.parametrize("bias", [True, False])
def test_formula_of_two_that_add_up(bias: bool) -> None:
    site = LevelSite(SiteInfo("head.4.level", "level", "level", 0, 6))
    layer = nn.Conv2d(6, 5, 1, bias=bias)
    model = nn.ModuleList([site, layer])
    attach(model, build_configs({"ssf": {}, "other": {"type": "ssf"}}))
    x = noise(2, 6, 3, 4)
    assert torch.equal(site.read(layer, x), layer(x))
    move(model)
    one, two = site.adapters["ssf"], site.adapters["other"]
    scale, shift = ((one.scale + two.scale)[:, None, None], (one.shift + two.shift)[:, None, None])
    torch.testing.assert_close(site.read(layer, x), layer((1 + scale) * x + shift))


@torch.no_grad()
def test_cached_pyramids_stay_valid(make_segmenter: Make) -> None:
    network = make_segmenter("tiny_vit", head="pyramid", adapters=["ssf"])
    for index, layer in enumerate(network.head.linear):
        layer.weight.copy_(noise(*layer.weight.shape, seed=index))
    image = noise(1, 1, 64, 48).sigmoid()
    pyramid, before = network.encode(image), network(image)
    move(network)
    assert not network.encoder_adapted
    assert torch.equal(network(pyramid), network(image))
    assert not torch.allclose(network(image), before, atol=1e-2)


@torch.no_grad()
def test_it_acts_on_the_standardized_levels(make_segmenter: Make) -> None:
    """Levels of other moments, standardized by theirs, are equal to those of the training."""
    network = make_segmenter("tiny_vit", head="pyramid", adapters=["ssf"])
    for index, layer in enumerate(network.head.linear):
        layer.weight.copy_(noise(*layer.weight.shape, seed=index))
    pyramid = network.encode(noise(1, 1, 64, 48).sigmoid())
    expected = network(pyramid)
    other = dict(pyramid)
    for site, name in zip(network.head.sites, network.head.levels, strict=True):
        other[name] = 1.25 * pyramid[name] + 0.5
        site.adapters["ssf"].scale.fill_(1 / 1.25 - 1)
        site.adapters["ssf"].shift.fill_(-0.5 / 1.25)
    torch.testing.assert_close(network(other), expected, rtol=1e-4, atol=1e-4)


def test_a_small_scope_of_its_own(make_segmenter: Make) -> None:
    with torch.device("meta"):
        network = SamSegmenter("vit_t", weights=None, head="pyramid", adapters=["ssf"])
    assert base.count_parameters(network)["ssf"] == 2 * (64 + 128 + 256)
    assert list(scope_parameters(network, "ssf")) == list(base.adapter_parameters(network))


@pytest.mark.parametrize(
    ("adapters", "scope"),
    [
        (["ssf"], "ssf"),
        (["sam_da"], "decoder"),
        (["lora", "sam_da", "norm", "ssf"], "ssf+decoder"),
        (["lora", "norm"], "norm"),
        (["lora", "head"], "encoder"),
    ],
)
def test_scope_without_a_choice(make_segmenter: Make, adapters: list[str], scope: str) -> None:
    assert default_scope(make_segmenter(head="pyramid", adapters=adapters)) == scope


def test_without_its_levels_it_is_refused(make_segmenter: Make) -> None:
    with pytest.raises(AdapterError, match="'ssf' finds none of its sites"):
        make_segmenter(head="sam", adapters=["ssf"])
    with pytest.raises(AdapterError, match="no adapter"):
        default_scope(make_segmenter(head="pyramid", adapters=["head"]))
