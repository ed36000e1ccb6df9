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
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.errors import AdapterError

if TYPE_CHECKING:
    from samda.adapters.base import Adapter


@dataclass(frozen=True)
class SiteInfo:
    """Where a site is and what it carries."""

    name: str  # unique in the model, for instance "encoder.3.attn.qkv"
    kind: str  # "linear", "norm", "branch", "tokens" or "decoder"
    role: str  # a role of the table above
    block: int  # index of the encoder block or decoder layer, from 0
    dim: int  # channels of the tokens that enter the site

    @property
    def part(self) -> str:
        """The half of the network: "encoder" or "decoder", the first word of the name."""
        return self.name.split(".")[0]


class Site(nn.Module):
    """Common part of all sites: the adapters that are attached here, by name, in the order of attachment."""

    info: SiteInfo
    adapters: nn.ModuleDict
    merged: bool = False  # are weight deltas folded into a copy of the base parameter?

    def _init_site(self, info: SiteInfo) -> None:
        self.info = info
        self.adapters = nn.ModuleDict()

    def active(self) -> Iterator[Adapter]:
        """The attached adapters that are switched on."""
        return (adapter for adapter in self.adapters.values() if adapter.enabled)  # type: ignore[misc]


class _WeightSite(Site):
    """A site with base parameters: what must happen when they are replaced under the adapters."""

    def unmerge(self) -> None:
        """Drop the merged copy."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a merged copy would be stale after any load, and so would be what an adapter derived from the base weight;
        # adapters load after this, so their own tensors meet the new base
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict:
            for adapter in self.adapters.values():
                adapter.rebase(self.weight)  # type: ignore[operator]


class LinearSite(_WeightSite, nn.Linear):
    """A linear layer with additive weight deltas: y = x W^T + b + sum_a x dW_a^T.

    An adapter may offer the adapted layer as a whole where that is cheaper than base plus delta
    (:meth:`~samda.adapters.base.Adapter.whole`); the first one that does takes the place of the base.

    `merge` keeps W + sum dW beside the base weight, which is never written to; `unmerge` drops it.
    """

    def __init__(self, in_features: int, out_features: int, info: SiteInfo, bias: bool = True) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias)
        self._init_site(info)
        self.merged_weight: torch.Tensor | None
        self.register_buffer("merged_weight", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        adapters = list(self.active())
        y = None
        for index, adapter in enumerate(adapters):
            y = adapter.whole(x, self.weight, self.bias)
            if y is not None:
                del adapters[index]
                break
        if y is None:
            y = F.linear(x, self.weight, self.bias)
        for adapter in adapters:
            y = y + adapter(x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active deltas into one weight (sum in fp32 or wider, then one cast); harmless when repeated.

        Raises:
            AdapterError: the result is not finite; nothing is merged.
        """
        deltas = [adapter.delta() for adapter in self.active()]
        if deltas and self.merged_weight is None:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            total = (self.weight.to(wide) + sum(delta.to(wide) for delta in deltas)).to(self.weight.dtype)
            _check_finite(total, self.info)
            self.merged_weight, self.merged = total, True

    def unmerge(self) -> None:
        """Return to base weight plus deltas."""
        self.merged_weight, self.merged = None, False


class NormSite(_WeightSite, nn.LayerNorm):
    """A LayerNorm whose scale and shift take additive deltas."""

    def __init__(self, dim: int, info: SiteInfo, eps: float = 1e-6) -> None:
        nn.LayerNorm.__init__(self, dim, eps=eps)
        self._init_site(info)
        self.merged_weight: torch.Tensor | None
        self.merged_bias: torch.Tensor | None
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift in force, both (C,)."""
        if self.merged_weight is not None and self.merged_bias is not None:
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
        """Keep scale and shift with their deltas; harmless when repeated.

        Raises:
            AdapterError: the result is not finite; nothing is merged.
        """
        if self.merged_weight is None and any(True for _ in self.active()):
            weight, bias = (tensor.detach().clone() for tensor in self.affine())
            _check_finite(weight, self.info)
            _check_finite(bias, self.info)
            self.merged_weight, self.merged_bias, self.merged = weight, bias, True

    def unmerge(self) -> None:
        """Return to base scale and shift plus deltas."""
        self.merged_weight, self.merged_bias, self.merged = None, None, False


def _check_finite(tensor: torch.Tensor, info: SiteInfo) -> None:
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{info.name}: merging gives values that are not finite; was the training stable?")


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
