# SPDX-License-Identifier: Apache-2.0
"""Random initialization from an explicit generator: building an adapter never touches the global random state."""

from __future__ import annotations

import math

import torch
import torch.nn as nn


def linear(in_features: int, out_features: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    """A linear layer with PyTorch's default distribution, U(-1/sqrt(in), 1/sqrt(in)) for weight and bias."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta")  # its own initialization draws nothing there
    layer = layer.to_empty(device=torch.get_default_device())
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    return layer


def uniform(*shape: int, bound: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def normal(*shape: int, std: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter from N(0, std^2)."""
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def zeros(*shape: int) -> nn.Parameter:
    """A parameter of zeros."""
    return nn.Parameter(torch.zeros(shape))
