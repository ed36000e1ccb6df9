# SPDX-License-Identifier: Apache-2.0
"""Plausibility: 1 inside what the source showed, falling outside, and None where there is nothing to judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from samda.adaptation.plausibility import Judge, class_plausibility, feature_score
from samda.source_statistics import QUANTILES
from tests.adaptation.conftest import TASK, slices_of

KNOWN = {0.05: 0.3, 0.5: 0.5, 0.95: 0.8}


def test_inside_the_source_range_is_one() -> None:
    assert feature_score("row", np.array([0.3, 0.5, 0.8]), KNOWN).tolist() == [1.0, 1.0, 1.0]


def test_outside_it_falls_like_a_gaussian() -> None:
    # above: width .8 - .5 = .3; below: width .5 - .3 = .2
    found = feature_score("row", np.array([1.1, 0.1]), KNOWN)
    assert found == pytest.approx([math.exp(-0.5), math.exp(-0.5)])


def test_narrow_distributions_get_a_least_width() -> None:
    exact = {0.05: 0.5, 0.5: 0.5, 0.95: 0.5}
    assert feature_score("column", np.array([0.56]), exact)[0] == pytest.approx(math.exp(-0.5))


def test_areas_are_compared_as_ratios() -> None:
    known = {0.05: 100.0, 0.5: 400.0, 0.95: 1600.0}
    found = feature_score("area_mm2", np.array([25.0, 6400.0]), known)  # a factor of four beyond either end
    assert found == pytest.approx([math.exp(-0.5), math.exp(-0.5)])


def test_fewer_pieces_and_rounder_shapes_are_no_fault() -> None:
    assert feature_score("components", np.array([1.0]), {0.05: 2.0, 0.5: 2.0, 0.95: 3.0})[0] == 1.0
    assert feature_score("compactness", np.array([1.0]), KNOWN)[0] == 1.0
    assert feature_score("components", np.array([4.0]), {0.05: 1.0, 0.5: 1.0, 0.95: 3.0})[0] < 1.0


def test_a_class_is_the_area_weighted_mean_of_its_slices() -> None:
    source = {name: [1.0] * len(QUANTILES) for name in ("components", "compactness", "elongation", "row", "column")}
    source["area_mm2"] = [100.0] * len(QUANTILES)
    measured = {name: [1.0, 1.0] for name in source}
    measured["area_mm2"] = [100.0, 100.0 * math.exp(-0.4)]  # the second is one least width too small
    expected = (1.0 + math.exp(-0.4) * math.exp(-0.5 / 6)) / (1 + math.exp(-0.4))  # geometric mean of six features
    assert class_plausibility(measured, source, QUANTILES) == pytest.approx(expected)


def test_absent_classes_and_classes_never_seen() -> None:
    assert class_plausibility({"area_mm2": []}, {}, QUANTILES) is None
    assert class_plausibility({"area_mm2": [5.0]}, {"area_mm2": None}, QUANTILES) == 0.0


def test_truth_beats_every_distortion(scans, trained) -> None:
    judge = Judge(TASK, trained[1])
    images, labels = slices_of(scans / "images" / "case3.nii.gz", scans / "labels" / "case3.nii.gz")
    truth = judge.plausibility(images, labels)
    assert all(value > 0.8 for value in truth.values())
    generator = torch.Generator().manual_seed(0)
    specks = torch.where(torch.rand(labels.shape, generator=generator) < 0.02, 1, 0).to(labels)
    for distorted in (labels.flip(-1), specks, torch.full_like(labels, 1), labels.roll(20, 1)):
        worse = judge.plausibility(images, distorted)["liver"]
        assert worse is not None and worse < truth["liver"] - 0.15


def test_a_slab_is_as_plausible_as_the_whole(scans, trained) -> None:
    judge = Judge(TASK, trained[1])
    images, labels = slices_of(scans / "images" / "case2.nii.gz", scans / "labels" / "case2.nii.gz")
    assert judge.plausibility(images[3:6], labels[3:6])["liver"] == pytest.approx(
        judge.plausibility(images, labels)["liver"], abs=0.1
    )
    assert judge.plausibility(images, torch.zeros_like(labels)) == {"liver": None, "spleen": None}
