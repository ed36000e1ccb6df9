# SPDX-License-Identifier: Apache-2.0
"""Random tissue contrast: what it changes, and what it must leave."""

from __future__ import annotations

import numpy as np
import torch

from samda.data.transforms import AIR, RandTissueContrastd


def slice_of(*organs: float) -> dict[str, torch.Tensor]:
    """Air, tissue at 0.5, and organs of these values, 12 pixels wide each."""
    image, label = torch.zeros(1, 40, 60), torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 8:32, 4:56] = 0.5
    for k, value in enumerate(organs, 1):
        where = (slice(None), slice(12, 28), slice(8 + 20 * (k - 1), 24 + 20 * (k - 1)))
        image[where], label[where] = value, k
    return {"image": image, "label": label}


def changed(seed: int, curve: float, offset: float, *organs: float) -> np.ndarray:
    transform = RandTissueContrastd(1.0, curve, offset).set_random_state(seed=seed)
    return transform(slice_of(*organs))["image"].numpy()[0]


def test_organs_shift_independently_and_by_no_more_than_the_offset() -> None:
    shifts = np.array([[x[20, 16] - 0.6, x[20, 36] - 0.6] for x in (changed(s, 0.0, 0.2, 0.6, 0.6) for s in range(40))])
    assert np.abs(shifts).max() <= 0.2 + 1e-6
    assert np.abs(shifts).max() > 0.15, "the range is used"
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.5
    assert (shifts.min(0) < 0).all() and (shifts.max(0) > 0).all()


def test_air_stays_air_and_tissue_far_from_organs_follows_the_curve_alone() -> None:
    for seed in range(20):
        x = changed(seed, 1.0, 0.25, 0.6)
        assert np.abs(x[:4]).max() == 0.0
        away = x[9:31, 50:55]  # further than the offsets' soft border
        assert np.ptp(away) < 1e-6, "one gray value stays one gray value"


def test_curves_may_invert_contrast_and_stay_in_range() -> None:
    differences = [x[20, 16] - x[20, 53] for x in (changed(s, 1.0, 0.0, 0.8) for s in range(60))]
    assert min(differences) < -0.1 and max(differences) > 0.1
    assert all(0.0 <= changed(s, 1.0, 0.5, 0.9).min() <= changed(s, 1.0, 0.5, 0.9).max() <= 1.0 for s in range(5))


def test_the_seed_decides_and_probability_zero_changes_nothing() -> None:
    assert np.array_equal(changed(3, 1.0, 0.2, 0.6), changed(3, 1.0, 0.2, 0.6))
    assert not np.array_equal(changed(3, 1.0, 0.2, 0.6), changed(4, 1.0, 0.2, 0.6))
    item = slice_of(0.6)
    assert RandTissueContrastd(0.0, 1.0, 0.2)(item)["image"] is item["image"]
    assert AIR < 0.1
