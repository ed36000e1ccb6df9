# SPDX-License-Identifier: Apache-2.0
"""Features of a scan and the calibration of predicted Dice; for plausibility see tests/adaptation/test_alignment.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch

from samda.errors import InputError
from samda.expected_dice import Calibration, Row, fit_calibration
from samda.quality import FEATURES, QualityMeter
from samda.source_statistics import SliceStatistics, feature_statistics
from samda.task import Task

TASK = Task(name="t", classes=("background", "a", "b"), spacing=2.0, image_size=64, modality="image")
GENERATOR = np.random.default_rng(0)


def rows_of(weights: list[float], patients: int = 8, scans: int = 12, noise: float = 0.02, seed: int = 0) -> list[Row]:
    """Rows whose Dice is a logistic function of the features, with noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        for scan in range(scans):
            x = rng.normal(0, 1, len(FEATURES))
            dice = 1 / (1 + math.exp(-(0.5 + float(np.dot(weights, x))))) + noise * rng.standard_normal()
            rows.append(Row(f"p{patient}", f"p{patient}/{scan}", 0, "a", x.tolist(), min(max(dice, 0.0), 1.0)))
    return rows


@pytest.fixture
def meter(make_segmenter: Callable) -> QualityMeter:
    """Of a tiny network whose head starts in closed form."""
    network = make_segmenter("tiny_vit", adapters={"ssf": {}}, head="pyramid")
    images, labels = pictures(6)
    network.fit_closed_form([(images, labels)], torch.bincount(labels.flatten(), minlength=3))
    statistics = SliceStatistics(TASK)
    statistics.update(images[:, :1], labels[:, 0])
    items = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    return QualityMeter(network, TASK, statistics.to_dict() | feature_statistics(network, TASK, items, range(6)))


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 3, 64, 64) of two bright disks, and labels (n, 1, 64, 64)."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    labels = torch.zeros(count, 1, 64, 64, dtype=torch.long)
    for i in range(count):
        labels[i, 0][(x - 20 - i) ** 2 + (y - 24) ** 2 < 100] = 1
        labels[i, 0][(x - 44) ** 2 + (y - 40 + i) ** 2 < 64] = 2
    noise = 0.02 * torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    return (0.1 + 0.4 * labels + noise).float(), labels


@pytest.mark.parametrize("modality", ["image", "MR"])
def test_features_do_not_depend_on_the_batches(modality: Literal["image", "MR"], meter: QualityMeter) -> None:
    images, _ = pictures(6)
    images *= torch.linspace(1, 0.4, 6)[:, None, None, None]  # the body of an MR slice depends on its brightness
    meter = QualityMeter(meter.network, dataclasses.replace(TASK, modality=modality), meter.statistics)
    whole = [meter(images), meter.features()][1]
    for part in images.split(2):
        meter(part)
    parts = meter.features()
    assert whole["a"] is not None and parts["a"] is not None
    assert parts["a"] == pytest.approx(whole["a"], abs=1e-3)
    assert meter.features() == {"a": None, "b": None}  # a closed scan leaves nothing


def test_logits_are_those_of_the_network_and_features_follow_their_formulas(meter: QualityMeter) -> None:
    images, _ = pictures(3)
    logits = meter(images)
    with torch.no_grad():
        assert torch.equal(logits, meter.network(images))
    found = meter.features()["a"]
    assert found is not None
    p = meter.network.decode(meter.network.encode(images)).softmax(1).double().detach().numpy()
    y = p.argmax(1) == 1
    share = 2 * p[:, 1][y].sum() / (p[:, 1].sum() + y.sum())
    assert found[0] == pytest.approx(math.log(share / (1 - share)), rel=1e-4)
    assert all(math.isfinite(value) for value in found)


def test_statistics_without_a_class_are_refused(meter: QualityMeter) -> None:
    for statistics in ({}, {"quantiles": [0.5], "classes": {"a": {}}}):
        with pytest.raises(InputError, match="statistics lack"):
            QualityMeter(meter.network, TASK, statistics)


