# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samda.networks.ops import LARGEST_PRODUCT, argmax, computes_bf16, linear, upsample, window_attention


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_is_used_where_the_processor_has_instructions_for_it(device: str) -> None:
    flags: list[str] = []
    if sys.platform == "linux":  # elsewhere float32 is kept
        flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    has = "avx512_bf16" in flags or "amx_bf16" in flags
    assert computes_bf16(device) == (has and device == "cpu")


@pytest.mark.parametrize("size", [(3, 5), (1, 4), (2, LARGEST_PRODUCT + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_interpolate(size: tuple[int, int], dtype: torch.dtype) -> None:
    maps = torch.randn(2, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = [4 * side for side in size]
    expected = F.interpolate(maps, target, mode="bilinear", align_corners=False)
    upstream = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = upsample(maps, 4)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, maps, upstream)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(upsample(maps, 4), expected.detach())


def test_four_times_two_pixels() -> None:
    maps = torch.tensor([[[[0.0, 8.0]]]], requires_grad=True)
    assert upsample(maps, 4)[0, 0, 0].tolist() == [0, 0, 1, 3, 5, 7, 8, 8]


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("trained", [(), (0,), (0, 1, 2), (1,)])
def test_linear_gives_values_and_gradients_of_double_precision(
    activation: str | None, biased: bool, trained: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3, 7), (11, 7), (11,)][: 3 if biased else 2]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    found[0] = found[0].permute(0, 2, 1, 3)  # not contiguous
    expected = [tensor.double() for tensor in found]
    for tensors in (found, expected):
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index in trained)
    mine, exact = linear(*found, activation=activation), F.linear(*expected)
    exact = exact * torch.special.ndtr(exact) if activation else exact  # GELU is x times the normal distribution
    torch.testing.assert_close(mine, exact.float(), rtol=1e-5, atol=1e-6)
    assert mine.shape == (2, 3, 5, 11)
    if trained:
        upstream = torch.randn(mine.shape, generator=generator)
        mine.backward(upstream)
        exact.backward(upstream.double())
        for one, other in zip(found, expected, strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-5, atol=1e-5)


def test_linear_leaves_other_precisions_and_exports_to_pytorch() -> None:
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16
    assert linear(torch.empty(0, 6), weight.float()).shape == (0, 3)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, weight.float(), activation="gelu")

    graph = str(torch.export.export(Layer(), (x.float(),), strict=False).graph)
    assert "aten.linear" in graph and "mkldnn" not in graph


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch without MKL multiplies by oneDNN itself")
def test_products_of_single_precision_are_those_of_onednn() -> None:
    x, weight = torch.randn(64, 32), torch.randn(16, 32)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
            linear(x, weight)
        assert any("mkldnn" in event.key for event in profile.key_averages()) == enabled


def test_attention_in_bfloat16_is_that_of_rounded_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 7, 7, 3 * 64, generator=generator).bfloat16()  # one window of 49 tokens, two heads
    bias = torch.randn(2, 49, 49, generator=generator)
    with torch.no_grad():
        found = window_attention(qkv, None, 2, 7, lambda rows, columns: bias)
    q, k, v = qkv.double().flatten(1, 2).unflatten(-1, (2, 3, 32)).permute(3, 0, 2, 1, 4)
    scores = q @ k.mT / 32**0.5 + bias.double()
    expected = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2).view_as(found)
    assert (found.double() - expected).abs().max() < 2**-6 * expected.abs().max()


def test_parts_of_matrices_take_no_slow_kernel() -> None:
    """oneDNN takes 1000 times as long where the second matrix of a product is a part of a larger one."""

    def seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
        found = []
        for _ in range(3):
            start = time.perf_counter()
            linear(x, weight).sum().backward()
            found.append(time.perf_counter() - start)
        return min(found)

    x, weight = torch.randn(400, 300), torch.randn(256, 300)
    whole = seconds(x[:, :256].contiguous(), weight[:, :256].clone().requires_grad_())
    assert seconds(x[:, 44:], weight[:, :256].clone().requires_grad_()) < 30 * whole
    assert seconds(x[:, :256].contiguous().requires_grad_(), weight[:, 44:]) < 30 * whole


def test_argmax_takes_the_first_of_equal_values() -> None:
    maps = torch.randint(0, 4, (5, 6, 7, 8), generator=torch.Generator().manual_seed(0)).float()  # many equal values
    for dim in (0, -3):
        assert np.array_equal(argmax(maps, dim).numpy(), maps.numpy().argmax(dim))
    strided = maps.permute(0, 2, 3, 1)
    assert np.array_equal(argmax(strided).numpy(), strided.numpy().argmax(0))
