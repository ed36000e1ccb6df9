# SPDX-License-Identifier: Apache-2.0
"""SAM's ViT image encoder whose blocks name their sites, for any image size that is a multiple of 16.

Parameters carry the official names, so Meta's and MedSAM's files load unchanged. Three things differ from the original
module, with the same results: position tables are resized to the image, query, key and value are computed before
windows are cut (padding tokens are zeros there, so their projection is the bias), and attention runs fused.

The table of absolute positions is resized bicubically with antialiasing. SAMed resizes it bilinearly, SALT averages it:
the tables differ, so parameters trained there do not give the same numbers here.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn as nn
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import PatchEmbed, window_partition, window_unpartition

from samda.adapters.sites import LinearSite, NormSite, ResidualSites, SiteInfo
from samda.networks.attention import DerivedTensors, relative_attention, relative_table
from samda.networks.head import EMBEDDING, Pyramid
from samda.networks.recompute import is_large, recompute

PATCH = 16  # pixels per token, both directions


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, over windows of `window` tokens or (0) the whole grid.

    `prefix` names the block, for instance "encoder.3"; `table_size` is the side of the grid that the stored tables are
    made for.
    """

    def __init__(self, prefix: str, block: int, dim: int, num_heads: int, window: int, table_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = LinearSite(dim, 3 * dim, SiteInfo(f"{prefix}.attn.qkv", "linear", "attn.qkv", block, dim))
        self.proj = LinearSite(dim, dim, SiteInfo(f"{prefix}.attn.proj", "linear", "attn.proj", block, dim))
        length = 2 * (window or table_size) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(length, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(length, dim // num_heads))
        self._tables = DerivedTensors()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        qkv = self.qkv(x)
        if self.window == 0:
            return self.proj(self._attend(qkv))
        qkv, padded = window_partition(self._pad(qkv), self.window)
        x = window_unpartition(self._attend(qkv), self.window, padded, (height, width))
        return self.proj(x)

    def _pad(self, qkv: torch.Tensor) -> torch.Tensor:
        """Pad the grid to whole windows with what a zero token projects to: the bias."""
        batch, height, width, channels = qkv.shape
        rows, columns = -height % self.window, -width % self.window
        if rows == columns == 0:
            return qkv
        padded = self.qkv.bias.to(qkv.dtype).expand(batch, height + rows, width + columns, channels).clone()
        padded[:, :height, :width] = qkv
        return padded

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3 C) -> (N, H, W, C), each of the N grids on its own."""
        count, height, width, channels = qkv.shape
        q, k, v = qkv.view(count, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = relative_attention(q, k, v, self._table("rel_pos_h", height), self._table("rel_pos_w", width))
        return out.transpose(1, 2).reshape(count, height, width, channels // 3)

    def _table(self, name: str, size: int) -> torch.Tensor:
        table = getattr(self, name)
        return self._tables(table, (name, size), lambda: relative_table(table, size))


class MLPBlock(nn.Module):
    """The MLP of a block, its two layers named as in SAM's files."""

    def __init__(self, prefix: str, block: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = LinearSite(dim, hidden, SiteInfo(f"{prefix}.mlp.fc1", "linear", "mlp.fc1", block, dim))
        self.lin2 = LinearSite(hidden, dim, SiteInfo(f"{prefix}.mlp.fc2", "linear", "mlp.fc2", block, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(recompute(self._hidden, x) if is_large(x) else self._hidden(x))

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(x, "gelu")


class Block(nn.Module):
    """A transformer block on tokens (B, H, W, C); arguments as in :class:`Attention`."""

    def __init__(self, block: int, dim: int, num_heads: int, mlp_ratio: float, window: int, table_size: int) -> None:
        super().__init__()
        prefix = f"encoder.{block}"
        self.windowed = window > 0
        self.norm1 = NormSite(dim, SiteInfo(f"{prefix}.norm1", "norm", "norm", block, dim), eps=1e-6)
        self.attn = Attention(prefix, block, dim, num_heads, window, table_size)
        self.attn_sites = ResidualSites(prefix, "attn", block, dim)
        self.norm2 = NormSite(dim, SiteInfo(f"{prefix}.norm2", "norm", "norm", block, dim), eps=1e-6)
        self.mlp = MLPBlock(prefix, block, dim, int(dim * mlp_ratio))
        self.mlp_sites = ResidualSites(prefix, "mlp", block, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = self.norm1(x)
        x = self.attn_sites(x, inputs, self.attn(inputs))
        inputs = self.norm2(x)
        return self.mlp_sites(x, inputs, self.mlp(inputs))


class ImageEncoderViT(nn.Module):
    """SAM's image encoder; sizes as in :class:`samda.networks.backbones.ViTConfig`.

    Attributes:
        checkpointing: keep the input of each block alone for the backward pass, and compute the rest again.
    """

    checkpointing = False

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_blocks: tuple[int, ...],
        image_size: int = 1024,
        window_size: int = 14,
        mlp_ratio: float = 4.0,
        out_channels: int = 256,
    ) -> None:
        super().__init__()
        self.img_size = image_size
        grid = image_size // PATCH
        self.patch_embed = PatchEmbed((PATCH, PATCH), (PATCH, PATCH), in_chans=3, embed_dim=embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(i, embed_dim, num_heads, mlp_ratio, 0 if i in global_blocks else window_size, grid)
            for i in range(depth)
        )
        self.neck = build_neck(embed_dim, out_channels)
        self._positions = DerivedTensors()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized images (B, 3, H, W), H and W multiples of 16 -> embeddings (B, out_channels, H/16, W/16)."""
        return self.pyramid(x, (EMBEDDING,))[EMBEDDING]

    def pyramid(self, x: torch.Tensor, names: Collection[str]) -> Pyramid:
        """The named levels: `embedding`, and `block_i`, the output (B, embed_dim, H/16, W/16) of block i."""
        levels: Pyramid = {}
        x = self.patch_embed(x)
        x = (x + self._position_embedding(x.shape[1], x.shape[2])).contiguous()
        for index, block in enumerate(self.blocks):
            # attention over the whole grid is too expensive to compute twice; see also MLPBlock
            again = self.checkpointing or (is_large(x) and block.windowed)
            x = recompute(block, x) if again else block(x)
            if f"block_{index}" in names:
                levels[f"block_{index}"] = x.permute(0, 3, 1, 2)
        if EMBEDDING in names:
            levels[EMBEDDING] = self.neck(x.permute(0, 3, 1, 2))
        return levels

    def _position_embedding(self, height: int, width: int) -> torch.Tensor:
        """The absolute positions (1, height, width, C), resized where the grid is not the stored one."""
        if self.pos_embed.shape[1:3] == (height, width):
            return self.pos_embed

        def resize() -> torch.Tensor:
            stored = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
            resized = F.interpolate(
                stored.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False, antialias=True
            )
            return resized.permute(0, 2, 3, 1).to(self.pos_embed.dtype)

        return self._positions(self.pos_embed, (height, width), resize)


def build_neck(dim: int, out_channels: int) -> nn.Sequential:
    """SAM's neck: from `dim` channels to the embedding."""
    return nn.Sequential(
        nn.Conv2d(dim, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )
