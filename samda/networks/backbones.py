# SPDX-License-Identifier: Apache-2.0
"""The image encoders: their sizes, and how to build them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn as nn

from samda.errors import UsageError, from_mapping, nearest
from samda.io import plain
from samda.networks.head import EMBEDDING, Level
from samda.networks.tiny_vit import TinyViT
from samda.networks.vit import ImageEncoderViT

MOST_BLOCKS, LARGEST_SIZE = 64, 8192  # far beyond any SAM; a file may not ask for more


@dataclasses.dataclass(frozen=True)
class BackboneConfig(ABC):
    """Sizes of one image encoder."""

    type: ClassVar[str]

    name: str
    image_size: int = dataclasses.field(default=1024, kw_only=True)  # pixels, what the position tables are stored for
    out_channels: int = dataclasses.field(default=256, kw_only=True)  # of the embedding

    @abstractmethod
    def build(self) -> nn.Module:
        """The encoder with fresh weights: (B, 3, H, W) -> (B, out_channels, H / 16, W / 16)."""

    @abstractmethod
    def levels(self) -> dict[str, Level]:
        """Levels of the feature pyramid that the encoder hands out (`encoder.pyramid(x, names)`), fine to coarse."""

    @property
    @abstractmethod
    def head_levels(self) -> tuple[str, str, str]:
        """The levels that a class head reads by default, fine to coarse."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):  # as JSON has it
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
            value = getattr(self, field.name)
            numbers = () if field.name == "name" else value if isinstance(value, tuple) else (value,)
            most = MOST_BLOCKS if field.name in ("depth", "depths") else LARGEST_SIZE
            whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= most for n in numbers)
            if not whole or len(numbers) > MOST_BLOCKS:
                raise UsageError(f"backbone: {field.name} must be whole numbers up to {most}, got {value!r:.100}")

    def sizes(self) -> dict[str, Any]:
        """All fields but the name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}

    def to_json(self) -> str | dict[str, Any]:
        """The name of a known backbone, else plain values from which :func:`backbone_config` builds it again."""
        if BACKBONES.get(self.name) == self:
            return self.name
        return {"type": self.type, "name": self.name} | plain(self.sizes())


@dataclasses.dataclass(frozen=True)
class ViTConfig(BackboneConfig):
    """Sizes of :class:`samda.networks.vit.ImageEncoderViT`."""

    type: ClassVar[str] = "vit"

    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]  # these attend over the whole grid, the others over windows
    window_size: int = 14  # tokens

    def build(self) -> nn.Module:
        return ImageEncoderViT(**self.sizes())

    def levels(self) -> dict[str, Level]:
        blocks = {f"block_{index}": Level(self.embed_dim, 16) for index in range(self.depth)}
        return blocks | {EMBEDDING: Level(self.out_channels, 16)}

    @property
    def head_levels(self) -> tuple[str, str, str]:
        """Of SAM's encoders the first two blocks that attend over the whole grid, in general a quarter and a half."""
        early, middle = (f"block_{max(0, self.depth // part - 1)}" for part in (4, 2))
        return early, middle, EMBEDDING


@dataclasses.dataclass(frozen=True)
class TinyViTConfig(BackboneConfig):
    """Sizes of :class:`samda.networks.tiny_vit.TinyViT`, one entry per stage; stage 0 is convolutional."""

    type: ClassVar[str] = "tiny_vit"

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...]  # tokens

    def build(self) -> nn.Module:
        return TinyViT(**self.sizes())

    def levels(self) -> dict[str, Level]:
        strides = {"4": 4, "8": 8, "16": 16}
        stages = {name: Level(dim, strides[name]) for name, dim in zip(strides, self.dims, strict=False)}
        return stages | {EMBEDDING: Level(self.out_channels, 16)}

    @property
    def head_levels(self) -> tuple[str, str, str]:
        return "4", "8", EMBEDDING


BACKBONES: dict[str, BackboneConfig] = {
    "vit_t": TinyViTConfig("vit_t", (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)),
    "vit_b": ViTConfig("vit_b", 768, 12, 12, (2, 5, 8, 11)),
    "vit_l": ViTConfig("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": ViTConfig("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
}


TYPES: dict[str, type[BackboneConfig]] = {config.type: config for config in (ViTConfig, TinyViTConfig)}


def backbone_config(backbone: str | Mapping[str, Any] | BackboneConfig) -> BackboneConfig:
    """The config of a named backbone, or of a mapping {"type": "vit" or "tiny_vit", sizes}; a config passes through."""
    if isinstance(backbone, BackboneConfig):
        return backbone
    if isinstance(backbone, Mapping):
        values = dict(backbone)
        kind = str(values.pop("type", "none"))
        if kind not in TYPES:
            raise UsageError(f"backbone type {kind!r} is unknown; {nearest(kind, TYPES)}")
        return from_mapping(TYPES[kind], values, "backbone")
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise UsageError(f"unknown backbone {backbone!r}; {nearest(str(backbone), BACKBONES)}")
    return BACKBONES[backbone]
