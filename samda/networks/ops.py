# SPDX-License-Identifier: Apache-2.0
"""Faster forms of operations, with the same results; and :func:`computes_bf16`, where bfloat16 is faster.

Linear layers by oneDNN (:func:`linear`): PyTorch multiplies single precision by MKL, which leaves half of the rate of
AMD's AVX-512 unused and writes the bias before the product.

Attention within the windows of a grid, of which the last ones are partly padding (:func:`window_attention`): padding
tokens share one key k0 and one value v0. For a query q with bias b_j to padding token j they contribute

    sum_j exp(q . k0 + b_j)  =  exp(q . k0 + log sum_j exp(b_j))

to the softmax, so a single token with the logarithm as its bias replaces all of them. On a 16 x 16 grid with windows
of 14, which pad to 28 x 28, a quarter of the products remains.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from samda.networks.attention import DerivedTensors


def computes_bf16(device: torch.device | str) -> bool:
    """Has this CPU bfloat16 products (AMX or AVX512-BF16)? Others emulate them, slower than float32.

    On a Xeon with AMX, predicting took .62 and the encoder of vit_b .43 of the time in float32, docs/performance.md.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing: float32
    return torch.device(device).type == "cpu" and any(capabilities.get(key) for key in ("amx_bf16", "avx512_bf16"))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU of a tensor that the caller gives away: without gradients the result takes its memory, as a second large
    tensor costs more to allocate than to fill.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """x (..., in) -> `F.linear(x, weight, bias)` (..., out), then GELU where `activation` is "gelu".

    In single precision on a CPU with MKL oneDNN computes it. GFLOP/s of one core of an EPYC with AVX-512, 8192 x 128 by
    128 x 512, MKL and oneDNN: 110 and 257, with AVX2 alone 105 and 123. `torch.backends.mkldnn.flags(enabled=False)`
    refuses.
    """
    if _by_onednn(x, weight, bias):
        needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        if not needs_gradient:
            return _onednn(x, weight, bias, activation or "none")
        y = _OneDnnLinear.apply(x, weight, bias)
    else:
        y = F.linear(x, weight, bias)
    return gelu(y) if activation == "gelu" else y


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return (
        x.is_cpu
        and x.ndim > 1
        and x.numel() > 0
        and all(type(t) in (torch.Tensor, nn.Parameter) and t.dtype == torch.float32 for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _has_onednn()
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def _has_onednn() -> bool:
    available = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none") -> torch.Tensor:
    algorithm = "none" if activation == "gelu" else ""  # exact, not by tanh
    if weight.stride() not in ((weight.shape[1], 1), (1, weight.shape[0])):
        weight = weight.contiguous()  # part of a larger matrix: oneDNN's kernel for that takes 1000 times as long
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class _OneDnnLinear(torch.autograd.Function):
    """:func:`linear` with gradients; PyTorch has none for oneDNN's product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            _onednn(gradient, weight.T, None) if of_x else None,
            _onednn(flat.T, x.flatten(0, -2).T, None) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )


def bias_index(window: int) -> torch.Tensor:
    """Which of the window^2 stored biases belongs to a pair of tokens of a window, (window^2, window^2).

    Biases are shared by equal distances (|dy|, |dx|), numbered in the order in which the first token meets them.
    """
    # the first token lies in a corner, so it meets every distance once, row by row: number = |dy| * window + |dx|
    points = torch.tensor(list(itertools.product(range(window), repeat=2)), device="cpu")
    distance = (points[:, None] - points[None, :]).abs()
    return distance[..., 0] * window + distance[..., 1]


def spans(size: int, window: int) -> list[tuple[int, int, int]]:
    """One or two (start, stop, tokens per window) along an axis: complete windows, then a padded one."""
    whole = size - size % window
    return [span for span in ((0, whole, window), (whole, size, size - whole)) if span[0] < span[1]]


def window_bias(bias: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bias of a window whose first `rows` x `columns` tokens are real.

    Args:
        bias: (heads, window^2, window^2), query first.
        rows, columns: of real tokens.

    Returns:
        (heads, rows columns, rows columns), with one more key, the padding, unless all tokens are real.
    """
    window = round(bias.shape[-1] ** 0.5)
    place = torch.arange(window * window, device=bias.device)
    real = (place // window < rows) & (place % window < columns)
    own = bias[:, real]
    if rows == columns == window:
        return own
    return torch.cat([own[..., real], own[..., ~real].logsumexp(-1, keepdim=True)], -1)


def window_attention(
    qkv: torch.Tensor,
    padding: torch.Tensor | None,
    num_heads: int,
    window: int,
    bias: Callable[[int, int], torch.Tensor],
) -> torch.Tensor:
    """Attention of the real tokens within each window.

    Args:
        qkv: (B, H, W, 3 C); each head's channels hold its own query, key and value. The result is (B, H, W, C).
        padding: (3 C,) the same of a padding token; None where the windows need none.
        num_heads: attention heads.
        window: side of the windows in tokens.
        bias: rows, columns -> the result of :func:`window_bias`.
    """
    strips = []
    for top, bottom, rows in spans(qkv.shape[1], window):
        parts = []
        for left, right, columns in spans(qkv.shape[2], window):
            region = qkv[:, top:bottom, left:right].unflatten(1, (-1, rows)).unflatten(3, (-1, columns))
            tokens = region.permute(0, 1, 3, 2, 4, 5)  # (B, down, across, rows, columns, 3 C)
            grid = tokens.shape[:-1]
            tokens = tokens.reshape(-1, rows * columns, qkv.shape[-1])
            if rows * columns < window**2:
                assert padding is not None
                tokens = torch.cat([tokens, padding.expand(len(tokens), 1, -1)], 1)
            q, k, v = tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2).chunk(3, -1)
            mask = bias(rows, columns).to(q.dtype)
            out = _attention(q[:, :, : rows * columns], k, v, mask[None])
            out = out.transpose(1, 2).reshape(*grid, -1).transpose(2, 3)
            parts.append(out.flatten(3, 4).flatten(1, 2))
        strips.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return strips[0] if len(strips) == 1 else torch.cat(strips, 1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`F.scaled_dot_product_attention`; written out in bfloat16 on a CPU, whose kernel takes 1.6 times as long."""
    if q.dtype != torch.bfloat16 or not q.is_cpu or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + mask
    return scores.softmax(-1).to(v.dtype) @ v


def argmax(maps: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`maps.argmax(dim)`, the first of equal values, as int16; on a CPU about ten times faster."""
    maps = maps.movedim(dim, 0)
    best, index = maps[0], torch.zeros_like(maps[0], dtype=torch.int16)
    for k in range(1, len(maps)):
        index.masked_fill_(maps[k] > best, k)
        best = torch.maximum(best, maps[k])
    return index


# Measured on a CPU for a factor of 4: two matrix products take a third of the time of forward and backward pass at 64
# pixels and two thirds at 128; without gradients they are slower from 128 on, and with them from 256 on.
LARGEST_PRODUCT = 128


def upsample(maps: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear interpolation of maps (B, K, h, w) to (B, K, factor h, factor w); pixels are areas, as in SAM."""
    height, width = maps.shape[2:]
    if maps.is_cpu and maps.requires_grad and torch.is_grad_enabled() and max(height, width) <= LARGEST_PRODUCT:
        with torch.autocast("cpu", enabled=False):
            rows, columns = (_matrix(side, factor).to(maps.dtype) for side in (height, width))
            return rows @ maps @ columns.T
    planes = maps.reshape(-1, 1, height, width)  # PyTorch's kernel, and so its rounding, depends on their number
    planes = F.interpolate(planes, (factor * height, factor * width), mode="bilinear", align_corners=False)
    return planes.view(*maps.shape[:2], *planes.shape[2:])


@functools.lru_cache(maxsize=8)
def _matrix(size: int, factor: int) -> torch.Tensor:
    """(factor size, size): what interpolation makes of the unit vectors."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(size, dtype=torch.float64, device="cpu")[None, None]
        return F.interpolate(unit, (factor * size, size), mode="bilinear", align_corners=False)[0, 0]


class ConvNorm(nn.Module):
    """A convolution without bias and the batch norm after it as one; `kernel` // 2 pixels of padding.

    In evaluation, scale and shift of the norm are folded into the convolution. A 1 x 1 convolution of channels-last
    maps is a linear layer, for which CPUs have better kernels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self._folded = DerivedTensors()

    def forward(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W'), then GELU where `activation` is "gelu"."""
        conv, bn = self.conv, self.bn
        if bn.training:
            y = bn(conv(x))
            return gelu(y) if activation == "gelu" else y
        sources = (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        weight, bias = self._folded(sources, "folded", self.fold)  # type: ignore[arg-type]
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
            return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias, activation).permute(0, 3, 1, 2)
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        return gelu(y) if activation == "gelu" else y

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias; computed in fp32 or wider."""
        weight, bn = self.conv.weight, self.bn
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = bn.weight.to(wide) * (bn.running_var.to(wide) + bn.eps).rsqrt()  # type: ignore[union-attr]
        shift = bn.bias.to(wide) - bn.running_mean.to(wide) * scale  # type: ignore[union-attr]
        return (weight.to(wide) * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)
