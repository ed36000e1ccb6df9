# SPDX-License-Identifier: Apache-2.0
"""Kernel adapters: a bottleneck with large depthwise kernels, which widens the receptive field of every block.

LKA, Large Kernel Adapter (arXiv 2506.19118), beside attention and beside the MLP, kernel 7:

    y = Up( DW_7( GELU( Down(x) ) ) )            added to the stream by the block

DKA, Dual-Kernel Adapter (arXiv 2602.18888), on the stream after attention and after the MLP, kernels 51 and 5:

    y = x + Up( GELU( DW_51(u) + DW_5(u) ) ),    u = Down(x)

Both run on the un-windowed token map, so that a kernel crosses the borders of attention windows. A file holds the full
kernels and serves every image size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.adapters import init
from samda.adapters.bottleneck import Bottleneck
from samda.adapters.depthwise import BACKENDS, depthwise
from samda.adapters.settings import AdapterConfig, is_int, is_number
from samda.adapters.sites import Site

__all__ = ["DkaConfig", "KernelAdapter", "KernelAdapterConfig", "LkaConfig"]

PLACEMENTS = {  # the placements (a), (b) and (c) of the LKA paper
    "parallel": ("attn.branch", "mlp.branch"),
    "output": ("attn.output", "mlp.output"),
    "after": ("attn.after", "mlp.after"),
}


class KernelAdapter(Bottleneck):
    """x -> Up(act(sum_k DW_k(act(Down(x))))), each activation optional.

    A sum of depthwise convolutions of one input is the convolution with the sum of their zero-padded kernels, and is
    computed so. Parameters with C channels, width h and n kernels: 2 C h + h sum_k k^2, with biases h (1 + n) + C more.

    Args:
        site: a token or branch site.
        config: settings.
        kernel_sizes: odd, the largest first.
        act: where the GELU is, "pre" or "post" the convolution, or "both".
        generator: of the initialization.
    """

    def __init__(
        self,
        site: Site,
        config: KernelAdapterConfig,
        kernel_sizes: tuple[int, ...],
        act: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site, config.width, config.bias, config.dropout, config.init == "identity", generator)
        self.act, self.backend, width = act, config.conv_backend, config.width
        self.kernels = nn.ParameterList(
            init.uniform(width, 1, k, k, bound=1 / k, generator=generator) for k in kernel_sizes
        )
        self.biases = nn.ParameterList(
            init.uniform(width, bound=1 / k, generator=generator) for k in kernel_sizes if config.bias
        )
        self.folded_kernel: torch.Tensor | None
        self.folded_bias: torch.Tensor | None
        self.register_buffer("folded_kernel", None, persistent=False)
        self.register_buffer("folded_bias", None, persistent=False)

    def mix(self, z: torch.Tensor) -> torch.Tensor:
        if self.act in ("pre", "both"):
            z = F.gelu(z)
        z = depthwise(z, *self._fold(), self.backend)
        return F.gelu(z) if self.act in ("post", "both") else z

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kernel (width, 1, k, k) and bias (width,) of all branches together; summed in fp32 or wider, then cast."""
        if self.folded_kernel is not None:
            return self.folded_kernel, self.folded_bias
        first, *others = self.kernels
        if not others:
            return first, self.biases[0] if len(self.biases) else None
        wide = torch.promote_types(first.dtype, torch.float32)
        kernel = first.to(wide)
        for other in others:
            margin = (first.shape[-1] - other.shape[-1]) // 2
            kernel = kernel + F.pad(other.to(wide), (margin,) * 4)
        bias = torch.stack([b.to(wide) for b in self.biases]).sum(0).to(first.dtype) if len(self.biases) else None
        return kernel.to(first.dtype), bias

    def reparameterize(self) -> bool:
        """Keep the branches as one kernel; False for an adapter of one kernel. The branches stay as they are."""
        if len(self.kernels) > 1 and not self.reparameterized:
            kernel, bias = self._fold()
            self.folded_kernel, self.folded_bias = kernel.detach(), None if bias is None else bias.detach()
            self.reparameterized = True
        return self.reparameterized

    def restore(self) -> None:
        self.folded_kernel = self.folded_bias = None
        self.reparameterized = False

    def _load_from_state_dict(self, *args: Any) -> None:
        self.restore()  # a folded kernel would be stale
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        sizes = ", ".join(str(kernel.shape[-1]) for kernel in self.kernels)
        return f"kernel_sizes=({sizes}), act={self.act}, {super().extra_repr()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelAdapterConfig(AdapterConfig):
    """What LKA and DKA have in common."""

    roles: ClassVar[tuple[str, ...]] = sum(PLACEMENTS.values(), ())
    free: ClassVar[tuple[str, ...]] = ("seed", "init", "dropout", "conv_backend")

    width: int  # channels between the projections
    placement: str  # "parallel" to the sublayer, on its "output", or "after" the sum
    bias: bool  # of projections and kernels
    dropout: float = 0.0  # before Up
    init: str = "identity"  # "identity": Up = 0; "paper": the published code's own distributions
    conv_backend: str = "auto"  # "direct", "fft" (fp32), or "auto": FFT where a CPU trains kernels of 15 or more

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("width", is_int(self.width, 1), "an integer of at least 1")
        self.require_choice("placement", PLACEMENTS)
        self.require("bias", isinstance(self.bias, bool), "true or false")
        self.require("dropout", is_number(self.dropout) and 0 <= self.dropout < 1, "in [0, 1)")
        self.require_choice("init", ("identity", "paper"))
        self.require_choice("conv_backend", BACKENDS)

    def serves(self) -> tuple[str, ...]:
        return PLACEMENTS[self.placement]

    def require_odd(self, key: str) -> None:
        """Refuse the kernel size `key` unless it is odd (a kernel has a center) and positive."""
        self.require(key, is_int(getattr(self, key), 1) and getattr(self, key) % 2 == 1, "an odd integer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LkaConfig(KernelAdapterConfig):
    """Settings of LKA. The published code has act "both" and dropout 0.1."""

    name: ClassVar[str] = "lka"

    width: int = 8
    placement: str = "parallel"
    bias: bool = True
    kernel_size: int = 7  # tokens, odd
    act: str = "pre"  # GELU before the convolution ("pre"), after it ("post") or "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_odd("kernel_size")
        self.require_choice("act", ("pre", "post", "both"))

    def build(self, site: Site, generator: torch.Generator) -> KernelAdapter:
        adapter = KernelAdapter(site, self, (self.kernel_size,), self.act, generator)
        if self.init == "paper":
            for layer in (adapter.down, adapter.up):
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class DkaConfig(KernelAdapterConfig):
    """Settings of DKA. The paper takes width 16 for classification and 192 for segmentation."""

    name: ClassVar[str] = "dka"

    width: int = 16
    placement: str = "after"
    bias: bool = False
    large_kernel: int = 51  # tokens, odd
    small_kernel: int = 5  # tokens, odd
    pre_act: bool = False  # one more GELU, after Down

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_odd("large_kernel")
        self.require_odd("small_kernel")
        self.require(
            "small_kernel", self.small_kernel <= self.large_kernel, f"at most large_kernel {self.large_kernel}"
        )
        self.require("pre_act", isinstance(self.pre_act, bool), "true or false")

    def build(self, site: Site, generator: torch.Generator) -> KernelAdapter:
        sizes = (self.large_kernel, self.small_kernel)
        return KernelAdapter(site, self, sizes, "both" if self.pre_act else "post", generator)
