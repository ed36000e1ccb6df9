# SPDX-License-Identifier: Apache-2.0
"""What the adapter tests share: fixed noise, adapters that have moved from their start, and a network of one site."""

from __future__ import annotations

import torch
import torch.nn as nn

from samda.adapters.attach import attach, build_configs
from samda.adapters.base import adapter_parameters, modules
from samda.adapters.sites import LinearSite, SiteInfo


def noise(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that depend on nothing but the arguments."""
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def move(model: nn.Module, std: float = 0.05, seed: int = 7) -> None:
    """Add noise to every adapter parameter, as a training would: nothing is at its start any more."""
    for index, parameter in enumerate(adapter_parameters(model).values()):
        parameter += noise(*parameter.shape, seed=seed + index, std=std).to(parameter)


class OneLayer(nn.Module):
    """One linear site and nothing else.

    Args:
        out_features, in_features: of the layer.
        adapter: adapter name -> settings.
        role: role of the site.
        seed: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        adapter: dict | None = None,
        role: str = "mlp.fc1",
        seed: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        info = SiteInfo(f"encoder.0.{role}", "linear", role, 0, in_features)
        self.layer = LinearSite(in_features, out_features, info)
        with torch.no_grad():
            self.layer.weight.copy_(noise(out_features, in_features, seed=seed, std=in_features**-0.5))
            self.layer.bias.copy_(noise(out_features, seed=seed + 1))
        self.to(dtype)
        if adapter:
            attach(self, build_configs(adapter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    @property
    def adapter(self) -> nn.Module:
        """The only adapter."""
        return next(adapter for _, _, adapter in modules(self))
