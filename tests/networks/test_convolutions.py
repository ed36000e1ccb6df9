# SPDX-License-Identifier: Apache-2.0
"""Folded convolutions and blocks of them against timm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from timm.models import tiny_vit as timm

from samda.networks.ops import ConvNorm, gelu
from samda.networks.tiny_vit import Convolutions, separable

KINDS = {"pointwise": (1, 1, 1), "strided": (3, 2, 1), "depthwise": (3, 1, 8)}  # kernel, stride, groups


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_timms(random_state: Callable, kind: str) -> None:
    kernel, stride, groups = KINDS[kind]
    original = timm.ConvNorm(8, 16, kernel, stride, kernel // 2, groups=groups).double().eval()
    folded = ConvNorm(8, 16, kernel, stride, groups).double().eval()
    for module in (original, folded):
        module.load_state_dict(random_state(original, seed=1))
    x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(folded(x), original(x), rtol=0, atol=1e-12)
    assert folded.state_dict().keys() == original.state_dict().keys()
    gradients = [torch.autograd.grad(module(x).square().sum(), module.parameters()) for module in (folded, original)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"])
def test_new_weights_are_noticed(random_state: Callable, name: str) -> None:
    original, folded, x = timm.ConvNorm(4, 4).eval(), ConvNorm(4, 4).eval(), torch.randn(1, 4, 3, 3)
    state = random_state(original, seed=1)
    folded.load_state_dict(state)
    folded(x)
    state[name] *= 1.5
    original.load_state_dict(state)
    folded.state_dict()[name].mul_(1.5)
    torch.testing.assert_close(folded(x), original(x))


def test_a_batch_norm_that_trains_is_left_alone() -> None:
    folded = ConvNorm(4, 4).train()
    folded(torch.randn(2, 4, 3, 3))
    assert int(folded.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["PatchEmbed", "MBConv", "PatchMerging"])
def test_blocks_of_convolutions_are_timms(random_state: Callable, name: str) -> None:
    original, ours = {
        "PatchEmbed": (timm.PatchEmbed(3, 8, nn.GELU), Convolutions(ConvNorm(3, 4, 3, 2), ConvNorm(4, 8, 3, 2))),
        "MBConv": (timm.MBConv(3, 3, 4.0, nn.GELU, 0.0), separable(3, 12, 3, residual=True)),
        "PatchMerging": (timm.PatchMerging(3, 8, nn.GELU), separable(3, 8, 8, stride=2)),
    }[name]
    state = random_state(original, seed=3)
    images = []
    for block in (original, ours):
        block.double().eval().load_state_dict(state)
        images.append(torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_())
    expected, found = original(images[0]), ours(images[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for value in (expected, found):
        value.square().sum().backward()
    torch.testing.assert_close(images[1].grad, images[0].grad, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours(images[0]), expected, rtol=0, atol=1e-12)


def test_gelu_takes_the_memory_of_its_input_only_without_gradients() -> None:
    x = torch.randn(5)
    expected = nn.functional.gelu(x)
    assert gelu(x).data_ptr() != x.data_ptr()
    with torch.no_grad():
        found = gelu(x)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, expected)
