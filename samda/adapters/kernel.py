# SPDX-License-Identifier: Apache-2.0
"""Kernel adapters: a bottleneck with large depthwise kernels, which increases the receptive field of every block.

LKA, Large Kernel Adapter (arXiv 2506.19118), parallel to attention and MLP, kernel 7:

    y = Up( DW_7( GELU( Down(x) ) ) )            added to the stream by the block

DKA, Dual-Kernel Adapter (arXiv 2602.18888), on the stream after attention and after the MLP, kernels 51 and 5:

    y = x + Up( GELU( DW_51(u) + DW_5(u) ) ),    u = Down(x)

The published code of both has a second GELU (`act: both` and `pre_act: true`) and dropout 0.1 (`dropout: 0.1`); the
defaults follow the formulas of the papers.

Both run on the un-windowed token map (B, H, W, C), so that kernels cross the borders of attention windows, with stride
1 and zero padding (k - 1) / 2. Files contain the full kernels, for every image size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.fft import next_fast_len

from samda.adapters.base import Adapter, AdapterConfig, Choices, is_int, random_linear, random_uniform
from samda.adapters.sites import Site
from samda.errors import is_finite

PLACEMENTS = {  # the placements (a), (b) and (c) of the LKA paper
    "parallel": ("attn.branch", "mlp.branch"),
    "output": ("attn.output", "mlp.output"),
    "after": ("attn.after", "mlp.after"),
}

BACKENDS = ("auto", "direct", "fft")

# On a CPU, the cost of the gradient of a depthwise convolution grows with k^2, that of the FFT does not; they are equal
# near k = 15 for grids of 16 to 64 and widths of 8 to 192. Without gradient, the direct form (channels last) is faster.
FFT_FROM = 15


class Bottleneck(Adapter):
    """Bottleneck adapter with GELU between the projections (arXiv 1902.00751 without its LayerNorm).

    At a token site it includes the skip, x + Up(GELU(Down(x))); at a branch site the block adds the stream. Only `up`
    starts at zero (`zero`): with both projections at zero, neither would get a gradient. Dropout is before `up`.
    Parameters: 2 C width, with biases width + C more.
    """

    def __init__(
        self, site: Site, width: int, bias: bool, dropout: float, zero: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.skip = site.info.kind == "tokens"
        self.dropout = dropout
        self.down = random_linear(site.info.dim, width, bias, generator)
        self.up = random_linear(width, site.info.dim, bias, generator)
        if zero:
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, H, W, C) -> tokens with the skip at a token site, without it at a branch site."""
        y = self.up(F.dropout(self.mix(self.down(x)), self.dropout, self.training))
        return x + y if self.skip else y

    def mix(self, z: torch.Tensor) -> torch.Tensor:
        """The operation between the projections, on (B, H, W, width)."""
        return F.gelu(z)

    def extra_repr(self) -> str:
        return f"skip={self.skip}"


