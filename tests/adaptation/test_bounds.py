# SPDX-License-Identifier: Apache-2.0
"""Bounds of the organs, against disks whose moments are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from samda.adaptation.bounds import OrganBounds
from samda.data.task import Task

TASK = Task(name="t", classes=("background", "liver", "spleen"), modality="image", spacing=1.0, image_size=256)
CLASSES = 2  # the mean is over all foreground classes
QUANTILES = [0.05, 0.5, 0.95]
USUAL = {
    "area_mm2": [4000.0, 5000.0, 6000.0],
    "elongation": [1.0, 1.0, 1.0],
}


def bounds(spleen: dict[str, Any] | None = None) -> OrganBounds:
    nothing = dict.fromkeys(USUAL)
    return OrganBounds(TASK, {"liver": USUAL, "spleen": spleen or nothing}, QUANTILES)


def disk(radius: float, row: float = 128, column: float = 128, ring: float = 0.0) -> torch.Tensor:
    """Probabilities (1, 1, 3, 64, 64) of a liver of that radius in image pixels, hollow up to `ring`."""
    y, x = torch.meshgrid(*[4 * (torch.arange(64) + 0.5)] * 2, indexing="ij")
    r = ((y - row) ** 2 + (x - column) ** 2).sqrt()
    liver = ((r < radius) & (r >= ring)).double()
    return torch.stack([1 - liver, liver, 0 * liver])[None, None]


def test_a_usual_organ_costs_nothing() -> None:
    for radius in (10, 30, 40, math.sqrt(6000 / math.pi)):
        assert float(bounds()(disk(radius))) == pytest.approx(0.0, abs=1e-6)


def test_growth_beyond_the_largest_area_costs_its_squared_logarithm() -> None:
    p = disk(70)
    area = float(p[0, 0, 1].sum()) * 16
    # a disk's spread is a / (2 pi): its excess is that of the area
    expected = 2 * math.log(area / (1.5 * 6000)) ** 2 / CLASSES
    assert float(bounds()(p)) == pytest.approx(expected, rel=0.02)


def test_a_ring_of_the_usual_area_is_spread_too_far() -> None:
    p = disk(100, ring=91)
    area, spread = float(p[0, 0, 1].sum()) * 16, (100**2 + 91**2) / 2
    assert area < 6000 and spread > 1.5 * 6000 / (2 * math.pi)
    z = math.log(spread / (1.5 * 6000 / (2 * math.pi)))
    expected = (z * z if z < 1 else 2 * z - 1) / CLASSES
    assert float(bounds()(p)) == pytest.approx(expected, rel=0.02)


def test_a_speck_weighs_little() -> None:
    left, right = disk(6), disk(6, column=228)  # two specks far apart are spread as far as no organ is
    liver = left[:, :, 1] + right[:, :, 1]
    two = torch.stack([1 - liver, liver, 0 * liver], 2)
    area = float(liver.sum()) * 16
    z = math.log((50**2 + 6**2 / 2) / (1.5 * 6000 / (2 * math.pi)))
    assert float(bounds()(two)) == pytest.approx(area / 5000 * z * z / CLASSES, rel=0.1)


def test_the_haze_of_other_pixels_counts_for_nothing() -> None:
    p = disk(30)
    assert float(bounds()(0.8 * p + 0.2 / 3)) == pytest.approx(0.0, abs=1e-6)


def test_an_unknown_class_is_free_and_gradients_shrink_what_is_too_large() -> None:
    p = disk(100)
    swapped = p[:, :, [0, 2, 1]]  # the disk is a spleen now, of which the training showed nothing
    assert float(bounds()(swapped)) == pytest.approx(0.0, abs=1e-3)
    z = torch.zeros(1, 1, 3, 64, 64, dtype=torch.float64)
    z[:, :, 1] = 0.1  # everything is liver
    z.requires_grad_()
    bounds()(z.softmax(2)).backward()
    assert (z.grad[0, 0, 1] >= 0).float().mean() > 0.9, "descent lowers the liver"
    assert torch.isfinite(z.grad).all()
    assert float(bounds()(p * 0)) == pytest.approx(0.0, abs=1e-6)
