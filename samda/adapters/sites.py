# SPDX-License-Identifier: Apache-2.0
"""Sites: the named places of a network where adapters attach.

A network's blocks build these modules into themselves and give each a :class:`SiteInfo`. Adapters find their places by
kind and role, never by searching attribute paths, so ViT and TinyViT look alike to them. A site without adapters is the
plain module: same numbers, same `state_dict` keys.

Roles, the same for every backbone (the full name is `encoder.<block>.<role>` or `decoder.<layer>.<role>`):

================ ========== ==============================================================================
role             kind       place
================ ========== ==============================================================================
attn.qkv         linear     query, key, value projection of encoder attention
attn.proj        linear     output projection of encoder attention
mlp.fc1          linear     first linear layer of the encoder MLP
mlp.fc2          linear     second linear layer of the encoder MLP
norm             norm       every LayerNorm of the encoder blocks and of the mask decoder's transformer
attn.branch      branch     beside attention: reads the normalized input of attention, adds to the stream
attn.output      tokens     the output of attention, before it is added to the stream
attn.after       tokens     the stream after attention was added
mlp.branch       branch     beside the MLP: reads the normalized input of the MLP, adds to the stream
mlp.output       tokens     the output of the MLP, before it is added to the stream
mlp.after        tokens     the stream after the MLP was added
layer            decoder    after a two-way layer of the mask decoder: (queries, keys)
================ ========== ==============================================================================

Tokens are (B, H, W, C) on the un-windowed grid everywhere in the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

if TYPE_CHECKING:
    from samda.adapters.base import Adapter

__all__ = ["SiteInfo", "Site", "LinearSite", "NormSite", "TokenSite", "BranchSite", "DecoderSite", "ResidualSites"]


@dataclass(frozen=True)
class SiteInfo:
    """Where a site is and what it carries."""

    name: str  # unique in the model, for instance "encoder.3.attn.qkv"
    kind: str  # "linear", "norm", "branch", "tokens" or "decoder"
    role: str  # a role of the table above
    block: int  # index of the encoder block or decoder layer, from 0
    dim: int  # channels of the tokens that enter the site


class Site(nn.Module):
    """Common part of all sites: the adapters that are attached here, by name, in the order of attachment."""

    info: SiteInfo
    adapters: nn.ModuleDict

    def _init_site(self, info: SiteInfo) -> None:
        self.info = info
        self.adapters = nn.ModuleDict()

    def active(self) -> Iterator[Adapter]:
        """The attached adapters that are switched on."""
        return (adapter for adapter in self.adapters.values() if adapter.enabled)  # type: ignore[misc]


class LinearSite(nn.Linear, Site):
    """A linear layer with additive weight deltas: y = x W^T + b + sum_a x dW_a^T.

    `merge` keeps W + sum dW beside the base weight, which is never written to; `unmerge` drops it.
    """

    def __init__(self, in_features: int, out_features: int, info: SiteInfo, bias: bool = True) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias)
        self._init_site(info)
        self.register_buffer("merged_weight", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        y = F.linear(x, self.weight, self.bias)
        for adapter in self.active():
            y = y + adapter(x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active deltas into one weight (sum in fp32, then one cast); harmless when already merged."""
        deltas = [adapter.delta() for adapter in self.active()]
        if deltas and self.merged_weight is None:
            total = self.weight.float() + sum(delta.float() for delta in deltas)
            if not torch.isfinite(total).all():
                raise ValueError(f"merging at {self.info.name} gives values that are not finite")
            self.merged_weight = total.to(self.weight.dtype)

    def unmerge(self) -> None:
        """Return to base weight plus deltas."""
        self.merged_weight = None


class NormSite(nn.LayerNorm, Site):
    """A LayerNorm whose scale and shift take additive deltas."""

    def __init__(self, dim: int, info: SiteInfo, eps: float = 1e-6) -> None:
        nn.LayerNorm.__init__(self, dim, eps=eps)
        self._init_site(info)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift in force, both (C,)."""
        if self.merged_weight is not None:
            return self.merged_weight, self.merged_bias
        weight, bias = self.weight, self.bias
        for adapter in self.active():
            scale, shift = adapter.delta()
            weight, bias = weight + scale, bias + shift
        return weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, *self.affine(), self.eps)

    @torch.no_grad()
    def merge(self) -> None:
        """Keep scale and shift with their deltas; harmless when already merged."""
        if self.merged_weight is None and any(True for _ in self.active()):
            self.merged_weight, self.merged_bias = (t.detach().clone() for t in self.affine())

    def unmerge(self) -> None:
        """Return to base scale and shift plus deltas."""
        self.merged_weight = self.merged_bias = None


class TokenSite(Site):
    """Adapters in a chain on one token map (B, H, W, C): x -> adapter(x), the adapter's own skip included."""

    def __init__(self, info: SiteInfo) -> None:
        super().__init__()
        self._init_site(info)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for adapter in self.active():
            x = adapter(x)
        return x


class BranchSite(Site):
    """Adapters beside a sublayer: stream + sum_a adapter_a(inputs), both (B, H, W, C)."""

    def __init__(self, info: SiteInfo) -> None:
        super().__init__()
        self._init_site(info)

    def forward(self, stream: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        for adapter in self.active():
            stream = stream + adapter(inputs)
        return stream


class DecoderSite(Site):
    """After one two-way layer of the mask decoder: queries (B, N, C) and keys (B, HW, C) pass every adapter."""

    def __init__(self, info: SiteInfo) -> None:
        super().__init__()
        self._init_site(info)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for adapter in self.active():
            queries, keys = adapter(queries, keys)
        return queries, keys


class ResidualSites(nn.Module):
    """The three token sites of one residual sublayer: `output`, `branch` and `after` (see the table of roles).

    Args:
        prefix: name of the block, for instance "encoder.3".
        sublayer: "attn" or "mlp".
        block: index of the block.
        dim: channels of the tokens.
    """

    def __init__(self, prefix: str, sublayer: str, block: int, dim: int) -> None:
        super().__init__()

        def info(place: str, kind: str) -> SiteInfo:
            role = f"{sublayer}.{place}"
            return SiteInfo(f"{prefix}.{role}", kind, role, block, dim)

        self.output = TokenSite(info("output", "tokens"))
        self.branch = BranchSite(info("branch", "branch"))
        self.after = TokenSite(info("after", "tokens"))

    def forward(self, stream: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the sublayer's `output` to the `stream`; `inputs` is what the sublayer read (normalized stream)."""
        return self.after(self.branch(stream + self.output(output), inputs))
