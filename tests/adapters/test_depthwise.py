# SPDX-License-Identifier: Apache-2.0
"""The depthwise convolution against PyTorch's own, uncropped, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_tools import noise

from samda.adapters.kernel import BACKENDS, crop_kernel, depthwise, live_taps


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The whole kernel on contiguous channels-first memory."""
    y = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(9, 9), (5, 12), (16, 4)])
@pytest.mark.parametrize("k", [1, 5, 15, 31])
@pytest.mark.parametrize("biased", [True, False])
def test_forward_and_gradients(backend: str, size: tuple[int, int], k: int, biased: bool) -> None:
    x, weight = noise(2, *size, 3, seed=1), noise(3, 1, k, k, seed=2)
    bias, g = noise(3, seed=3) if biased else None, noise(2, *size, 3, seed=4)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = reference(*inputs, *([] if biased else [None]))
    gradients = torch.autograd.grad(expected, inputs, g.double())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        own = [t.detach().to(dtype).requires_grad_() for t in inputs]
        found = depthwise(*own, *([] if biased else [None]), backend)
        assert found.dtype == dtype
        pairs = [(found, expected), *zip(torch.autograd.grad(found, own, g.to(dtype)), gradients, strict=True)]
        for one, two in pairs:
            assert (one.double() - two).abs().max() <= tolerance * two.abs().max()


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_only_live_taps_get_a_gradient(backend: str) -> None:
    """On 14 x 14 a kernel of 51 is its central 27 x 27 (2 * 14 - 1), and the rest has gradient exactly zero."""
    x, weight = noise(1, 14, 14, 2, seed=1), noise(2, 1, 51, 51, seed=2).requires_grad_()
    y = depthwise(x, weight, None, backend)
    small = weight.detach()[..., 12:39, 12:39]
    assert torch.allclose(y, reference(x, small, None), atol=1e-3)
    assert torch.allclose(y, reference(x, weight.detach(), None), atol=1e-3)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight)
    assert gradient[..., 12:39, 12:39].ne(0).all()
    gradient[..., 12:39, 12:39] = 0
    assert gradient.eq(0).all()


def test_live_taps() -> None:
    assert live_taps(51, 14, 14) == 27 * 27 == 729
    assert live_taps(51, 16, 16) == 961
    assert live_taps(51, 32, 32) == live_taps(51, 64, 64) == 2601
    assert live_taps(51, 14, 64) == 27 * 51
    assert live_taps(7, 1, 1) == 1
    assert crop_kernel(torch.zeros(2, 1, 51, 51), 14, 64).shape == (2, 1, 27, 51)


def test_the_fft_stays_in_fp32_under_autocast() -> None:
    x, weight = noise(1, 16, 16, 4, seed=1), noise(4, 1, 31, 31, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise(x, weight, None, "fft")
    assert torch.allclose(found, reference(x, weight, None), atol=1e-4)
    low = depthwise(x.bfloat16(), weight.bfloat16(), None, "fft")
    assert low.dtype == torch.bfloat16
    exact = reference(x.bfloat16().float(), weight.bfloat16().float(), None)
    assert torch.allclose(low.float(), exact, rtol=1 / 128, atol=1e-3)  # nothing but the final rounding
