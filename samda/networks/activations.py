# SPDX-License-Identifier: Apache-2.0
"""GELU without a second large tensor, which costs more to allocate than to fill."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["Gelu", "gelu"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU of a tensor that the caller gives away: without gradients the result takes its memory."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)


class Gelu(nn.Module):
    """:func:`gelu` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(x)
