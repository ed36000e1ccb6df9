# SPDX-License-Identifier: Apache-2.0
"""SAM's mask decoder without prompts, for a batch of images at once; and the head `sam`: K mask tokens, K class maps.

The layers are segment_anything's own modules. Attention and upscaling run fused, LayerNorms become norm sites, and a
decoder site follows each two-way layer. The quality (IoU) token and its head are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import Attention, TwoWayTransformer

from samda.adapters.sites import DecoderSite, NormSite, SiteInfo
from samda.networks.head import EMBEDDING, TOKENS, UPSCALED, ClassHead, ClassHeadConfig, Level, Pyramid
from samda.networks.ops import gelu

DEPTH = 2  # two-way layers
NUM_HEADS = 8
MLP_DIM = 2048


def grid_positions(frequencies: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """SAM's position encoding of a grid, always in single precision: half precision would lose the phase.

    `frequencies` is SAM's random matrix (2, C / 2), x axis first. Returns (1, C, h, w): sines, then cosines.
    """
    with torch.autocast(frequencies.device.type, enabled=False):
        y, x = ((torch.arange(side, device=frequencies.device) + 0.5) / side * 2 - 1 for side in size)
        coordinates = torch.stack([x.expand(size), y[:, None].expand(size)], -1)
        wide = torch.promote_types(frequencies.dtype, torch.float32)
        angles = 2 * torch.pi * coordinates.to(wide) @ frequencies.to(wide)
        return torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1)[None]


class FusedAttention(Attention):
    """The decoder's attention without its matrix in memory, with the parameters of `original`, whose place it takes."""

    def __init__(self, original: Attention) -> None:
        nn.Module.__init__(self)
        self.num_heads = original.num_heads
        self.q_proj, self.k_proj = original.q_proj, original.k_proj
        self.v_proj, self.out_proj = original.v_proj, original.out_proj

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (B, N, C), k and v (B, M, C) -> (B, N, C)."""
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Upscaling(nn.Sequential):
    """SAM's upscaling of the image features by four, with the channels last.

    A transposed convolution whose 2 x 2 windows do not overlap is a linear layer that gives four tokens for one, and a
    norm over channels is the fused LayerNorm then. Parameters have the names and the shapes of SAM's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C / 8, 4h, 4w)."""
        norm: Any = self[1]
        x = _double(x.permute(0, 2, 3, 1), self[0])
        x = gelu(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        return gelu(_double(x, self[3])).permute(0, 3, 1, 2)


def _double(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """(B, h, w, C) -> (B, 2h, 2w, C') by a transposed convolution of kernel and stride 2."""
    weight, bias = layer.weight, layer.bias  # (C, C', 2, 2), (C',)
    windows = F.linear(x, weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4)).unflatten(-1, (2, 2, -1))
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SiteTransformer(TwoWayTransformer):
    """SAM's two-way transformer with sites: every LayerNorm, and the tokens after each layer."""

    def __init__(self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__(depth=depth, embedding_dim=embedding_dim, num_heads=num_heads, mlp_dim=mlp_dim)
        self.sites = nn.ModuleList()
        self.final_attn_token_to_image = FusedAttention(self.final_attn_token_to_image)  # type: ignore[has-type]
        for index, layer in enumerate(self.layers):
            for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
                setattr(layer, name, FusedAttention(getattr(layer, name)))
            for name in ("norm1", "norm2", "norm3", "norm4"):
                setattr(layer, name, _norm_site(f"decoder.{index}.{name}", index, embedding_dim))
            info = SiteInfo(f"decoder.{index}.layer", "decoder", "layer", index, embedding_dim)
            self.sites.append(DecoderSite(info))
        self.norm_final_attn: nn.LayerNorm = _norm_site(f"decoder.{depth}.norm", depth, embedding_dim)

    def forward(
        self, image_embedding: torch.Tensor, image_pe: torch.Tensor, point_embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, C, H, W), its position encoding (B or 1, C, H, W), tokens (B, N, C) -> tokens, image (B, HW, C)."""
        keys = image_embedding.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer, site in zip(self.layers, self.sites, strict=True):
            queries, keys = layer(queries=queries, keys=keys, query_pe=point_embedding, key_pe=key_pe)
            queries, keys = site(queries, keys)
        found = self.final_attn_token_to_image(q=queries + point_embedding, k=keys + key_pe, v=keys)
        return self.norm_final_attn(queries + found), keys


def _norm_site(name: str, block: int, dim: int) -> NormSite:
    return NormSite(dim, SiteInfo(name, "norm", "norm", block, dim), eps=1e-5)


class ClassDecoder(nn.Module):
    """SAM's mask decoder up to the masks: one token per class, and the upscaled image features.

    Args:
        num_classes: K mask tokens, background included.
        embed_dim: channels of the embedding.
        hypernetworks: the class head `sam`, under SAM's name for it; None for another head.
    """

    def __init__(self, num_classes: int, embed_dim: int = 256, hypernetworks: SamHead | None = None) -> None:
        super().__init__()
        self.transformer = SiteTransformer(DEPTH, embed_dim, NUM_HEADS, MLP_DIM)
        self.mask_tokens = nn.Embedding(num_classes, embed_dim)
        self.output_upscaling = Upscaling(embed_dim)
        if hypernetworks is not None:
            self.output_hypernetworks_mlps = hypernetworks

    def forward(
        self,
        embedding: torch.Tensor,
        image_pe: torch.Tensor,
        dense_prompt: torch.Tensor,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, K, C) after the transformer and upscaled image features (B, C / 8, 4h, 4w), of (B, C, h, w).

        Args:
            embedding: (B, C, h, w).
            image_pe: position encoding of the grid, (1, C, h, w).
            dense_prompt: added to the embedding, (1, C, 1, 1) or (B, C, h, w): SAM's "no mask" vector.
            tokens: (B, N, C) in place of the mask tokens.
        """
        if tokens is None:
            tokens = self.mask_tokens.weight.expand(len(embedding), -1, -1)
        tokens, keys = self.transformer(embedding + dense_prompt, image_pe, tokens)
        return tokens, self.output_upscaling(keys.transpose(1, 2).unflatten(2, embedding.shape[2:]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamHeadConfig(ClassHeadConfig):
    """The head `sam` has no settings."""

    type: ClassVar[str] = "sam"
    learning_rate: ClassVar[float] = 1e-2

    @property
    def reads_decoder(self) -> bool:
        return True

    def complete(self, levels: Mapping[str, Level], names: tuple[str, str, str], decoder: bool) -> SamHeadConfig:
        return self

    def build(self, num_classes: int, levels: Mapping[str, Level]) -> SamHead:
        return SamHead(num_classes, levels[EMBEDDING].channels)


class SamHead(ClassHead, nn.ModuleList):
    """The head `sam`, SAM's own: hypernetwork k maps token k to the weights of class k for the upscaled features."""

    name = "sam"
    reads = (EMBEDDING, UPSCALED)
    stride = 4
    feature_stride = 16

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.extend(MLP(embed_dim, embed_dim, embed_dim // 8, 3) for _ in range(num_classes))

    def forward(self, pyramid: Pyramid) -> torch.Tensor:
        """Levels with the decoder's tokens -> class logits (B, K, H / 4, W / 4)."""
        tokens, image = pyramid[TOKENS], pyramid[UPSCALED]
        weights = torch.stack([mlp(tokens[:, k]) for k, mlp in enumerate(self)], 1)
        return (weights @ image.flatten(2)).unflatten(2, image.shape[2:])

    @property
    def trained(self) -> bool:
        """Classes start as copies of one of SAM's masks."""
        first = list(self[0].parameters())
        others = (zip(first, mlp.parameters(), strict=True) for mlp in list(self)[1:])
        return not all(torch.equal(a, b) for pairs in others for a, b in pairs)
