# SPDX-License-Identifier: Apache-2.0
"""TinyViT's convolutions, run faster; the numbers are timm's.

A batch norm that never trains is a scale and a shift per channel, so it belongs into the convolution before it. A 1 x 1
convolution of channels-last maps is a linear layer, for which CPUs have the better kernels.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.tiny_vit import ConvNorm

from samda.networks.activations import Gelu
from samda.networks.attention import DerivedTensors

__all__ = ["FoldedConvNorm", "quicken"]

M = TypeVar("M", bound=nn.Module)


class FoldedConvNorm(ConvNorm):
    """A convolution with the batch norm after it as one convolution; parameters and their names are timm's.

    Args:
        original: whose parts it takes over.
    """

    def __init__(self, original: ConvNorm) -> None:
        nn.Module.__init__(self)
        self.conv: nn.Conv2d = original.conv
        self.bn: nn.BatchNorm2d = original.bn
        self._folded = DerivedTensors()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        conv, bn = self.conv, self.bn
        if bn.training:
            return super().forward(x)
        sources = (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        weight, bias = self._folded(sources, "folded", self._fold)  # type: ignore[arg-type]
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias; computed in fp32 or wider."""
        weight, bn = self.conv.weight, self.bn
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = bn.weight.to(wide) * (bn.running_var.to(wide) + bn.eps).rsqrt()  # type: ignore[union-attr]
        shift = bn.bias.to(wide) - bn.running_mean.to(wide) * scale  # type: ignore[union-attr]
        return (weight.to(wide) * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def quicken(module: M) -> M:
    """Exchange timm's ConvNorm and GELU within `module`, in place, for ours; returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, FoldedConvNorm(child))
        elif isinstance(child, nn.GELU):
            setattr(module, name, Gelu())
        else:
            quicken(child)
    return module
