# SPDX-License-Identifier: Apache-2.0
"""Attention within the windows of a grid, where the last windows of a row and column are partly padding.

Padding tokens are all alike: one key k0 and one value v0. For a query q, whose bias to padding token j is b_j, they
give the softmax

    sum_j exp(q . k0 + b_j)  =  exp(q . k0 + log sum_j exp(b_j))

so one token stands for all of them, with the logarithm as its bias. That is exact. A window then holds its real tokens
and at most one more: on a 16 x 16 grid with windows of 14, which pad to 28 x 28, a quarter of the products remains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["bias_index", "spans", "window_attention", "window_bias"]


def bias_index(window: int) -> torch.Tensor:
    """Which attention bias belongs to a pair of tokens of a window.

    Biases are shared by equal distances (|dy|, |dx|), numbered in the order in which the first token meets them.

    Args:
        window: side of the window in tokens.

    Returns:
        (window^2, window^2) indices into the window^2 stored biases.
    """
    # the first token lies in a corner, so it meets every distance once, row by row: number = |dy| * window + |dx|
    points = torch.tensor(list(itertools.product(range(window), repeat=2)), device="cpu")
    distance = (points[:, None] - points[None, :]).abs()
    return distance[..., 0] * window + distance[..., 1]


def spans(size: int, window: int) -> list[tuple[int, int, int]]:
    """The whole windows along an axis of `size` tokens, and the last one if padding completes it.

    Returns:
        One or two (start, stop, tokens per window).
    """
    whole = size - size % window
    return [span for span in ((0, whole, window), (whole, size, size - whole)) if span[0] < span[1]]


def window_bias(bias: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bias of a window whose first `rows` x `columns` tokens are real.

    Args:
        bias: (heads, window^2, window^2), first the query, then the key.
        rows: of real tokens.
        columns: of real tokens.

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
        qkv: (B, H, W, 3 C); each head's channels hold its own query, key and value.
        padding: (3 C,) the same of a padding token; None where the windows need none.
        num_heads: attention heads.
        window: side of the windows in tokens.
        bias: rows, columns -> the result of :func:`window_bias`.

    Returns:
        (B, H, W, C).
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
            out = F.scaled_dot_product_attention(q[:, :, : rows * columns], k, v, attn_mask=mask[None])
            out = out.transpose(1, 2).reshape(*grid, -1).transpose(2, 3)
            parts.append(out.flatten(3, 4).flatten(1, 2))
        strips.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return strips[0] if len(strips) == 1 else torch.cat(strips, 1)