class KernelAdapter(Bottleneck):
    """x -> Up(act(sum_k DW_k(act(Down(x))))), each activation optional.

    The sum of depthwise convolutions is computed as one convolution with the sum of the zero-padded kernels. Parameters
    with C channels, width h and n kernels: 2 C h + h sum_k k^2, with biases h (1 + n) + C more.

    `act` is the position of the GELU: "pre" (before the convolution), "post" or "both".
    """

    def __init__(self, site: Site, config: KernelAdapterConfig, act: str, generator: torch.Generator) -> None:
        super().__init__(site, config.width, config.bias, config.dropout, config.init == "identity", generator)
        self.act, self.backend, width = act, config.conv_backend, config.width
        kernel_sizes = [getattr(config, key) for key in config.kernels]
        self.kernels = nn.ParameterList(
            random_uniform(width, 1, k, k, bound=1 / k, generator=generator) for k in kernel_sizes
        )
        self.biases = nn.ParameterList(
            random_uniform(width, bound=1 / k, generator=generator) for k in kernel_sizes if config.bias
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
        """Sum of the kernels (width, 1, k, k) and biases (width,) of all branches, in fp32 or wider, then cast."""
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
        """Cache the sum of the branches as one kernel; False for a single kernel. The branches do not change."""
        if len(self.kernels) > 1 and not self.reparameterized:
            kernel, bias = self._fold()
            self.folded_kernel, self.folded_bias = kernel.detach(), None if bias is None else bias.detach()
            self.reparameterized = True
        return self.reparameterized

    def restore(self) -> None:
        self.folded_kernel = self.folded_bias = None
        self.reparameterized = False

    def prepare_export(self) -> None:
        self.backend = "direct"  # not supported by ONNX otherwise

    def _load_from_state_dict(self, *args: Any) -> None:
        self.restore()  # a folded kernel would be stale
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        sizes = ", ".join(str(kernel.shape[-1]) for kernel in self.kernels)
        return f"kernel_sizes=({sizes}), act={self.act}, {super().extra_repr()}"


def crop_kernel(weight: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central part of kernels (C, 1, k, k), at most (2H - 1) x (2W - 1), that overlaps an H x W grid.

    All other taps multiply only padding.
    """
    rows, cols = (max(0, (weight.shape[-1] - (2 * side - 1)) // 2) for side in (height, width))
    return weight[..., rows : weight.shape[-2] - rows, cols : weight.shape[-1] - cols]


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str = "auto") -> torch.Tensor:
    """Depthwise convolution (cross-correlation) of tokens (B, H, W, C).

    `weight` is one odd k x k kernel per channel, (C, 1, k, k). The backend "fft" computes in fp32 or wider; "auto"
    selects the faster one.
    """
    weight = crop_kernel(weight, *x.shape[1:3])
    if backend == "fft" or (backend == "auto" and _prefers_fft(x, weight)):
        return _fft(x, weight, bias)
    # the permuted tokens are in channels-last memory format, which is faster
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1]).permute(0, 2, 3, 1)


def _prefers_fft(x: torch.Tensor, weight: torch.Tensor) -> bool:
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.device.type == "cpu" and trains and min(weight.shape[-2:]) >= FFT_FROM


def _fft(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y[i] = sum_j w[j] x[i + j - p] with p = (k - 1) / 2, by the correlation theorem.

    With a period of H + p, the first H outputs are free of wrap-around.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        (height, width), (rows, cols) = x.shape[1:3], weight.shape[-2:]
        # the next even lengths without prime factors above 5, which are fast for FFTs
        size = [2 * next_fast_len((side + 1) // 2, real=True) for side in (height + rows // 2, width + cols // 2)]
        kernel = F.pad(weight[:, 0].to(wide), (0, size[1] - cols, 0, size[0] - rows))
        kernel = kernel.roll((-(rows // 2), -(cols // 2)), (1, 2))
        spectrum = torch.fft.rfft2(x.to(wide).permute(0, 3, 1, 2), s=size) * torch.fft.rfft2(kernel).conj()
        y = torch.fft.irfft2(spectrum, s=size)[..., :height, :width]
        if bias is not None:
            y = y + bias.to(wide)[:, None, None]
    return y.permute(0, 2, 3, 1).to(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelAdapterConfig(AdapterConfig):
    """Common settings of LKA and DKA."""

    roles: ClassVar[tuple[str, ...]] = sum(PLACEMENTS.values(), ())
    free: ClassVar[tuple[str, ...]] = ("seed", "init", "dropout", "conv_backend")
    positive: ClassVar[tuple[str, ...]] = ("width",)
    choices: ClassVar[Choices] = {
        "placement": tuple(PLACEMENTS),
        "init": ("identity", "paper"),
        "conv_backend": BACKENDS,
    }
    kernels: ClassVar[tuple[str, ...]] = ()  # names of the settings that are kernel sizes, the largest first

    width: int  # channels between the projections
    placement: str  # "parallel" to the sublayer, on its "output", or "after" the sum
    bias: bool  # of projections and kernels
    dropout: float = 0.0  # before Up
    init: str = "identity"  # "identity": Up = 0; "paper": distributions of the published code
    conv_backend: str = "auto"  # "direct", "fft" (fp32), or "auto": FFT for training kernels of 15 or more on a CPU

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("dropout", is_finite(self.dropout) and 0 <= self.dropout < 1, "in [0, 1)")
        for key in self.kernels:  # a kernel has a center
            value = getattr(self, key)
            self.require(key, is_int(value, 1) and value % 2 == 1, "an odd integer")

    def serves(self) -> tuple[str, ...]:
        return PLACEMENTS[self.placement]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LkaConfig(KernelAdapterConfig):
    """Settings of LKA."""

    name: ClassVar[str] = "lka"
    choices: ClassVar[Choices] = {**KernelAdapterConfig.choices, "act": ("pre", "post", "both")}
    kernels: ClassVar[tuple[str, ...]] = ("kernel_size",)

    width: int = 8
    placement: str = "parallel"
    bias: bool = True
    kernel_size: int = 7  # tokens, odd
    act: str = "pre"  # GELU before the convolution ("pre"), after it ("post") or "both"

    def build(self, site: Site, generator: torch.Generator) -> KernelAdapter:
        adapter = KernelAdapter(site, self, self.act, generator)
        if self.init == "paper":
            for layer in (adapter.down, adapter.up):
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class DkaConfig(KernelAdapterConfig):
    """Settings of DKA. The paper uses width 16 for classification and 192 for segmentation."""

    name: ClassVar[str] = "dka"
    kernels: ClassVar[tuple[str, ...]] = ("large_kernel", "small_kernel")

    width: int = 16
    placement: str = "after"
    bias: bool = False
    large_kernel: int = 51  # tokens, odd
    small_kernel: int = 5  # tokens, odd
    pre_act: bool = False  # one more GELU, after Down

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.small_kernel <= self.large_kernel
        self.require("small_kernel", fits, f"at most large_kernel {self.large_kernel}")

    def build(self, site: Site, generator: torch.Generator) -> KernelAdapter:
        return KernelAdapter(site, self, "both" if self.pre_act else "post", generator)
