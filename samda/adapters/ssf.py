# SPDX-License-Identifier: Apache-2.0
"""SSF: scale and shift of features (arXiv 2210.08823), at the levels of the encoder that the head `pyramid` reads.

With the features u of a channel, standardized by the head,

    u' = (1 + scale) u + shift

The encoder is unchanged, so images are encoded once. Another scanner shifts and scales these channels; `samda adapt`
moves them back by this adapter.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from samda.adapters.base import AdapterConfig
from samda.adapters.norm import ScaleShiftAdapter
from samda.adapters.sites import Site


class SsfAdapter(ScaleShiftAdapter):
    """Scale and shift of one level."""

    pace = 10.0  # few numbers, in standard deviations of their channels

    def scope_params(self) -> dict[str, list[str]]:
        return {"ssf": self.adapter_params()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SsfConfig(AdapterConfig):
    """Settings of SSF; it has none but the seed."""

    name: ClassVar[str] = "ssf"
    roles: ClassVar[tuple[str, ...]] = ("level",)

    def build(self, site: Site, generator: torch.Generator) -> SsfAdapter:
        return SsfAdapter(site.info.dim)
