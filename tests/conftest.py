# SPDX-License-Identifier: Apache-2.0
"""Networks small enough for every test, made from weight files in the layout of the published ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from samda.models.sam_file import to_segment_anything
from samda.networks.backbones import BackboneConfig, TinyViTConfig, ViTConfig
from samda.networks.segmenter import SamSegmenter
from samda.networks.weights import fetch_weights

TINY_VIT = ViTConfig("test_vit", 32, 2, 2, (1,), window_size=3, image_size=64)
TINY_TINYVIT = TinyViTConfig("test_tinyvit", (8, 16, 24, 32), (1, 1, 2, 1), (1, 2, 3, 4), (3, 3, 2, 3), image_size=64)


def random_state(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state dict for `module` in which no tensor is zero or constant; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
        elif name.endswith("running_var"):
            state[name] = 1 + 0.5 * noise.abs()
        elif tensor.ndim > 1:  # weights keep the size of the signal; position tables get a visible one
            fan_in = tensor[0].numel() if tensor.shape[0] > 1 else 4
            state[name] = noise * fan_in**-0.5
        else:
            state[name] = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
    return state


def original_sam(config: ViTConfig) -> Sam:
    """segment_anything's own model in the sizes of `config`."""
    grid = config.image_size // 16
    encoder = ImageEncoderViT(
        img_size=config.image_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        global_attn_indexes=config.global_blocks,
        window_size=config.window_size,
        out_chans=config.out_channels,
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    prompts = PromptEncoder(config.out_channels, (grid, grid), (config.image_size,) * 2, mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=config.out_channels, num_heads=8, mlp_dim=2048)
    return Sam(encoder, prompts, MaskDecoder(transformer_dim=config.out_channels, transformer=transformer)).eval()


def mobile_sam_name(name: str) -> str:
    """The name that MobileSAM's file has for a tensor of our TinyViT SAM."""
    if not name.startswith("image_encoder.") or ".neck." in name:
        return name
    parts = ["c" if part == "conv" else part for part in name.split(".")]
    if parts[1] == "conv_blocks":
        parts[1:2] = ["layers", "0", "blocks"]
    elif parts[1] == "stages" and parts[3] == "downsample":
        parts[1] = "layers"
    elif parts[1] == "stages":
        parts[1:3] = ["layers", str(int(parts[2]) + 1)]
    elif parts[1] == "patch_embed":
        parts[2:3] = ["seq", {"conv1": "0", "conv2": "2"}[parts[2]]]
    return ".".join(parts)


# importlib mode imports no test module by name, so the functions above reach the tests as fixtures


@pytest.fixture(scope="session", name="random_state")
def _random_state() -> Callable[[nn.Module, int], dict[str, torch.Tensor]]:
    return random_state


@pytest.fixture(scope="session", name="original_sam")
def _original_sam() -> Callable[[ViTConfig], Sam]:
    return original_sam


@pytest.fixture(scope="session", name="mobile_sam_name")
def _mobile_sam_name() -> Callable[[str], str]:
    return mobile_sam_name


@pytest.fixture(scope="session")
def tiny_vit_config() -> ViTConfig:
    """A ViT of 64 px with one windowed and one global block."""
    return TINY_VIT


@pytest.fixture(scope="session")
def tiny_tinyvit_config() -> TinyViTConfig:
    """A TinyViT of 64 px with four transformer blocks."""
    return TINY_TINYVIT


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file for the tiny ViT, in the layout of Meta's files."""
    path = tmp_path_factory.mktemp("weights") / "tiny_vit.pth"
    torch.save(random_state(original_sam(TINY_VIT), seed=1), path)
    return path


@pytest.fixture(scope="session")
def tiny_tinyvit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file for the tiny TinyViT, in the layout of MobileSAM's file."""
    path = tmp_path_factory.mktemp("weights") / "tiny_tinyvit.pt"
    state = random_state(to_segment_anything(TINY_TINYVIT, weights=None), seed=2)
    classifier = {"image_encoder.norm_head.weight": torch.ones(32), "image_encoder.head.weight": torch.zeros(10, 32)}
    torch.save({mobile_sam_name(name): tensor for name, tensor in state.items()} | classifier, path)
    return path


@pytest.fixture
def make_segmenter(tiny_weights: Path, tiny_tinyvit_weights: Path) -> Callable[..., SamSegmenter]:
    """Builds tiny segmenters, the base always the same: `make_segmenter("vit" or "tiny_vit", num_classes=3, ...)`."""

    def make(kind: str = "vit", **kwargs: object) -> SamSegmenter:
        table: dict[str, tuple[BackboneConfig, Path]]
        table = {"vit": (TINY_VIT, tiny_weights), "tiny_vit": (TINY_TINYVIT, tiny_tinyvit_weights)}
        config, weights = table[kind]
        return SamSegmenter(config, **({"num_classes": 3, "weights": weights} | kwargs))  # type: ignore[arg-type]

    return make


@pytest.fixture
def tiny_segmenter(make_segmenter: Callable[..., SamSegmenter]) -> SamSegmenter:
    """A segmenter of three classes on the tiny ViT, without adapters."""
    return make_segmenter()


@pytest.fixture(scope="session")
def vit_t_weights() -> Path:
    """The real pre-trained weights of `vit_t`, fetched once and cached."""
    return fetch_weights("vit_t")
