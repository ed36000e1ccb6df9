# SPDX-License-Identifier: Apache-2.0
"""LoRA: a low-rank weight delta (arXiv 2106.09685) in the linear layers of the encoder."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from samda.adapters.base import Adapter, LinearAdapterConfig, random_uniform, zeros
from samda.adapters.sites import LinearSite, Site
from samda.errors import AdapterError, is_finite
from samda.networks.ops import linear


class LoraAdapter(Adapter):
    """dW = (alpha / rank) B A with A (rank, in) random and B (out, rank) zero: rank (in + out) parameters."""

    mergeable = True

    def __init__(self, site: LinearSite, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scaling = alpha / rank
        bound = 1 / math.sqrt(site.in_features)
        self.down = random_uniform(rank, site.in_features, bound=bound, generator=generator)
        self.up = zeros(site.out_features, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> x dW^T (..., out)."""
        return linear(self.scaling * linear(x, self.down), self.up)

    def delta(self) -> torch.Tensor:
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.scaling * self.up.to(wide) @ self.down.to(wide)

    def extra_repr(self) -> str:
        return f"rank={len(self.down)}, scaling={self.scaling:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(LinearAdapterConfig):
    """Settings of LoRA."""

    name: ClassVar[str] = "lora"
    positive: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 4  # of the delta
    alpha: float | None = None  # the delta is scaled by alpha / rank; null means alpha = rank

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("alpha", self.alpha is None or (is_finite(self.alpha) and self.alpha > 0), "positive or null")

    def build(self, site: Site, generator: torch.Generator) -> LoraAdapter:
        assert isinstance(site, LinearSite)
        limit = min(site.in_features, site.out_features)
        if self.rank > limit:
            raise AdapterError(f"lora: rank {self.rank} exceeds what {site.info.name} can use; choose at most {limit}")
        return LoraAdapter(site, self.rank, self.rank if self.alpha is None else self.alpha, generator)
