# SPDX-License-Identifier: Apache-2.0
"""Parameter counts on the real backbones, without weights. The numbers come from the formulas in the papers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from adapter_tools import OneLayer

from samda.adapters import base
from samda.adapters.attach import attach, build_configs, detach, scope_parameters
from samda.networks.segmenter import SamSegmenter

PAPER = {"type": "salt", "rank": 256}


@cache
def plain(backbone: str) -> SamSegmenter:
    with torch.device("meta"):
        return SamSegmenter(backbone, weights=None)


def count(backbone: str, settings: dict) -> int:
    """Parameters of one adapter on a backbone."""
    model = plain(backbone)
    attach(model, build_configs({"a": settings}))
    try:
        return base.count_parameters(model)["a"]
    finally:
        detach(model)


@pytest.mark.filterwarnings("ignore:salt")
@pytest.mark.parametrize(
    ("settings", "vit_b", "vit_l", "vit_h"),
    [
        ({"type": "salt"}, 178_272, 479_424, 803_072),
        (PAPER, 8_959_968, 24_235_968, 40_736_000),
        ({"type": "salt", "r": 0.1}, 273_024, 727_680, 1_212_416),
        (PAPER | {"r": 0.1}, 17_013_888, 45_337_728, 75_530_240),
        ({"type": "salt", "r": 1.0}, 73_728, 196_608, 327_680),  # S-SAM
        ({"type": "lka"}, 323_136, 855_168, 1_418_752),
        ({"type": "dka"}, 1_598_208, 3_589_632, 5_310_464),
        ({"type": "dka", "width": 192}, 19_178_496, 43_075_584, 63_725_568),
        ({"type": "dka", "bias": True}, 24 * 67_408, 48 * 75_856, 64 * 84_304),
        ({"type": "sam_da"}, 395_522, 395_522, 395_522),
        ({"type": "norm", "where": "encoder"}, 36_864, 98_304, 163_840),
        ({"type": "norm", "where": "decoder"}, 4_608, 4_608, 4_608),
        ({"type": "norm"}, 41_472, 102_912, 168_448),
    ],
)
def test_vit(settings: dict, vit_b: int, vit_l: int, vit_h: int) -> None:
    assert [count(name, settings) for name in ("vit_b", "vit_l", "vit_h")] == [vit_b, vit_l, vit_h]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "lora", "rank": 4}, 589_824),
        ({"type": "lora", "rank": 256}, 37_748_736),
        ({"type": "lka", "kernel_size": 15}, 356_928),
        ({"type": "lka", "kernel_size": 31}, 498_240),
        ({"type": "lka", "kernel_size": 51}, 813_120),
        ({"type": "lka", "bias": False}, 24 * (2 * 768 * 8 + 8 * 49)),
        ({"type": "bottleneck", "bias": False}, 24 * 2 * 768 * 8),
    ],
)
def test_vit_b(settings: dict, expected: int) -> None:
    assert count("vit_b", settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "salt"}, 32_080),
        ({"type": "lka"}, 71_264),
        ({"type": "dka"}, 959_104),
        ({"type": "sam_da"}, 395_522),
    ],
)
def test_vit_t(settings: dict, expected: int) -> None:
    assert count("vit_t", settings) == expected


@pytest.mark.parametrize(("classes", "expected"), [(2, 675_650), (3, 815_714), (4, 955_778)])
def test_sam_da_with_its_class_head(classes: int, expected: int) -> None:
    """Adapter, and per class a token of 256 and a hypernetwork of 139,808."""
    with torch.device("meta"):
        model = SamSegmenter("vit_b", num_classes=classes, weights=None, adapters={"sam_da": {}})
    assert base.count_parameters(model)["trainable"] == expected
    assert sum(p.numel() for p in scope_parameters(model, "gate").values()) == 131_074


@pytest.mark.parametrize(
    ("role", "out_features", "in_features", "settings", "expected"),
    [
        ("mlp.fc1", 3072, 768, PAPER, 367_716),
        ("attn.qkv", 2304, 768, PAPER, 5_616),
        ("attn.qkv", 2304, 768, PAPER | {"r": 760}, 5_616),
        ("mlp.fc1", 256, 768, PAPER | {"r": 250}, 3_572),  # the neck's 1 x 1 convolution, as a matrix
        ("mlp.fc1", 256, 2304, {"type": "salt", "r": 250}, 548),  # and its 3 x 3 one
    ],
)
@pytest.mark.filterwarnings("ignore:salt")
def test_salt_of_one_layer(role: str, out_features: int, in_features: int, settings: dict, expected: int) -> None:
    with torch.device("meta"):
        model = OneLayer(out_features, in_features, {"a": settings}, role=role)
    assert base.count_parameters(model)["a"] == expected
