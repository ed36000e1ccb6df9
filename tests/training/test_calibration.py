# SPDX-License-Identifier: Apache-2.0
"""The calibration at the end of a training: what it measures, what it leaves alone, and that it is bounded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from samda.data.splits import Split
from samda.data.transforms import build_preprocessing
from samda.expected_dice import Calibration
from samda.networks.segmenter import SamSegmenter
from samda.quality import FEATURES
from samda.source_statistics import feature_statistics
from samda.task import Task
from samda.training import pace
from samda.training.calibration import MOST_SLICES, ROUNDS, calibrate
from samda.training.datasets import SliceDataset
from samda.training.handlers import TrainingRecord

Trained = tuple[SamSegmenter, SliceDataset, Split, dict[str, Any]]


@pytest.fixture
def trained(make_segmenter: Callable[..., SamSegmenter], write_case: Callable, task: Task) -> Trained:
    """A head in closed form on three scans, which also validate here; with their statistics."""
    cases = [write_case(name, seed) for seed, name in enumerate("abc")]
    own = Task.from_dict(task.to_dict() | {"labels": {"liver": [1], "spleen": [2]}})
    slices = SliceDataset(cases, build_preprocessing(own, labels=True), own)
    network = make_segmenter("tiny_vit", adapters={"ssf": {}}, head="pyramid")
    shown = slices.foreground.nonzero().flatten().tolist()
    images, labels = (torch.stack([slices[i][key] for i in shown]) for key in ("image", "label"))
    network.fit_closed_form([(images, labels)], slices.counts)
    statistics = slices.statistics.to_dict() | feature_statistics(network, own, slices, shown)
    return network, slices, Split([], cases, ""), statistics


def test_it_measures_every_patient_and_leaves_the_network_alone(trained: Trained) -> None:
    network, slices, cases, statistics = trained
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = calibrate(network, slices, cases, statistics, training_seconds=1e4)
    assert found is not None
    assert found["about"]["patients"] == 3
    assert found["about"]["rows"] <= 3 * 2 * 4 * (ROUNDS + 1)  # patients, classes, variants, changes
    assert found["about"]["mean_absolute_error"] < 0.3
    assert found["margin"] is not None and 0.05 <= found["margin"] < 1
    model = Calibration.from_record({"calibration": found})
    assert model is not None and len(model.weights) == len(FEATURES) and min(model.weights) >= 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert calibrate(network, slices, cases, statistics, training_seconds=1e4) == found  # nothing random


def test_it_ends_with_its_time(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, slices, cases, statistics = trained
    ticks = iter(range(10**6))
    monkeypatch.setattr(pace, "clock", lambda: float(next(ticks)))  # a second for every look at the clock
    with caplog.at_level(logging.WARNING):
        assert calibrate(network, slices, cases, statistics, training_seconds=0.0) is not None
    seen: list[torch.Size] = []
    monkeypatch.setattr(
        network, "encode", lambda images: seen.append(images.shape) or SamSegmenter.encode(network, images)
    )
    calibrate(network, slices, cases, statistics, training_seconds=0.0)
    assert 0 < sum(shape[0] for shape in seen) <= 5 * (MOST_SLICES + MOST_SLICES // 4)


def test_parameters_from_before_the_validation_patients_joined_are_kept(
    make_segmenter: Callable[..., SamSegmenter],
) -> None:
    network, record = make_segmenter("tiny_vit", adapters={"ssf": {}}, head="pyramid"), TrainingRecord()

    def fill(value: float) -> None:
        with torch.no_grad():
            network.class_head.linear_bias.fill_(value)

    fill(1.0)
    record.validated(0.5, 1, network)
    record.restore_apart(network)
    assert network.class_head.linear_bias[0] == 1.0  # nobody has joined
    fill(2.0)
    record.apart_state = record.best_state  # as RecordEpoch does in the first round after they joined
    record.keep(network)
    record.restore_apart(network)
    assert network.class_head.linear_bias[0] == 1.0
    record.restore_best(network)
    assert network.class_head.linear_bias[0] == 2.0
    old = record.state_dict()
    del old["apart_state"]  # of an older samda
    again = TrainingRecord()
    again.load_state_dict(old)
    assert again.apart_state == {} and again.best_score == 0.5
