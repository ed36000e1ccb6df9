# SPDX-License-Identifier: Apache-2.0
"""Folding: the same answers from fewer tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from samda.adapters.attach import fold
from samda.adapters.base import attached, modules, trainable_parameters
from samda.networks.segmenter import SamSegmenter


def test_what_merges_goes_into_the_weights_and_modules_stay(make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = make_segmenter(adapters={"salt": {"rank": 2}, "lora": {}, "norm": {}, "dka": {"large_kernel": 5}})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(network).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        image = torch.rand(2, 1, 64, 64, generator=generator)
        expected, plain = network(image), copy.deepcopy(network)
        fold(network)
        assert torch.allclose(network(image), expected, atol=1e-4 * float(expected.abs().max()))
    left = {path.rpartition(".")[2] for path, _, _ in modules(network)}
    assert left == {"dka"}
    weight, before = (n.image_encoder.blocks[0].attn.qkv.weight for n in (network, plain))
    site = plain.image_encoder.blocks[0].attn.qkv
    deltas = [adapter.delta() for adapter in site.active()]
    assert torch.allclose(weight, before + sum(deltas), atol=1e-6)
    assert len(deltas) == 2 and not torch.equal(weight, before)
    assert list(attached(network)) == ["salt", "lora", "norm", "dka"]
