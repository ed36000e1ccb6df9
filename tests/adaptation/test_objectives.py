# SPDX-License-Identifier: Apache-2.0
"""Every objective against numbers worked out by hand, and the properties that hold for all of them."""

from __future__ import annotations

import math

import pytest
import torch

from samda.adaptation.objectives import OBJECTIVES, build_objective, entropy, kept_views, log_probabilities
from samda.errors import UsageError

LOSSES = [name for name in OBJECTIVES if name != "none"]


def logits_of(probabilities: list[float]) -> torch.Tensor:
    """Logits of one pixel, (1, 1, K, 1, 1)."""
    return torch.tensor(probabilities, dtype=torch.float64).log().view(1, 1, -1, 1, 1)


def random_logits(views: int = 3, classes: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(views, 2, classes, 5, 4, generator=generator, dtype=torch.float64)


def value(name: str, logits: torch.Tensor, **settings: float | str) -> float:
    objective = build_objective(name, settings)
    return float(objective.loss(logits))


def test_entropy_of_a_known_pixel() -> None:
    # H(1/2, 1/4, 1/4) = 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2
    assert value("tent", logits_of([0.5, 0.25, 0.25])) == pytest.approx(1.5 * math.log(2), abs=1e-12)
    assert value("sam_da", logits_of([0.5, 0.25, 0.25])) == pytest.approx(1.5 * math.log(2) / math.log(3), abs=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
def test_uniform_is_one_and_certain_is_zero(classes: int) -> None:
    uniform = torch.zeros(2, 1, classes, 3, 3)
    certain = uniform.clone()
    certain[:, :, 0] = 50.0
    for name in ("sam_da", "class_entropy"):
        assert value(name, uniform) == pytest.approx(1.0, abs=1e-6)
        assert value(name, certain) == pytest.approx(0.0, abs=1e-6)
    assert value("tent", uniform) == pytest.approx(math.log(max(2, classes)), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_one_logit_matches_two_classes(name: str) -> None:
    z = random_logits(classes=1)
    two = torch.cat([torch.zeros_like(z), z], dim=2)
    assert value(name, z) == pytest.approx(value(name, two), abs=1e-12)


def test_two_class_entropy_is_softplus_minus_z_sigmoid() -> None:
    z = random_logits(classes=1)
    expected = torch.nn.functional.softplus(z) - z * torch.sigmoid(z)
    torch.testing.assert_close(entropy(log_probabilities(z)), expected.squeeze(2))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
def test_large_logits_stay_finite(name: str, classes: int) -> None:
    z = (50.0 * random_logits(classes=classes).sign()).float().requires_grad_()
    objective = build_objective(name)
    loss = objective.loss(z)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_view_runs(name: str) -> None:
    assert math.isfinite(value(name, random_logits(views=1)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_pixel_means(name: str) -> None:
    """Twice as many pixels of the same kind: the same loss, hence the same learning rate for every image size."""
    z = random_logits()
    assert value(name, torch.cat([z, z], dim=-1)) == pytest.approx(value(name, z), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("tent",)])
def test_classes_are_treated_alike(name: str) -> None:
    """Renaming two foreground classes changes nothing."""
    z = random_logits(classes=4)
    assert value(name, z[:, :, [0, 2, 1, 3]]) == pytest.approx(value(name, z), abs=1e-12)


def test_memo_is_the_entropy_of_the_mean() -> None:
    z = torch.cat([logits_of([0.9, 0.1]), logits_of([0.1, 0.9])])
    assert value("memo", z) == pytest.approx(math.log(2), abs=1e-12)
    assert value("sam_da", z, keep=1.0) == pytest.approx(
        -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2), abs=1e-12
    )


def test_entropy_of_the_mean_is_never_below_the_mean_entropy() -> None:
    for seed in range(5):
        z = random_logits(seed=seed)
        of_mean = value("sam_da", z, keep=1.0, reduce="entropy_of_mean")
        assert of_mean >= value("sam_da", z, keep=1.0)


def test_the_confident_view_is_kept() -> None:
    z = torch.cat([logits_of([0.6, 0.4]), logits_of([0.99, 0.01]), logits_of([0.3, 0.7])])
    expected = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01))
    assert value("sam_da", z, keep=0.1) == pytest.approx(expected / math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("views", "keep", "kept"), [(8, 0.25, 2), (8, 0.1, 1), (3, 0.1, 1), (10, 0.1, 1), (11, 0.1, 2)]
)
def test_number_of_kept_views(views: int, keep: float, kept: int) -> None:
    assert kept_views(log_probabilities(random_logits(views)), keep).shape == (kept, 2)


def test_views_are_chosen_per_slice() -> None:
    sure, unsure = logits_of([0.99, 0.01]), logits_of([0.6, 0.4])
    z = torch.cat([torch.cat([sure, unsure], 1), torch.cat([unsure, sure], 1)])  # view 0 is sure of slice 0 alone
    assert kept_views(log_probabilities(z), 0.5).tolist() == [[0, 1]]


def test_class_entropy_gives_a_small_class_its_share() -> None:
    """99 pixels of background and one of an organ: the organ's pixel is half of the loss."""
    z = logits_of([0.9, 0.1]).repeat(1, 1, 1, 10, 10)
    z[..., 0, 0] = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    h = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2) for p in (0.9, 0.8)]
    assert value("class_entropy", z) == pytest.approx(sum(h) / 2, abs=1e-12)


def test_class_entropy_keeps_the_most_confident_pixels() -> None:
    z = torch.cat([logits_of([p, 1 - p]) for p in (0.9, 0.8, 0.7, 0.6)], dim=-1)
    h = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2) for p in (0.9, 0.8)]
    assert value("class_entropy", z, keep=0.5) == pytest.approx(sum(h) / 2, abs=1e-12)


def test_consistency_by_hand() -> None:
    """Two views of one pixel with foreground .8 and .4: Dice 2 * .32 / (.64 + .16) = .8 both ways."""
    z = torch.cat([logits_of([0.2, 0.8]), logits_of([0.6, 0.4])])
    assert value("consistency", z) == pytest.approx(0.2, abs=1e-9)
    assert value("consistency", torch.cat([z[:1], z[:1]])) == pytest.approx(0.0, abs=1e-9)


def test_consistency_teaches_without_pulling_the_teacher() -> None:
    z = torch.cat([logits_of([0.2, 0.8]), logits_of([0.6, 0.4])]).requires_grad_()
    build_objective("consistency").loss(z).backward()
    # d(1 - 2 p t / (p^2 + t^2)) / dp for p = .8, t = .4 held fixed, times dp/dz_1 = p (1 - p), a mean over two views
    p, t = 0.8, 0.4
    slope = -2 * t * (t * t - p * p) / (p * p + t * t) ** 2
    assert float(z.grad[0, 0, 1]) == pytest.approx(slope * p * (1 - p) / 2, abs=1e-9)


def test_default_is_aligned_consistency() -> None:
    z = random_logits()
    assert value("default", z) == value("consistency", z) > 0
    assert build_objective("default").align == 1.0 and build_objective("consistency").align == 0.0


def test_none_is_flat() -> None:
    objective = build_objective("none")
    assert objective.steps == 0 and value("none", random_logits()) == 0.0


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'tent'"):
        build_objective("tnet")
    with pytest.raises(UsageError, match=r"unknown key 'kep'; did you mean 'keep'"):
        build_objective("sam_da", {"kep": 0.1})
    with pytest.raises(UsageError, match="entropy_of_mean"):
        build_objective("sam_da", {"reduce": "sum"})
