# SPDX-License-Identifier: Apache-2.0
"""Alignment of features, by hand and in a whole adaptation; plausibility of predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samda.adaptation.alignment import CaseAlignment, FeatureAlignment, Judge
from samda.adaptation.engine import Adaptation
from samda.adaptation.loop import copies, load, restoring
from samda.adapters.base import adapter_parameters, trainable_parameters
from samda.embeddings import labeled_batches
from samda.errors import InputError
from samda.networks.segmenter import SamSegmenter
from samda.quality import class_plausibility, feature_score
from samda.source_statistics import (
    QUANTILES,
    FeatureTap,
    SliceStatistics,
    align_levels,
    body_boxes,
    feature_statistics,
    level_sums,
)
from tests.adaptation.conftest import TASK, slices_of
from tests.conftest import TINY_TINYVIT

# one layer, two channels; class 0 at (1, -2), class 1 at (5, 0), class 2 never seen
SOURCE = [{"mean": [[1.0, -2.0], [5.0, 0.0], None], "std": [[2.0, 0.5], [1.0, 1.0], None]}]


def spread(*classes: tuple[list[float], list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (1, 20 per class, 2) with exactly these (mean, deviation), and the places' shares (1, n, 3)."""
    features, shares = [], []
    for k, (mean, std) in enumerate(classes):
        for sign in (1, -1):
            features += 10 * [[m + sign * s for m, s in zip(mean, std, strict=True)]]
            shares += 10 * [[float(k == c) for c in range(3)]]
    return torch.tensor([features]), torch.tensor([shares])


def test_the_source_itself_is_at_distance_zero() -> None:
    features, shares = spread(([1.0, -2.0], [2.0, 0.5]), ([5.0, 0.0], [1.0, 1.0]))
    found = FeatureAlignment(SOURCE, 3)([features], shares, torch.tensor([0.5, 0.5, 0.0]))
    assert float(found) == pytest.approx(0.0, abs=1e-5)


def test_one_class_shifted_and_stretched_by_hand() -> None:
    # channel 0: mean 2 (off by half a deviation), deviation 4 (twice); channel 1 as the source's
    features, shares = spread(([2.0, -2.0], [4.0, 0.5]))
    expected = (0.5 + math.log(2)) / 2  # of the whole and of the class alike, as there is one class only
    found = FeatureAlignment(SOURCE, 3)([features], shares, torch.tensor([1.0, 0.0, 0.0]))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_the_whole_is_compared_with_the_mixture_that_the_source_model_saw() -> None:
    # all places are predicted class 0 now, but the source model saw a quarter of class 1
    features, shares = spread(([1.0, -2.0], [2.0, 0.5]))
    pi = (0.75, 0.25, 0.0)
    terms = []
    for c, (mean, std) in enumerate(((1.0, 2.0), (-2.0, 0.5))):
        (m0, m1), (s0, s1) = ([row[c] for row in SOURCE[0][key][:2]] for key in ("mean", "std"))
        mixed = pi[0] * m0 + pi[1] * m1
        deviation = math.sqrt(pi[0] * (s0**2 + m0**2) + pi[1] * (s1**2 + m1**2) - mixed**2)
        terms.append(abs(mean - mixed) / deviation + abs(math.log(std / deviation)))
    expected = (sum(terms) / 2 + 0.0) / 2  # class 0 itself is where it was
    found = FeatureAlignment(SOURCE, 3)([features], shares, torch.tensor(pi))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_a_class_that_the_source_never_saw_counts_as_background() -> None:
    labels = torch.tensor([[[2, 2], [1, 0]]])
    shares = FeatureAlignment(SOURCE, 3).shares(labels, (1, 1))
    assert shares.tolist() == [[[0.75, 0.25, 0.0]]]


def test_features_of_other_classes_are_refused() -> None:
    with pytest.raises(InputError, match="features are of 3 classes, not 5; train it again"):
        FeatureAlignment(SOURCE, 5)


