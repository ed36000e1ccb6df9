# SPDX-License-Identifier: Apache-2.0
"""Baselines: the class head alone, the mask decoder, all of SAM, and a bottleneck adapter without kernel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn as nn

from samda.adapters.base import AdapterConfig, base_parameters, in_part
from samda.adapters.kernel import Bottleneck
from samda.adapters.sites import Site
from samda.errors import AdapterError


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig(AdapterConfig):
    """Train only the class head."""

    name: ClassVar[str] = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(AdapterConfig):
    """Fine-tune SAM's mask decoder; adapter files contain the decoder."""

    name: ClassVar[str] = "decoder"

    def base_params(self, model: nn.Module) -> list[str]:
        names = in_part(model, "decoder", base_parameters(model))
        if not names:
            raise AdapterError("adapter 'decoder': this model has no mask decoder to train; attach another adapter")
        return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Fine-tune all of SAM; adapter files contain the whole network. Cannot be combined with weight deltas."""

    name: ClassVar[str] = "full"
    alone: ClassVar[bool] = True

    def base_params(self, model: nn.Module) -> list[str]:
        return list(base_parameters(model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """A bottleneck adapter after attention and after the MLP: a kernel adapter without the kernel."""

    name: ClassVar[str] = "bottleneck"
    roles: ClassVar[tuple[str, ...]] = ("attn.after", "mlp.after")
    positive: ClassVar[tuple[str, ...]] = ("width",)

    width: int = 8  # channels between the projections
    bias: bool = True  # of the projections

    def build(self, site: Site, generator: torch.Generator) -> Bottleneck:
        return Bottleneck(site, self.width, self.bias, dropout=0.0, zero=True, generator=generator)
