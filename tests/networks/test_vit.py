# SPDX-License-Identifier: Apache-2.0
"""Our ViT encoder against segment_anything's own module with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT as OriginalEncoder
from segment_anything.modeling.image_encoder import Block as OriginalBlock

from samda.adapters.base import sites
from samda.networks.backbones import ViTConfig
from samda.networks.vit import Block, ImageEncoderViT

Twins = tuple[ImageEncoderViT, OriginalEncoder]


@pytest.fixture
def twins(tiny_vit_config: ViTConfig, original_sam: Callable, random_state: Callable) -> Twins:
    """Our encoder and the original, with the same weights, in double precision: only the formula can differ."""
    original = original_sam(tiny_vit_config).image_encoder
    original.load_state_dict(random_state(original, seed=3))
    ours = tiny_vit_config.build()
    ours.load_state_dict(original.state_dict())  # strict: the official names are ours
    return ours.double(), original.double()


def random_image(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width)).double()


@torch.no_grad()
def test_equals_the_original_at_the_stored_size(twins: Twins) -> None:
    ours, original = twins
    image = random_image(2, 64, 64)
    torch.testing.assert_close(ours(image), original(image), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (112, 48), (16, 16), (128, 128)])
@torch.no_grad()
def test_equals_the_original_at_other_sizes(twins: Twins, height: int, width: int) -> None:
    ours, original = twins
    image = random_image(1, height, width)
    # the original resizes relative positions itself, and takes absolute ones only as they are
    positions = original.pos_embed.permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (height // 16, width // 16), mode="bicubic", antialias=True)
    original.pos_embed = nn.Parameter(positions.permute(0, 2, 3, 1))
    torch.testing.assert_close(ours(image), original(image), rtol=0, atol=1e-11)


def test_gradients_equal_the_original(twins: Twins) -> None:
    gradients = []
    for encoder in twins:
        image = random_image(1, 64, 64).requires_grad_()
        encoder(image).square().mean().backward()
        gradients.append([image.grad, *(parameter.grad for _, parameter in sorted(encoder.named_parameters()))])
    assert all(gradient is not None for gradient in gradients[0])
    for ours, original in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, original, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [0, 14])
@torch.no_grad()
def test_a_block_of_vit_b_equals_the_original_at_1024_pixels(random_state: Callable, window: int) -> None:
    norm = partial(nn.LayerNorm, eps=1e-6)
    sizes = {"norm_layer": norm, "use_rel_pos": True, "window_size": window, "input_size": (64, 64)}
    original = OriginalBlock(768, 12, **sizes)
    original.load_state_dict(random_state(original, seed=4))
    ours = Block(0, 768, 12, 4.0, window, 64)
    ours.load_state_dict(original.state_dict())
    tokens = torch.randn(1, 64, 64, 768, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours(tokens), original(tokens), rtol=0, atol=2e-5)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(twins: Twins) -> None:
    ours, _ = twins
    images = random_image(3, 80, 48)
    torch.testing.assert_close(ours(images)[1:2], ours(images[1:2]), rtol=0, atol=1e-11)


def test_blocks_name_their_sites(tiny_vit_config: ViTConfig) -> None:
    found = {
        name: (site.info.kind, site.info.role, site.info.block, site.info.dim)
        for name, site in sites(tiny_vit_config.build()).items()
    }
    expected = {}
    for block in range(2):
        expected |= {
            f"encoder.{block}.norm1": ("norm", "norm", block, 32),
            f"encoder.{block}.norm2": ("norm", "norm", block, 32),
            f"encoder.{block}.attn.qkv": ("linear", "attn.qkv", block, 32),
            f"encoder.{block}.attn.proj": ("linear", "attn.proj", block, 32),
            f"encoder.{block}.mlp.fc1": ("linear", "mlp.fc1", block, 32),
            f"encoder.{block}.mlp.fc2": ("linear", "mlp.fc2", block, 128),
        }
        for sublayer in ("attn", "mlp"):
            for place, kind in (("output", "tokens"), ("branch", "branch"), ("after", "tokens")):
                role = f"{sublayer}.{place}"
                expected[f"encoder.{block}.{role}"] = (kind, role, block, 32)
    assert found == expected