@pytest.mark.parametrize("flips", [False, True])
def test_aligning_lowers_the_distance_and_leaves_the_model_as_it_was(
    make_adaptation: Callable[..., Adaptation], scans: Path, network: SamSegmenter, flips: bool
) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    adaptation = make_adaptation(method="none", objective={"align": 1.0}, steps=6, lr=1e-3, keep="last", flips=flips)
    prepared = adaptation.prepare(scans / "images" / "case2.nii.gz")
    # another scanner, seen from the decoder
    prepared.inputs = {"embedding": prepared.inputs["embedding"] * 1.3 + 0.2}
    run = adaptation.optimize(prepared)
    assert run.loss[-1] < 0.8 * run.loss[0]
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_chunks_with_recomputation_give_the_same_gradients(
    make_adaptation: Callable[..., Adaptation], scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = make_adaptation(method="none", objective={"align": 1.0})
    prepared = adaptation.prepare(scans / "images" / "case2.nii.gz")
    # far from the source: near it, rounding turns the sign of |x|
    prepared.inputs = {"embedding": prepared.inputs["embedding"] * 1.3 + 0.2}

    def gradients() -> torch.Tensor:
        with restoring(adaptation.network, adaptation.parameters), FeatureTap(adaptation.network) as tap:
            shape = prepared.inputs["embedding"].shape[:2]
            align = CaseAlignment(adaptation.judge.alignment, tap, shape, range(4), ratio=4)
            align(adaptation.views.seen(prepared)).backward()
            return torch.cat([p.grad.flatten() for p in adaptation.parameters.values() if p.grad is not None])

    whole = gradients()
    monkeypatch.setattr("samda.adaptation.case.GRADIENT_PIXELS", 32 * 256)
    assert float((gradients() - whole).norm()) < 1e-3 * float(whole.norm())


def test_a_model_without_features_is_refused(network: SamSegmenter, trained: tuple) -> None:
    statistics = {k: v for k, v in trained[1]["statistics"].items() if k != "features"}
    with pytest.raises(InputError, match="lack its features, which are aligned to; train it again"):
        Adaptation(network, TASK, {"statistics": statistics})


# --------------------------------------------------------------------------------------------- alignment of levels


@torch.no_grad()
def test_levels_get_the_moments_of_the_training_slices(make_segmenter: Callable[..., SamSegmenter]) -> None:
    """Levels that another scanner scaled and shifted are read as those of the training."""
    network = make_segmenter("tiny_vit", head="pyramid", adapters=["ssf", "lora"])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 64, 64, generator=generator)
    labels = torch.randint(0, 3, (4, 1, 64, 64), generator=generator)
    network.fit_closed_form([(images, labels)], torch.bincount(labels.flatten()))
    parameters = {name: p for name, p in adapter_parameters(network).items() if ".sites." in name}
    for parameter in parameters.values():  # trained
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    items = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    pictures = dataclasses.replace(TASK, modality="image")  # all of a picture is body
    source = feature_statistics(network, pictures, items, range(4), batch_size=3)["levels"]
    pyramid, expected, before = network.encode(images), network(images), copies(parameters)
    for layer, name, level in zip(network.head.standardize, network.head.levels, source, strict=True):
        maps = layer(pyramid[name]).double()
        np.testing.assert_allclose(level["mean"][0], maps.mean((0, 2, 3)), atol=1e-4)
        np.testing.assert_allclose(level["std"][0], maps.std((0, 2, 3), correction=0), rtol=1e-3, atol=1e-4)
    other = {name: level if name == "image" else 1.3 * level + 0.2 for name, level in pyramid.items()}
    found = level_sums(network, other, np.ones((len(images), *images.shape[2:]), bool))
    load(parameters, align_levels(network, parameters, source, found, 1.0))
    torch.testing.assert_close(network(other), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    whole = copies(parameters)
    load(parameters, before)
    assert not torch.allclose(network(other), expected, atol=0.1 * float(expected.abs().max()))
    none, half = (align_levels(network, parameters, source, found, strength) for strength in (0.0, 0.5))
    for name in parameters:
        torch.testing.assert_close(none[name], before[name], rtol=0, atol=1e-5)
        if name.endswith("scale"):  # the geometric mean of none and all
            torch.testing.assert_close((1 + half[name]) ** 2, (1 + before[name]) * (1 + whole[name]))


def test_other_heads_have_no_levels(network: SamSegmenter) -> None:
    assert feature_statistics(network, TASK, [], [])["levels"] == []


# ------------------------------------------------------------------------------------- plausibility of predictions

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
    boxes = body_boxes(images, TASK)
    truth = judge.plausibility(labels, boxes)
    assert all(value > 0.8 for value in truth.values())
    generator = torch.Generator().manual_seed(0)
    specks = torch.where(torch.rand(labels.shape, generator=generator) < 0.02, 1, 0).to(labels)
    for distorted in (labels.flip(-1), specks, torch.full_like(labels, 1), labels.roll(20, 1)):
        worse = judge.plausibility(distorted, boxes)["liver"]
        assert worse is not None and worse < truth["liver"] - 0.15


def test_a_slab_is_as_plausible_as_the_whole(scans, trained) -> None:
    judge = Judge(TASK, trained[1])
    images, labels = slices_of(scans / "images" / "case2.nii.gz", scans / "labels" / "case2.nii.gz")
    boxes = body_boxes(images, TASK)
    assert judge.plausibility(labels[3:6], body_boxes(images[3:6], TASK))["liver"] == pytest.approx(
        judge.plausibility(labels, boxes)["liver"], abs=0.1
    )
    assert judge.plausibility(torch.zeros_like(labels), boxes) == {"liver": None, "spleen": None}


@pytest.mark.parametrize("adapters", [{"sam_da": {}}, {"lora": {}}])
def test_a_pyramid_head_is_adapted_by_its_last_hidden_maps(
    scans: Path, tiny_tinyvit_weights: Path, adapters: dict
) -> None:
    """Through SAM's decoder, or where there is none by the encoder; the model stays as it was."""
    network = SamSegmenter(TINY_TINYVIT, 3, weights=tiny_tinyvit_weights, adapters=adapters, head="pyramid")
    statistics, items = SliceStatistics(TASK), []
    for seed in range(2):
        images, labels = slices_of(*(scans / kind / f"case{seed}.nii.gz" for kind in ("images", "labels")))
        statistics.update(images, labels)
        items += [{"image": i, "label": label[None]} for i, label in zip(images, labels, strict=True)]
    counts = torch.bincount(torch.cat([item["label"] for item in items]).flatten().long(), minlength=3)
    network.fit_closed_form(labeled_batches(items, range(len(items))), counts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(network).values():  # as if some steps had been made
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    features = feature_statistics(network, TASK, items, range(len(items)))["features"]
    (layer,) = features
    assert len(layer["mean"][0]) == 16
    record = {"statistics": statistics.to_dict() | {"features": features}}
    scope = "decoder" if "sam_da" in adapters else "encoder"
    settings = {"views": 2, "slices": 4, "steps": 4, "lr": 1e-3, "keep": "last", "scope": scope}
    adaptation = Adaptation(network, TASK, record, method="none", objective={"align": 1.0}, **settings)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    prepared = adaptation.prepare(scans / "images" / "case2.nii.gz")
    run = adaptation.optimize(prepared)
    assert len(run.loss) >= 4 and all(math.isfinite(loss) for loss in run.loss)
    assert run.loss[-1] < run.loss[0]
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert adaptation.adapt(scans / "images" / "case3.nii.gz").record["error"] is None
