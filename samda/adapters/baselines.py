# SPDX-License-Identifier: Apache-2.0
"""What adapters are compared with: the class head alone, the mask decoder, everything, and a plain bottleneck."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn as nn

from samda.adapters.base import base_parameters
from samda.adapters.kernel import Bottleneck
from samda.adapters.settings import AdapterConfig, is_int
from samda.adapters.sites import Site
from samda.errors import AdapterError

DECODER = "mask_decoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig(AdapterConfig):
    """The class head alone: nothing is added to it, which is the floor for every adapter."""

    name: ClassVar[str] = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(AdapterConfig):
    """Train SAM's mask decoder itself; a file then holds the decoder."""

    name: ClassVar[str] = "decoder"

    def base_params(self, model: nn.Module) -> list[str]:
        names = [name for name in base_parameters(model) if name.split(".")[0] == DECODER]
        if not names:
            raise AdapterError(f"adapter 'decoder': this model has no {DECODER} to train")
        return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Train all of SAM; a file then holds the whole network. No adapter that builds on the base may join."""

    name: ClassVar[str] = "full"
    alone: ClassVar[bool] = True

    def base_params(self, model: nn.Module) -> list[str]:
        return list(base_parameters(model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """A plain bottleneck adapter after attention and after the MLP: what kernel adapters add to, without the kernel."""

    name: ClassVar[str] = "bottleneck"
    roles: ClassVar[tuple[str, ...]] = ("attn.after", "mlp.after")

    width: int = 8  # channels between the projections
    bias: bool = True  # of the projections

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("width", is_int(self.width, 1), "an integer of at least 1")
        self.require("bias", isinstance(self.bias, bool), "true or false")

    def build(self, site: Site, generator: torch.Generator) -> Bottleneck:
        return Bottleneck(site, self.width, self.bias, dropout=0.0, zero=True, generator=generator)