def test_worse_pictures_have_lower_features(meter: QualityMeter) -> None:
    images, _ = pictures(6)
    meter(images)
    clean = meter.features()["a"]
    meter((images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1))
    noisy = meter.features()["a"]
    assert clean is not None and noisy is not None
    assert noisy[-1] < clean[-1]  # levels went away from those of the training
    assert noisy[3] < clean[3]  # and so did the shapes


def test_the_regression_finds_the_weights_and_never_a_negative_one() -> None:
    true = [1.0, 0.5, 0.0, 0.8, 0.0]
    rows = rows_of(true, scans=40)
    model = fit_calibration(rows)
    assert model is not None
    assert np.asarray(model.weights) / model.std == pytest.approx(true, abs=0.15)
    turned = fit_calibration(rows_of([-1.0, 0.5, 0.0, 0.8, 0.0]))
    assert turned is not None and turned.weights[0] == 0


def test_the_interval_covers_new_patients_nine_times_of_ten() -> None:
    weights = [1.0, 0.5, 0.2, 0.8, 0.1]
    model = fit_calibration(rows_of(weights, patients=20, noise=0.05))
    assert model is not None
    inside = []
    for row in rows_of(weights, patients=40, noise=0.05, seed=1):
        one = model.expected({"a": row.features}).dice["a"]
        assert one.low <= one.dice <= one.high
        inside.append(one.low <= row.dice <= one.high)
    assert 0.86 <= np.mean(inside) <= 0.95


def changed(rows: list[Row], rise: float, dice: float) -> list[Row]:
    """The rows as another prediction of their scans: features rise by 0 to `rise`, the Dice by `dice`."""
    rng = np.random.default_rng(1)
    found = []
    for r in rows:
        features = (np.asarray(r.features) + rise * rng.random()).tolist()
        found.append(Row(r.patient, r.scan, 1, r.name, features, min(max(r.dice + dice, 0.0), 1.0)))
    return found


def gains(model: Calibration, rows: list[Row], better: list[Row]) -> np.ndarray:
    """Predicted gains, scan by scan."""
    now, before = ([model.expected({"a": row.features}).mean for row in part] for part in (better, rows))
    return np.subtract(now, before)


def test_the_margin_bounds_how_many_replacements_harm() -> None:
    """(k + 1) / (n + 1) <= 0.03, where k of n = 96 pairs lose more than 0.02 and gain more than the margin: one may."""
    rows = rows_of([1.0, 0.5, 0.2, 0.8, 0.1], noise=0.0)
    overestimated = fit_calibration(rows + changed(rows, 0.3, 0.0))  # looks better, and loses nothing
    assert overestimated is not None and overestimated.margin == 0.05
    harmful = changed(rows, 0.6, -0.1)
    model = fit_calibration(rows + harmful)
    assert model is not None and model.margin is not None
    found = gains(model, rows, harmful)  # the margin is of patients left out, so a few more may lie above
    assert model.margin > 0.05 and (found > model.margin).sum() <= 4 and (found > 0.8 * model.margin).sum() > 4
    worse = fit_calibration(rows + changed(rows, -9.0, -1.0))  # looks worse and is
    assert worse is not None and worse.margin == 0.05
    assert min(worse.heights) > min(row.dice for row in rows)  # of predictions as they are


def test_a_gain_farther_from_the_training_slices_is_none() -> None:
    model = fit_calibration(rows_of([1.0, 0.5, 0.2, 0.8, 0.1]))
    assert model is not None
    mean, std = np.array(model.mean), np.array(model.std)

    def gain(*rise: float) -> float:
        now, before = (model.expected({"a": (mean + np.array(z) * std).tolist()}) for z in (rise, [0.0] * 5))
        return now.gain_over(before)

    assert gain(2.0, 0.0, 0.0, 0.0, 0.0) > 0.1 and gain(2.0, 0.0, 0.0, 0.0, 0.5) > 0.1
    assert gain(2.0, 0.0, 0.0, 0.0, -0.5) == 0.0
    assert gain(-2.0, 0.0, 0.0, 0.0, -0.5) < -0.1  # a fall stays one


