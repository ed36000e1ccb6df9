# SPDX-License-Identifier: Apache-2.0
"""Sites: the named places of a network where adapters attach.

The blocks of a network contain these modules, each with a :class:`SiteInfo`. Adapters select sites by kind and role,
not by attribute path, so they work with ViT and TinyViT. A site without adapters is equivalent to the original module:
same outputs, same `state_dict` keys.

Roles, the same for every backbone (the full name is `encoder.<block>.<role>`,
`decoder.<layer>.<role>`, `head.<index of the level>.<role>` or `encoder.input`):

================ ========== ==============================================================================
role             kind       place
================ ========== ==============================================================================
input            input      images (B, C, H, W) in [0, 1] that enter the encoder and the stem of the head
attn.qkv         linear     query, key, value projection of encoder attention
attn.proj        linear     output projection of encoder attention
mlp.fc1          linear     first linear layer of the encoder MLP
mlp.fc2          linear     second linear layer of the encoder MLP
norm             norm       every LayerNorm of the encoder blocks and of the mask decoder's transformer
attn.branch      branch     parallel to attention: reads its normalized input, adds to the stream
attn.output      tokens     the output of attention, before it is added to the stream
attn.after       tokens     the stream after attention was added
mlp.branch       branch     parallel to the MLP: reads its normalized input, adds to the stream
mlp.output       tokens     the output of the MLP, before it is added to the stream
mlp.after        tokens     the stream after the MLP was added
layer            decoder    after a two-way layer of the mask decoder: (queries, keys)
level            level      a standardized level that the head `pyramid` reads: maps (B, C, h, w)
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
from samda.networks.ops import gelu, linear

if TYPE_CHECKING:
    from samda.adapters.base import Adapter


@dataclass(frozen=True)
class SiteInfo:
    """Position and width of a site."""

    name: str  # unique in the model, for example "encoder.3.attn.qkv"
    kind: str  # "input", "linear", "norm", "branch", "tokens", "decoder" or "level"
    role: str  # a role of the table above
    block: int  # index of the encoder block, decoder layer or level, from 0
    dim: int  # channels of the tokens that enter the site

    @property
    def part(self) -> str:
        """The part of the network: "encoder", "decoder" or "head", the first word of the name."""
        return self.name.split(".")[0]


class Site(nn.Module):
    """Base class of sites: the attached adapters by name, in the order of attachment."""

    info: SiteInfo
    adapters: nn.ModuleDict
    merged: bool = False  # are weight deltas merged into a copy of the base parameters?

    def __init__(self, info: SiteInfo) -> None:
        super().__init__()
        self._init_site(info)

    def _init_site(self, info: SiteInfo) -> None:
        self.info = info
        self.adapters = nn.ModuleDict()

    def active(self) -> Iterator[Adapter]:
        """The enabled adapters."""
        return (adapter for adapter in self.adapters.values() if adapter.enabled)  # type: ignore[misc]

    @property
    def adapted(self) -> bool:
        """Is there an enabled adapter?"""
        return any(True for _ in self.active())


class WeightSite(Site):
    """A site with base parameters, to which weight deltas are added.

    `merge` stores the sums in addition to the base parameters, which are never changed; `unmerge` removes them.
    """

    merged_weight: torch.Tensor | None
    merged_bias: torch.Tensor | None  # None where no delta changes the bias

    def _init_site(self, info: SiteInfo) -> None:
        super()._init_site(info)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Are weight deltas merged into a copy of the base parameters?"""
        return self.merged_weight is not None

    def sums(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with the deltas of the active adapters; None for an unchanged bias."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the active deltas into a copy of the base parameters; idempotent."""
        if self.merged or not self.adapted:
            return
        weight, bias = self.sums()
        if not all(torch.isfinite(tensor).all() for tensor in (weight, bias) if tensor is not None):
            raise AdapterError(
                f"{self.info.name}: merging gives values that are not finite; train again with a lower learning rate"
            )
        self.merged_weight, self.merged_bias = weight, bias

    def unmerge(self) -> None:
        """Return to base parameters plus deltas."""
        self.merged_weight = self.merged_bias = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a merged copy, and tensors that an adapter derived from the base weight, are stale after loading; adapters
        # load after this
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict:
            for adapter in self.adapters.values():
                adapter.rebase(self.weight)  # type: ignore[operator]


class LinearSite(WeightSite, nn.Linear):
    """A linear layer with additive weight deltas: y = x W^T + b + sum_a x dW_a^T.

    An adapter may offer the adapted layer as a whole where that is cheaper than base plus delta
    (:meth:`~samda.adapters.base.Adapter.fused_forward`); the first one that does replaces the base layer.
    """

    def __init__(self, in_features: int, out_features: int, info: SiteInfo, bias: bool = True) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias)
        self._init_site(info)

    def forward(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """x (..., in) -> (..., out), then GELU where `activation` is "gelu"."""
        if self.merged_weight is not None:
            return linear(x, self.merged_weight, self.bias, activation)
        adapters = list(self.active())
        if not adapters:
            return linear(x, self.weight, self.bias, activation)
        y = None
        for index, adapter in enumerate(adapters):
            y = adapter.fused_forward(x, self.weight, self.bias)
            if y is not None:
                del adapters[index]
                break
        if y is None:
            y = linear(x, self.weight, self.bias)
        for adapter in adapters:
            y = y + adapter(x)
        return gelu(y) if activation == "gelu" else y

    def sums(self) -> tuple[torch.Tensor, None]:
        """The sum in fp32 or wider, cast once; the bias has no delta."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.weight.to(wide) + sum(adapter.delta().to(wide) for adapter in self.active())
        return total.to(self.weight.dtype), None


class NormSite(WeightSite, nn.LayerNorm):
    """A LayerNorm whose scale and shift take additive deltas."""

    def __init__(self, dim: int, info: SiteInfo, eps: float = 1e-6) -> None:
        nn.LayerNorm.__init__(self, dim, eps=eps)
        self._init_site(info)

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift, both (C,)."""
        weight, bias = self.weight, self.bias
        for adapter in self.active():
            scale, shift = adapter.delta()
            weight, bias = weight + scale, bias + shift
        return weight, bias

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Current scale and shift, both (C,)."""
        if self.merged_weight is not None and self.merged_bias is not None:
            return self.merged_weight, self.merged_bias
        return self.sums()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, *self.affine(), self.eps)


class ChainSite(Site):
    """A chain of adapters on images (B, C, H, W) or a token map (B, H, W, C): x -> adapter(x), with its skip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for adapter in self.active():
            x = adapter(x)
        return x


class BranchSite(Site):
    """Adapters parallel to a sublayer: stream + sum_a adapter_a(inputs), both (B, H, W, C)."""

    def forward(self, stream: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        for adapter in self.active():
            stream = stream + adapter(inputs)
        return stream


class LevelSite(Site):
    """Scale and shift of the channels of maps (B, C, h, w), whose deltas are added to 1 and 0.

    They are multiplied into the 1 x 1 convolutions that read the maps, which is cheaper than to change the maps and
    needs no gradient of them.
    """

    def read(self, layer: nn.Conv2d, maps: torch.Tensor) -> torch.Tensor:
        """`layer` of the scaled and shifted maps."""
        if not self.adapted:
            return layer(maps)
        weight, bias = self.folded(layer.weight)
        return F.conv2d(maps, weight, bias if layer.bias is None else layer.bias + bias)

    def folded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of a layer that reads the maps as they are, and what is added to its bias."""
        deltas = zip(*(adapter.delta() for adapter in self.active()), strict=True)
        scale, shift = (sum(parts).view(1, -1, 1, 1) for parts in deltas)  # type: ignore[attr-defined]
        return weight * (1 + scale), (weight * shift).sum((1, 2, 3))


class DecoderSite(Site):
    """Adapters after a two-way layer of the mask decoder, on queries (B, N, C) and keys (B, HW, C)."""

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for adapter in self.active():
            queries, keys = adapter(queries, keys)
        return queries, keys


class ResidualSites(nn.Module):
    """The three token sites of one residual sublayer, "attn" or "mlp": `output`, `branch` and `after` (see the table).

    `prefix` is the name of the block, for example "encoder.3".
    """

    def __init__(self, prefix: str, sublayer: str, block: int, dim: int) -> None:
        super().__init__()

        def info(place: str, kind: str) -> SiteInfo:
            role = f"{sublayer}.{place}"
            return SiteInfo(f"{prefix}.{role}", kind, role, block, dim)

        self.output = ChainSite(info("output", "tokens"))
        self.branch = BranchSite(info("branch", "branch"))
        self.after = ChainSite(info("after", "tokens"))

    def forward(self, stream: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add `output` of the sublayer to the `stream`; `inputs` is the input of the sublayer (normalized stream)."""
        return self.after(self.branch(stream + self.output(output), inputs))
