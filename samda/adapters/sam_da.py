# SPDX-License-Identifier: Apache-2.0
"""SAM-DA: a decoder adapter for domain adaptation (arXiv 2501.06836).

After each two-way layer l of the mask decoder, N learned prompts A (N, C) modulate the embeddings T (B, n, C):

    S  = Lo( softmax( Lq(T) Lk(A)^T / sqrt(d_head) ) Lv(A) )
    T^ = Lt( T + g S )                                            g a scalar, 0 at the start

T is the image side (keys, n = HW) or the token side (queries). The encoder is unchanged, so images are encoded once.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.adapters.base import Adapter, AdapterConfig, Choices, is_int, random_linear, random_normal, zeros
from samda.adapters.sites import Site

SIDES = {"image": ("image",), "token": ("token",), "both": ("token", "image")}


class PromptAttention(nn.Module):
    """T -> Lt(T + g S) on one side.

    Lt is the identity plus `residual`, a linear map without bias that starts at zero. This is equivalent to a matrix
    that starts as the identity, but exact in every precision, and weight decay pulls it to the identity. Prompts start
    from N(0, 1), projections from PyTorch's default.
    """

    def __init__(self, dim: int, config: SamDaConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        prompt_dim = dim if config.prompt_dim is None else config.prompt_dim
        self.prompts = random_normal(config.num_prompts, prompt_dim, std=1.0, generator=generator)
        self.widen = (
            random_linear(prompt_dim, dim, False, generator) if config.prompt_dim is not None else nn.Identity()
        )
        self.query = random_linear(dim, config.inner_dim, True, generator)
        self.key = random_linear(dim, config.inner_dim, True, generator)
        self.value = random_linear(dim, config.inner_dim, True, generator)
        self.out = random_linear(config.inner_dim, dim, True, generator)
        self.gate = zeros(1)
        self.residual = zeros(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, n, C) -> (B, n, C)."""
        prompts = self.widen(self.prompts)
        q = self._heads(self.query(tokens))  # (B, heads, n, d_head)
        k, v = (self._heads(layer(prompts)[None]) for layer in (self.key, self.value))  # (1, heads, N, d_head)
        k, v = (t.expand(len(tokens), -1, -1, -1) for t in (k, v))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        # cast back: under autocast the sum would have the wider type, and the start would not be the identity
        tokens = tokens + (self.gate * self.out(found)).to(tokens.dtype)
        return tokens + F.linear(tokens, self.residual).to(tokens.dtype)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SamDaAdapter(Adapter):
    """SAM-DA after one decoder layer; an independent :class:`PromptAttention` per side.

    Parameters of a side, C = 256, inner 128, N prompts: 131,712 (attention) + 65,536 (Lt) + 256 N + 1.
    """

    def __init__(self, dim: int, config: SamDaConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.sides = nn.ModuleDict({side: PromptAttention(dim, config, generator) for side in SIDES[config.side]})

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token side (B, M, C) and image side (B, HW, C), both returned."""
        if "token" in self.sides:
            queries = self.sides["token"](queries)
        if "image" in self.sides:
            keys = self.sides["image"](keys)
        return queries, keys

    def scope_params(self) -> dict[str, list[str]]:
        """`decoder`: all parameters; `gate`: gates and Lt, which get a gradient while the gate is zero."""
        gate = [f"sides.{side}.{name}" for side in self.sides for name in ("gate", "residual")]
        return {"gate": gate, "decoder": self.adapter_params()}

    def extra_repr(self) -> str:
        return f"sides={', '.join(self.sides)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamDaConfig(AdapterConfig):
    """Settings of SAM-DA."""

    name: ClassVar[str] = "sam_da"
    roles: ClassVar[tuple[str, ...]] = ("layer",)
    positive: ClassVar[tuple[str, ...]] = ("num_prompts", "num_heads", "inner_dim")
    choices: ClassVar[Choices] = {"side": tuple(SIDES)}

    side: str = "image"  # "image", "token" or "both"
    num_prompts: int = 2  # N, learned prompts of each layer
    num_heads: int = 8  # of the attention
    inner_dim: int = 128  # width of the attention, a multiple of num_heads
    prompt_dim: int | None = None  # width of the prompts; null: that of the decoder, otherwise a linear map is added

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("inner_dim", self.inner_dim % self.num_heads == 0, f"a multiple of num_heads {self.num_heads}")
        self.require("prompt_dim", self.prompt_dim is None or is_int(self.prompt_dim, 1), "an integer or null")

    def build(self, site: Site, generator: torch.Generator) -> SamDaAdapter:
        return SamDaAdapter(site.info.dim, self, generator)