def test_a_class_that_only_the_other_prediction_shows_is_harm() -> None:
    """It raises the sum of the predicted Dice; its true Dice is 0."""
    rows = rows_of([1.0, 0.5, 0.2, 0.8, 0.1], noise=0.0)
    same = [dataclasses.replace(row, variant=1) for row in rows]
    invented = [dataclasses.replace(row, name="b", variant=1, dice=0.0, true=False) for row in rows]
    model, other = fit_calibration(rows + same), fit_calibration(rows + same + invented)
    assert model is not None and other is not None and model.margin is not None and other.margin is not None
    assert model.margin == 0.05 and other.margin > 0.2
    assert other.weights == model.weights  # the Dice of a class that is not there teaches nothing


def test_without_enough_pairs_no_gain_is_trusted() -> None:
    rows = rows_of([1.0, 0.5, 0.2, 0.8, 0.1], noise=0.0)
    alone = fit_calibration(rows)
    assert alone is not None and alone.margin is None
    few = rows[:24]
    better = changed(few, 0.3, 0.0)
    model = fit_calibration(few + better)
    assert model is not None and model.margin is not None
    assert (gains(model, few, better) > model.margin).sum() <= 1


def test_the_usual_dice_is_that_of_scans_as_they_are() -> None:
    rows = rows_of([1.0, 0.5, 0.2, 0.8, 0.1], noise=0.0)
    others = rows_of([1.0, 0.5, 0.2, 0.8, 0.1], noise=0.0, seed=1)
    worse = [dataclasses.replace(r, scan=r.scan + "/1", shifted=True) for r in others if r.dice < 0.6]
    model = fit_calibration(rows + worse)
    assert model is not None
    assert model.usual == pytest.approx(np.median([row.dice for row in rows]), abs=0.02)
    assert np.median([row.dice for row in rows + worse]) < model.usual - 0.05


def test_features_beyond_what_was_calibrated_count_as_its_end() -> None:
    calibration = fit_calibration(rows_of([1.0, 0.5, 0.2, 0.8, 0.1]))
    assert calibration is not None
    mean, std, weights = (np.array(part) for part in (calibration.mean, calibration.std, calibration.weights))
    for distance in (2.0, 3.0, 30.0):
        features = mean - np.array([0, 0, 0, distance, 0]) * std
        z = calibration.bias + calibration.class_bias["a"] - weights[3] * min(distance, 3.0)
        assert calibration.expected({"a": features.tolist()}).dice["a"].dice == pytest.approx(1 / (1 + math.exp(-z)))


def test_a_missing_class_is_expected_to_have_dice_0_and_few_rows_give_nothing() -> None:
    rows = rows_of([1.0] * 5)
    model = fit_calibration(rows)
    assert model is not None
    quality = model.expected({"a": rows[0].features, "b": None})
    assert (quality.dice["b"].dice, quality.dice["b"].predicted) == (0.0, False)
    assert quality.mean == quality.dice["a"].dice
    assert type(quality).from_dict(quality.to_dict()).to_dict() == quality.to_dict()
    assert fit_calibration(rows[:5]) is None


def test_a_record_is_read_back_and_a_damaged_one_refused() -> None:
    model = fit_calibration(rows_of([1.0] * 5))
    assert model is not None
    assert Calibration.from_record({"calibration": model.to_dict()}) == model
    assert Calibration.from_record({}) is None
    for change in ({"weights": [1.0]}, {"std": [0.0] * 5}, {"margin": math.nan}, {"other": 1}):
        with pytest.raises(InputError, match="calibration"):
            Calibration.from_record({"calibration": model.to_dict() | change})
