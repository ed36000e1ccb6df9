# SPDX-License-Identifier: Apache-2.0
"""Folded convolutions against timm's ConvNorm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from timm.models.tiny_vit import ConvNorm, MBConv

from samda.networks.ops import FoldedConvNorm, Gelu, fuse_modules, gelu

KINDS = {"pointwise": {}, "strided": {"ks": 3, "stride": 2, "pad": 1}, "depthwise": {"ks": 3, "pad": 1, "groups": 8}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_timms(random_state: Callable, kind: str) -> None:
    original = ConvNorm(8, 16, **KINDS[kind]).double().eval()
    original.load_state_dict(random_state(original, seed=1))
    folded = FoldedConvNorm(original)
    x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(folded(x), original(x), rtol=0, atol=1e-12)
    assert folded.state_dict().keys() == original.state_dict().keys()
    parameters = list(original.parameters())
    expected = torch.autograd.grad(original(x).square().sum(), parameters)
    for found, wanted in zip(torch.autograd.grad(folded(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"])
def test_new_weights_are_noticed(random_state: Callable, name: str) -> None:
    original = ConvNorm(4, 4).eval()
    original.load_state_dict(random_state(original, seed=1))
    folded, x = FoldedConvNorm(original), torch.randn(1, 4, 3, 3)
    folded(x)
    original.state_dict()[name].mul_(1.5)
    torch.testing.assert_close(folded(x), original(x))


def test_a_batch_norm_that_trains_is_left_alone() -> None:
    folded = FoldedConvNorm(ConvNorm(4, 4)).train()
    folded(torch.randn(2, 4, 3, 3))
    assert int(folded.bn.num_batches_tracked) == 1


@torch.no_grad()
def test_fuse_modules_exchanges_all_of_a_block(random_state: Callable) -> None:
    block = MBConv(8, 8, 4.0, nn.GELU, 0.0).double().eval()
    block.load_state_dict(random_state(block, seed=3))
    x = torch.randn(2, 8, 6, 6).double()
    expected = block(x)
    assert fuse_modules(block) is block
    assert [type(m) for m in block.children()] == [FoldedConvNorm, Gelu] * 3 + [nn.Identity]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_gelu_takes_the_memory_of_its_input_only_without_gradients() -> None:
    x = torch.randn(5)
    expected = nn.functional.gelu(x)
    assert gelu(x).data_ptr() != x.data_ptr()
    with torch.no_grad():
        found = gelu(x)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, expected)
