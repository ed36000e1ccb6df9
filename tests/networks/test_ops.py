# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from samda.networks.ops import LARGEST_PRODUCT, computes_bf16, upsample


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
