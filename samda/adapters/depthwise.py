# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution with large kernels, on token maps (B, H, W, C).

Stride 1, zero padding (k - 1) / 2, output of the input's size. On an H x W grid only the central (2H - 1) x (2W - 1)
taps of a kernel ever meet a token; the others see padding only and are left out of the computation, which is exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["BACKENDS", "crop_kernel", "depthwise", "live_taps"]

BACKENDS = ("auto", "direct", "fft")

# On a CPU the direct gradient of a depthwise convolution grows with k^2 and the FFT's does not; they cross near 15, for
# grids of 16 to 64 and widths of 8 to 192. Without gradient the direct form on channels-last memory is the faster one.
FFT_FROM = 15


def live_taps(kernel_size: int, height: int, width: int) -> int:
    """How many of the kernel_size^2 taps can meet a token on a height x width grid."""
    return min(kernel_size, 2 * height - 1) * min(kernel_size, 2 * width - 1)


def crop_kernel(weight: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The live, central part of kernels (C, 1, k, k) on a height x width grid."""
    rows, cols = (max(0, (weight.shape[-1] - (2 * side - 1)) // 2) for side in (height, width))
    return weight[..., rows : weight.shape[-2] - rows, cols : weight.shape[-1] - cols]


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str = "auto") -> torch.Tensor:
    """Depthwise convolution (a cross-correlation, as everywhere in deep learning).

    Args:
        x: tokens (B, H, W, C).
        weight: one odd k x k kernel per channel, (C, 1, k, k).
        bias: (C,) or None.
        backend: "direct", "fft" (in fp32 or wider), or "auto": the faster of the two.

    Returns:
        (B, H, W, C).
    """
    weight = crop_kernel(weight, *x.shape[1:3])
    if backend == "fft" or (backend == "auto" and _prefers_fft(x, weight)):
        return _fft(x, weight, bias)
    # the permuted tokens are channels-last already, which is what the fast kernels want
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1]).permute(0, 2, 3, 1)


def _prefers_fft(x: torch.Tensor, weight: torch.Tensor) -> bool:
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.device.type == "cpu" and trains and min(weight.shape[-2:]) >= FFT_FROM


def _fft(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y[i] = sum_j w[j] x[i + j - p] with p = (k - 1) / 2, by the correlation theorem.

    A period of H + p keeps what wraps around out of the first H outputs.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        (height, width), (rows, cols) = x.shape[1:3], weight.shape[-2:]
        size = (_fast_size(height + rows // 2), _fast_size(width + cols // 2))
        kernel = F.pad(weight[:, 0].to(wide), (0, size[1] - cols, 0, size[0] - rows))
        kernel = kernel.roll((-(rows // 2), -(cols // 2)), (1, 2))
        spectrum = torch.fft.rfft2(x.to(wide).permute(0, 3, 1, 2), s=size) * torch.fft.rfft2(kernel).conj()
        y = torch.fft.irfft2(spectrum, s=size)[..., :height, :width]
        if bias is not None:
            y = y + bias.to(wide)[:, None, None]
    return y.permute(0, 2, 3, 1).to(x.dtype)


def _fast_size(length: int) -> int:
    """The next even length without prime factors above 5, which FFTs handle well."""
    rest = length
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    return length if rest == 1 and length % 2 == 0 else _fast_size(length + 1)
