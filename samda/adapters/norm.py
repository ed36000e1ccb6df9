# SPDX-License-Identifier: Apache-2.0
"""Scale and shift of LayerNorms as deltas; the base parameters do not change."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from samda.adapters.base import Adapter, AdapterConfig, Choices, zeros
from samda.adapters.sites import Site, SiteInfo


class ScaleShiftAdapter(Adapter):
    """Deltas of a scale and a shift, both (C,), from zero on: 2 C parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = zeros(dim)
        self.shift = zeros(dim)

    def delta(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scale, self.shift


class NormAdapter(ScaleShiftAdapter):
    """weight + scale, bias + shift of a LayerNorm."""

    mergeable = True

    def scope_params(self) -> dict[str, list[str]]:
        return {"norm": self.adapter_params()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig(AdapterConfig):
    """Settings of the norm adapter."""

    name: ClassVar[str] = "norm"
    roles: ClassVar[tuple[str, ...]] = ("norm",)
    choices: ClassVar[Choices] = {"where": ("encoder", "decoder", "both")}

    where: str = "both"  # LayerNorms of the "encoder", of the "decoder" or of "both"

    def targets(self, info: SiteInfo) -> bool:
        return super().targets(info) and self.where in ("both", info.part)

    def build(self, site: Site, generator: torch.Generator) -> NormAdapter:
        return NormAdapter(site.info.dim)
