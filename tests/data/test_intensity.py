# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from samda.data.transforms import ScaleBodyIntensityd, intensity_range
from samda.errors import InputError
from samda.task import Task

CT = Task(window=(-160.0, 240.0))
MR = dataclasses.replace(CT, modality="MR", percentiles=(1.0, 99.0))
PICTURE = dataclasses.replace(CT, modality="image", in_channels=3)


def scale(array, task, spacing=(1.0, 1.0, 1.0)) -> MetaTensor:
    image = MetaTensor(torch.as_tensor(array), affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))
    image.meta["filename_or_obj"] = "scan.nii.gz"
    return ScaleBodyIntensityd("image", task)({"image": image})["image"]


def body(margin: int) -> np.ndarray:
    """MR: a cube of 16 x 18 x 20 voxels with intensities 100..500, in air of -3..3 that is `margin` voxels wide."""
    rng = np.random.default_rng(0)
    shape = (16 + 2 * margin, 18 + 2 * margin, 20)
    volume = rng.uniform(-3, 3, shape)
    volume[margin : margin + 16, margin : margin + 18] = rng.uniform(100, 500, (16, 18, 20))
    return volume[None]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32])
def test_ct_window(dtype):
    array = torch.tensor([-1000, -160, -60, 40, 240, 3000], dtype=dtype).reshape(1, 1, 2, 3)
    result = scale(array, CT)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.flatten().numpy(), [0, 0, 0.25, 0.5, 1, 1], atol=1e-7)
    assert result.meta["filename_or_obj"] == "scan.nii.gz"


def test_input_is_left_alone():
    array = torch.arange(-100, 140, dtype=torch.float32).reshape(1, 4, 5, 12)
    scale(array, CT)
    assert torch.equal(array, torch.arange(-100, 140, dtype=torch.float32).reshape(1, 4, 5, 12))


@pytest.mark.parametrize("margin", [2, 8, 40])
def test_the_amount_of_air_does_not_decide(margin):
    low, high = intensity_range(body(margin), np.array([4.0, 4.0, 4.0]), MR)
    assert low == pytest.approx(104, abs=3)  # percentiles 1 and 99 of a uniform distribution from 100 to 500
    assert high == pytest.approx(496, abs=3)
    assert np.percentile(body(40), 99) < 450  # the whole volume's would differ


def test_mr_scaling_is_linear_between_the_percentiles():
    volume = body(8)
    low, high = intensity_range(volume, np.array([4.0, 4.0, 4.0]), MR)
    result = scale(volume, MR, (4.0, 4.0, 4.0)).numpy()
    np.testing.assert_allclose(result, np.clip((volume - low) / (high - low), 0, 1), atol=1e-6)


def test_pictures_keep_their_colors():
    rng = np.random.default_rng(0)
    picture = np.stack([rng.uniform(0, top, (20, 30, 1)) for top in (255, 120, 60)])
    low, high = intensity_range(picture, np.ones(3), dataclasses.replace(PICTURE, percentiles=(0.0, 100.0)))
    assert (low, high) == (picture.min(), picture.max())  # of all channels together
    result = scale(picture, dataclasses.replace(PICTURE, percentiles=(0.0, 100.0)))
    np.testing.assert_allclose(result.numpy(), (picture - low) / (high - low), atol=1e-6)


def test_every_mr_sequence_has_its_own_scale():
    volume = np.concatenate([body(8), 1000 * body(8) + 7])
    two = dataclasses.replace(MR, in_channels=2)
    result = scale(volume, two, (4.0, 4.0, 4.0)).numpy()
    np.testing.assert_allclose(result[0], scale(body(8), MR, (4.0, 4.0, 4.0)).numpy()[0])
    np.testing.assert_allclose(result[1], result[0], atol=1e-4)
    volume[1] = 3
    with pytest.raises(InputError, match=r"channel 1 of scan.nii.gz is constant"):
        scale(volume, two)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad):
    volume = body(2)
    volume[0, 3, 4, 5] = bad
    with pytest.raises(InputError, match=r"scan.nii.gz holds NaN or infinite values"):
        scale(volume, MR)


def test_constant_scan_is_refused():
    with pytest.raises(InputError, match=r"constant \(7 everywhere"):
        scale(np.full((1, 4, 5, 6), 7.0), MR)


@pytest.mark.parametrize("values", [(-1000, -500), (300, 900)])
def test_ct_outside_its_window_is_refused(values):
    with pytest.raises(InputError, match="window -160 to 240 HU"):
        scale(np.linspace(*values, 24).reshape(1, 2, 3, 4), CT)


def test_mr_whose_percentiles_meet_is_refused():
    volume = np.zeros((1, 20, 20, 5))
    volume[0, 3, 3, 3] = 1
    with pytest.raises(InputError, match=r"percentiles \(1.0, 99.0\)"):
        scale(volume, MR)


def test_ct_without_negative_values_warns():
    with pytest.warns(UserWarning, match="Hounsfield"):
        scale(np.linspace(0, 2000, 24).reshape(1, 2, 3, 4), CT)
