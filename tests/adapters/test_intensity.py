# SPDX-License-Identifier: Apache-2.0
"""The intensity adapter: curve, inversion and sharpness of the input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from adapter_tools import noise

from samda.adapters.attach import scope_parameters
from samda.adapters.base import changes_encoder
from samda.adapters.intensity import IntensityAdapter, Values, search, tried
from samda.networks.segmenter import SamSegmenter


def image() -> torch.Tensor:
    return noise(2, 1, 9, 7, seed=3).sigmoid()


def changed(x: torch.Tensor, **values: float) -> np.ndarray:
    return IntensityAdapter.of(values)(x).detach().numpy()


def test_the_curve_is_one_polynomial_twice() -> None:
    x = image().double().numpy()
    for a in (0.5, -0.5, 1.0, -1.0):
        y = (1 + a) * x - a * x**2
        np.testing.assert_allclose(changed(image(), curve=a), (1 + a) * y - a * y**2, atol=1e-6)
    np.testing.assert_allclose(changed(image(), curve=-1.0), x**4, atol=1e-6)  # gamma 4
    steps = np.diff(changed(torch.linspace(0, 1, 101).view(1, 1, 1, -1), curve=1.0).ravel())
    assert (steps >= 0).all()


def test_inversion_leaves_air_dark_and_is_its_own_inverse() -> None:
    x = torch.tensor([0.0, 0.01, 0.03, 0.031, 0.4, 1.0]).view(1, 1, 1, -1)
    once = changed(x, invert=1.0)
    np.testing.assert_allclose(once.ravel(), [0.0, 0.01, 0.03, 0.999, 0.63, 0.03], atol=1e-6)
    np.testing.assert_allclose(changed(torch.tensor(once[..., 2:5]), invert=1.0).ravel(), [0.03, 0.031, 0.4], atol=1e-6)


def test_detail_is_the_difference_from_the_mean_of_nine() -> None:
    x = image()
    mean = np.empty(x.shape)
    for i, j in np.ndindex(*x.shape[2:]):  # at the edge, of those that are there
        mean[..., i, j] = x[..., max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].mean((2, 3))
    np.testing.assert_allclose(changed(x, detail=-1.0), mean, atol=1e-6)
    np.testing.assert_allclose(changed(x, detail=1.0), (2 * x.numpy() - mean).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@pytest.mark.parametrize("head", ["sam", "pyramid"])
def test_encoder_and_stem_see_the_same_image(kind: str, head: str, make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = make_segmenter(kind, head=head, adapters={"intensity": {}})
    x = noise(1, 1, 64, 48, seed=4).sigmoid()
    (adapter,) = network.image_encoder.input.adapters.values()
    with torch.no_grad():
        expected = network.encode(IntensityAdapter.of({"curve": 0.5, "invert": 1.0})(x))
        adapter.curve.fill_(0.5)
        adapter.invert.fill_(1.0)
        found = network.encode(x)
    assert set(found) == set(network.levels)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert changes_encoder(network) and len(scope_parameters(network, "intensity")) == 3


@pytest.mark.parametrize(
    ("best", "inversion", "found"),
    [
        ({"curve": 0.3}, True, {"curve": 0.25}),
        ({"curve": -0.8}, True, {"curve": -0.75}),
        ({"invert": 1.0, "curve": 0.4}, True, {"invert": 1.0, "curve": 0.5}),
        ({"invert": 1.0}, False, {}),
        ({"detail": -1.0}, True, {"detail": -1.0}),
        ({"curve": 0.5, "detail": 1.0}, True, {"curve": 0.5, "detail": 1.0}),
        ({}, True, {}),
    ],
)
def test_the_search_comes_as_near_as_its_steps(best: Values, inversion: bool, found: Values) -> None:
    """The Dice falls with the distance from the best values; a change must gain the margin."""
    asked: list[Values] = []

    def distance(values: Values) -> float:
        return sum(abs(values.get(name, 0.0) - best.get(name, 0.0)) for name in ("curve", "invert", "detail"))

    def gain(values: Values) -> float:
        asked.append(values)
        return 0.2 * (distance({}) - distance(values))

    assert search(gain, inversion, margin=0.01) == found
    assert len(asked) <= 5 + 4
    known = tried(inversion)
    assert all({k: v for k, v in values.items() if k != "detail"} in [{}, *known] for values in asked)
    assert not search(gain, inversion, margin=0.5)
