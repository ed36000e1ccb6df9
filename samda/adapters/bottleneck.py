# SPDX-License-Identifier: Apache-2.0
"""The bottleneck that LKA, DKA and the plain adapter share: x -> Up(mix(Down(x)))."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.adapters import init
from samda.adapters.base import Adapter
from samda.adapters.sites import Site

__all__ = ["Bottleneck"]


class Bottleneck(Adapter):
    """The plain bottleneck adapter, GELU between the projections (arXiv 1902.00751 without its LayerNorm).

    At a token site it holds its own skip, x + Up(GELU(Down(x))); at a branch site the stream is added there. Only `up`
    starts at zero: with both projections at zero neither would ever get a gradient. Parameters: 2 C width, with biases
    width + C more.

    Args:
        site: a token or branch site; tokens are (B, H, W, C).
        width: channels between the projections.
        bias: do the projections have biases?
        dropout: probability, before `up`.
        zero: start `up` at zero?
        generator: of the initialization, PyTorch's default distributions.
    """

    def __init__(
        self, site: Site, width: int, bias: bool, dropout: float, zero: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.skip = site.info.kind == "tokens"
        self.dropout = dropout
        self.down = init.linear(site.info.dim, width, bias, generator)
        self.up = init.linear(width, site.info.dim, bias, generator)
        if zero:
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, H, W, C) -> tokens with the skip at a token site, the branch's part alone at a branch site."""
        y = self.up(F.dropout(self.mix(self.down(x)), self.dropout, self.training))
        return x + y if self.skip else y

    def mix(self, z: torch.Tensor) -> torch.Tensor:
        """What happens between the projections, on (B, H, W, width)."""
        return F.gelu(z)

    def extra_repr(self) -> str:
        return f"skip={self.skip}"
