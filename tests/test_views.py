# SPDX-License-Identifier: Apache-2.0
"""Views: deterministic, the identity first, photometric unless asked, and exactly invertible where they move pixels."""

from __future__ import annotations

import math

import pytest
import torch

from samda.views import FAMILIES, View, apply_view, make_views, mirrored_classes, restore_view, seed_of


def slices(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 12, 16, generator=torch.Generator().manual_seed(1))


def test_the_first_view_is_the_slice_itself() -> None:
    images = slices()
    view = make_views(8, seed=3)[0]
    assert view == View() and torch.equal(apply_view(view, images, range(3)), images)


def test_the_same_seed_gives_the_same_views() -> None:
    images = slices()
    for a, b in zip(make_views(9, 5), make_views(9, 5), strict=True):
        assert a == b and torch.equal(apply_view(a, images, range(3)), apply_view(b, images, range(3)))
    assert make_views(9, 5) != make_views(9, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_channels_of_a_slice_change_alike(family: str) -> None:
    """Each channel as if it were alone; noise has the same strength, but every slice of a scan has its own."""
    view = next(view for view in make_views(8, 5) if view.family == family)
    one = torch.full((2, 1, 40, 40), 0.5) + 0.1 * torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(3))
    found = apply_view(view, one.repeat(1, 3, 1, 1), range(2))
    alone = apply_view(view, one, range(2))
    assert torch.equal(found[:, :1], alone)
    if family == "noise":
        spread = (found - one).std((-2, -1))
        assert float(spread.max() / spread.min()) < 1.15
    else:
        assert torch.equal(found, alone.repeat(1, 3, 1, 1))


def test_global_generators_stay_untouched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    for view in make_views(6, 1):
        apply_view(view, slices(), range(3))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("view", make_views(11, seed=2), ids=lambda v: v.family)
def test_a_view_does_not_depend_on_how_slices_are_batched(view: View) -> None:
    images = slices()
    together = apply_view(view, images, [4, 5, 6])
    assert torch.allclose(together[1:], apply_view(view, images[1:], [5, 6]), atol=1e-7)
    assert together.min() >= 0 and together.max() <= 1 and together.dtype == images.dtype


def test_every_family_takes_its_turn_and_changes_something() -> None:
    views = make_views(11, seed=2)
    assert [v.family for v in views[1:]] == 2 * list(FAMILIES)
    for view in views[1:]:
        assert not torch.equal(apply_view(view, slices(), range(3)), slices())


def test_families_reach_both_ends() -> None:
    gammas = [v.strengths[0] for v in make_views(5, seed=0, families=["gamma"])[1:]]
    assert all(max(g, 1 / g) >= 2**0.4 for g in gammas)
    assert sum(g > 1 for g in gammas) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_strength_is_finite_and_none_leaves_the_slice(family: str) -> None:
    images = slices()
    for strength in (0.0, 10.0):
        for view in make_views(5, seed=0, families=[family], strength=strength):
            found = apply_view(view, images, range(3))
            assert found.isfinite().all()
            assert strength or torch.allclose(found, images, atol=1e-6)


def test_strength_scales_the_departure() -> None:
    mild = make_views(2, seed=0, families=["gamma"], strength=0.5)[1].strengths[0]
    full = make_views(2, seed=0, families=["gamma"])[1].strengths[0]
    assert math.log(full) == pytest.approx(2 * math.log(mild))


def test_window_gamma_and_noise_by_hand() -> None:
    x = torch.tensor([[[[0.25, 0.5, 1.0]]]])
    window = apply_view(View("window", (2.0, 0.1)), x, [0])
    assert window.flatten().tolist() == pytest.approx([0.1, 0.6, 1.0])  # .25 -> (-.25) 2 + .5 + .1
    assert apply_view(View("gamma", (2.0,)), x, [0]).flatten().tolist() == pytest.approx([0.0625, 0.25, 1.0])
    flat = torch.full((1, 1, 100, 100), 0.5)
    noisy = apply_view(View("noise", (0.05,), seed=1), flat, [0])
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.05) and float(noisy.mean()) == pytest.approx(0.5, abs=0.002)


def test_blur_spreads_a_point_by_its_sigma_and_keeps_its_mass() -> None:
    x = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    x[..., 15, 15] = 1.0
    y = apply_view(View("blur", (1.5,)), x, [0])[0, 0]
    at = torch.arange(31, dtype=torch.float64) - 15
    assert float(y.sum()) == pytest.approx(1.0)
    for axis in (0, 1):
        assert float((y.sum(axis) * at**2).sum()) == pytest.approx(1.5**2, rel=0.03)  # cut at 3 sigma


def test_bias_field_is_smooth_and_centered() -> None:
    x = torch.full((1, 1, 20, 30), 0.3, dtype=torch.float64)
    field = (apply_view(View("bias", (0.2, -0.1, 0.1, 0.05)), x, [0]) / 0.3).log()[0, 0]
    assert float(field.mean()) == pytest.approx(0.0, abs=1e-9)
    third = field.diff(n=3, dim=0)
    assert third.abs().max() < 1e-9  # quadratic along an axis


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_a_flip_is_undone_exactly(size: tuple[int, int]) -> None:
    classes = ["background", "kidney_right", "kidney_left", "liver"]
    view = View(flip=True)
    grid = torch.arange(4 * size[0] * size[1]).view(1, 4, *size)
    mirror = mirrored_classes(classes)
    assert torch.equal(restore_view(view, restore_view(view, grid, mirror), mirror), grid)
    image = torch.arange(size[0] * size[1]).view(1, 1, *size).float()
    assert torch.equal(apply_view(view, image, [0]).flip(-1), image)
    # what the model calls left in the mirror is the patient's right
    mirrored = torch.zeros(1, 4, *size)
    mirrored[0, 2, 0, 0] = 1.0
    assert float(restore_view(view, mirrored, mirror)[0, 1, 0, -1]) == 1.0


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["background", "left kidney", "right kidney"], [0, 2, 1]),
        (["background", "kidney_l", "kidney_r", "spleen"], [0, 2, 1, 3]),
        (["background", "lung_left"], [0, 1]),
        (["background", "Left-Lung", "liver"], [0, 1, 2]),
    ],
)
def test_sided_classes_are_found_by_name(classes: list[str], expected: list[int]) -> None:
    assert mirrored_classes(classes) == expected


def test_flips_are_off_by_default() -> None:
    assert not any(v.flip for v in make_views(16, 0))
    assert any(v.flip for v in make_views(16, 0, flips=True)) and not make_views(4, 0, flips=True)[0].flip


def test_seed_of_is_stable() -> None:
    # first 8 bytes of sha256(b"a\x1f1"), shifted right by one bit
    assert seed_of("a", 1) == int.from_bytes(__import__("hashlib").sha256(b"a\x1f1").digest()[:8], "big") >> 1
    assert seed_of("a", 1) != seed_of("a", 2)
