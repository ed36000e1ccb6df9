# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from samda.errors import UsageError
from samda.training.datasets import available_mb, fitting_batch_size


@pytest.mark.parametrize(
    ("backbone", "image_size", "memory_mb", "encoder", "expected"),
    [
        ("vit_t", 256, 1e5, True, 8),  # never more than the learning rates were chosen for
        ("vit_b", 256, 2**13, True, 4),  # 0.7 * 8192 - 2000 MB hold 6.5 slices of 570 MB
        ("vit_b", 512, 2**13, True, 1),  # a slice has four times the pixels
        ("vit_b", 512, 2**13, False, 8),
        ("vit_h", 256, 1000, True, 1),
    ],
)
def test_the_largest_power_of_two_that_fits(
    backbone: str, image_size: int, memory_mb: float, encoder: bool, expected: int
) -> None:
    assert fitting_batch_size(backbone, image_size, memory_mb, encoder) == expected


def test_unknown_backbone() -> None:
    with pytest.raises(UsageError, match="unknown backbone 'vit_x'; did you mean"):
        fitting_batch_size("vit_x", 256, 1e4)


def test_free_memory_of_this_machine() -> None:
    assert 10 < available_mb("cpu") < 1e8
