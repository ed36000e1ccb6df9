# SPDX-License-Identifier: Apache-2.0
"""MobileSAM's image encoder: TinyViT (arXiv 2207.10666) with SAM's neck, its transformer blocks naming their sites.

Parameters carry the names of timm's `tiny_vit`, whose numbers these are. Blocks norm and project their tokens on the
whole grid and cut windows from the result: the same numbers as for each window, and adapters see the grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.nn as nn

from samda.adapters.sites import LinearSite, NormSite, ResidualSites, SiteInfo
from samda.networks.attention import DerivedTensors
from samda.networks.head import EMBEDDING, Pyramid
from samda.networks.ops import ConvNorm, bias_index, gelu, window_attention, window_bias
from samda.networks.recompute import recompute
from samda.networks.vit import build_neck

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Attention over windows with one learned bias per head and distance; `prefix` names the block."""

    bias_index: torch.Tensor

    def __init__(self, prefix: str, block: int, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.norm = NormSite(dim, SiteInfo(f"{prefix}.norm1", "norm", "norm", block, dim), eps=NORM_EPS)
        self.qkv = LinearSite(dim, 3 * dim, SiteInfo(f"{prefix}.attn.qkv", "linear", "attn.qkv", block, dim))
        self.proj = LinearSite(dim, dim, SiteInfo(f"{prefix}.attn.proj", "linear", "attn.proj", block, dim))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        self.register_buffer("bias_index", bias_index(window), persistent=False)
        self._biases = DerivedTensors()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, W, C) -> normalized input and output of attention, both (B, H, W, C)."""
        inputs = self.norm(x)
        if x.shape[1] % self.window == x.shape[2] % self.window == 0:
            qkv, padding = self.qkv(inputs), None
        else:
            # zero tokens fill the last windows before the norm, as in the original, and come out as the norm's shift
            shift = self.norm.affine()[1].to(inputs.dtype)
            tokens = self.qkv(torch.cat([inputs.flatten(0, 2), shift[None]]))
            qkv, padding = tokens[:-1].unflatten(0, x.shape[:3]), tokens[-1]
        out = window_attention(qkv, padding, self.num_heads, self.window, self._bias)
        return inputs, self.proj(out)

    def _bias(self, rows: int, columns: int) -> torch.Tensor:
        def compute() -> torch.Tensor:
            return window_bias(self.attention_biases[:, self.bias_index], rows, columns)

        return self._biases(self.attention_biases, (rows, columns), compute)


class Mlp(nn.Module):
    """The MLP of a block; like TinyViT's attention it owns its norm."""

    def __init__(self, prefix: str, block: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = NormSite(dim, SiteInfo(f"{prefix}.norm2", "norm", "norm", block, dim), eps=NORM_EPS)
        self.fc1 = LinearSite(dim, hidden, SiteInfo(f"{prefix}.mlp.fc1", "linear", "mlp.fc1", block, dim))
        self.fc2 = LinearSite(hidden, dim, SiteInfo(f"{prefix}.mlp.fc2", "linear", "mlp.fc2", block, hidden))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, W, C) -> normalized input and output of the MLP."""
        inputs = self.norm(x)
        return inputs, self.fc2(self.fc1(inputs, "gelu"))


class Block(nn.Module):
    """A transformer block: attention, a depthwise convolution, an MLP; tokens (B, H, W, C)."""

    def __init__(self, block: int, dim: int, num_heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        prefix = f"encoder.{block}"
        self.attn = Attention(prefix, block, dim, num_heads, window)
        self.attn_sites = ResidualSites(prefix, "attn", block, dim)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)
        self.mlp = Mlp(prefix, block, dim, int(dim * mlp_ratio))
        self.mlp_sites = ResidualSites(prefix, "mlp", block, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn_sites(x, *self.attn(x))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.mlp_sites(x, *self.mlp(x))


class Convolutions(nn.Module):
    """`conv1`, `conv2`, ... with a GELU between them; where `residual`, with the input added and a GELU at the end."""

    def __init__(self, *layers: ConvNorm, residual: bool = False) -> None:
        super().__init__()
        for number, layer in enumerate(layers, start=1):
            self.add_module(f"conv{number}", layer)
        self.residual = residual
        if residual:  # fresh weights begin at the input
            nn.init.zeros_(layers[-1].bn.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *others, last = self.children()
        y = x
        for layer in others:
            y = layer(y, "gelu")
        y = last(y)
        if not self.residual:
            return y
        return gelu(y + x if torch.is_grad_enabled() else y.add_(x))


def separable(in_dim: int, dim: int, out_dim: int, stride: int = 1, residual: bool = False) -> Convolutions:
    """A depthwise convolution of `dim` channels between two that mix channels."""
    layers = ConvNorm(in_dim, dim), ConvNorm(dim, dim, 3, stride, groups=dim), ConvNorm(dim, out_dim)
    return Convolutions(*layers, residual=residual)


class Stage(nn.Module):
    """Patch merging with a stride of 2 or 1, then transformer blocks; maps (B, C, H, W)."""

    def __init__(self, in_dim: int, dim: int, stride: int, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.downsample = separable(in_dim, dim, dim, stride)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = recompute(block, x) if checkpointing else block(x)
        return x.permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """TinyViT with SAM's neck. Stage 0 is convolutional; the last stage keeps the stride, so 16 pixels make a token.

    Sizes are those of :class:`samda.networks.backbones.TinyViTConfig`; images may have any multiple of 16 as sides.

    Attributes:
        checkpointing: as in :class:`samda.networks.vit.ImageEncoderViT`.
    """

    checkpointing = False

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        windows: tuple[int, ...],
        image_size: int = 1024,
        mlp_ratio: float = 4.0,
        out_channels: int = 256,
    ) -> None:
        super().__init__()
        self.img_size = image_size
        self.patch_embed = Convolutions(ConvNorm(3, dims[0] // 2, 3, 2), ConvNorm(dims[0] // 2, dims[0], 3, 2))
        blocks = (separable(dims[0], 4 * dims[0], dims[0], residual=True) for _ in range(depths[0]))
        self.conv_blocks = nn.Sequential(*blocks)
        self.stages = nn.ModuleList()
        for i in range(1, len(dims)):
            first, stride = sum(depths[1:i]), 1 if i == len(dims) - 1 else 2
            own = (Block(first + j, dims[i], num_heads[i], windows[i], mlp_ratio) for j in range(depths[i]))
            self.stages.append(Stage(dims[i - 1], dims[i], stride, own))
        self.neck = build_neck(dims[-1], out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized images (B, 3, H, W), H and W multiples of 16 -> embeddings (B, out_channels, H/16, W/16)."""
        return self.pyramid(x, (EMBEDDING,))[EMBEDDING]

    def pyramid(self, x: torch.Tensor, names: Collection[str]) -> Pyramid:
        """The named levels: `4`, `8` and `16`, outputs of the first three stages at these strides, and `embedding`."""
        # maps and tokens then share one layout, and convolutions are faster
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_blocks(self.patch_embed(x))
        levels = {"4": x}
        for index, stage in enumerate(self.stages):
            x = stage(x, self.checkpointing)
            levels[str(8 << index)] = x
        if EMBEDDING in names:
            levels[EMBEDDING] = self.neck(x)
        return {name: levels[name] for name in names}

    def train(self, mode: bool = True) -> TinyViT:
        """Batch norms never leave evaluation: their statistics belong to the pre-trained base."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def rename_mobile_sam(key: str) -> str | None:
    """The name in :class:`TinyViT` of a parameter of MobileSAM's `image_encoder`; None for its unused classifier.

    MobileSAM keeps patch merging at the end of a stage (`layers.0.downsample`), we at the start of the next one.
    """
    if key.startswith(("head.", "norm_head.")):
        return None
    parts = key.split(".")
    if parts[0] == "layers":
        stage, part, rest = int(parts[1]), parts[2], parts[3:]
        if part == "downsample":
            parts = ["stages", str(stage), "downsample", *rest]
        elif stage == 0:
            parts = ["conv_blocks", *rest]
        else:
            parts = ["stages", str(stage - 1), part, *rest]
    elif parts[:2] in (["patch_embed", "seq"],):
        parts = ["patch_embed", {"0": "conv1", "2": "conv2"}[parts[2]], *parts[3:]]
    return ".".join("conv" if part == "c" else part for part in parts)
