# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a model that sees neighboring slices, and of one that keeps the largest piece of each organ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samda.adaptation.engine import Adaptation
from samda.adaptation.guard import mean_plausibility
from samda.adaptation.loop import class_agreement, mean_agreement
from samda.errors import UsageError
from samda.inference.postprocessing import keep_largest, override
from samda.inference.predict import Predictor
from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import body_boxes, box_of
from tests.adaptation.conftest import ALWAYS, TASK
from tests.conftest import TINY_TINYVIT

WIDE = dataclasses.replace(TASK, context=1)


@pytest.fixture
def wide_network(tiny_tinyvit_weights: Path, trained: tuple[dict[str, torch.Tensor], dict]) -> SamSegmenter:
    """The trained tiny network with three input channels; equal channels give what it gives for one."""
    network = SamSegmenter(
        TINY_TINYVIT, num_classes=3, in_channels=3, weights=tiny_tinyvit_weights, adapters={"sam_da": {}}
    )
    network.load_state_dict(trained[0])
    return network.eval()


def test_neighbors_reach_views_and_the_guard_measures_the_slice(
    wide_network: SamSegmenter, trained: tuple[dict, dict[str, Any]], scans: Path
) -> None:
    adaptation = Adaptation(wide_network, WIDE, trained[1], views=3, slices=4, steps=2, guard=ALWAYS, lr=0.02)
    path = scans / "images" / "case2.nii.gz"
    prepared = adaptation.prepare(path)
    plain = prepared.grid.extract(prepared.data["image"].as_tensor(), range(9))[:, 0]
    expected = torch.stack([plain[[max(i - 1, 0), i, min(i + 1, 8)]] for i in prepared.slices])
    assert torch.equal(prepared.images, expected)
    logits = adaptation.logits(prepared).detach()
    labels = torch.nn.functional.interpolate(logits[0], (64, 64), mode="bilinear").softmax(1).argmax(1)
    assert list(map(box_of, prepared.bodies)) == body_boxes(expected[:, 1:2], WIDE)
    plausible = mean_plausibility(adaptation.judge.plausibility(labels, list(map(box_of, prepared.bodies))), 0.3)
    agreed = class_agreement(logits)
    expected_merit = plausible**2 * mean_agreement(agreed, (1, 2))
    assert adaptation.judge.merit(prepared, adaptation.guard.absent, logits, agreed) == pytest.approx(expected_merit)

    before = {name: value.clone() for name, value in wide_network.state_dict().items()}
    result = adaptation.adapt(path)
    assert result.record["error"] is None and result.record["steps_run"] == 2
    assert all(torch.equal(value, before[name]) for name, value in wide_network.state_dict().items())
    assert np.array_equal(result.source, Predictor(wide_network, WIDE).predict(path).labels)
    again = Adaptation.from_record(wide_network, WIDE, trained[1], result.record).adapt(path)
    assert np.array_equal(again.labels, result.labels)


def test_keep_largest_is_that_of_predict_and_part_of_the_record(
    make_adaptation: Callable[..., Adaptation], network: SamSegmenter, trained: tuple, scans: Path
) -> None:
    path = scans / "images" / "case3.nii.gz"
    plain = make_adaptation()
    assert "keep_largest" not in plain.config, "records of models without it stay as they are"
    rough = plain.adapt(path)
    adaptation = make_adaptation(keep_largest="all", guard=ALWAYS, lr=0.02)
    assert adaptation.config["keep_largest"] is True
    assert make_adaptation(keep_largest=["spleen"]).config["keep_largest"] == ["spleen"]
    result = adaptation.adapt(path)
    assert np.array_equal(result.source, Predictor(network, override(TASK, True)).predict(path).labels)
    assert np.array_equal(result.source, keep_largest(rough.source, (1, 2)))
    assert np.array_equal(result.labels, keep_largest(result.labels, (1, 2)))
    voxel_ml = 8 / 1000
    assert result.record["volumes_ml"]["liver"][0] == pytest.approx((result.source == 1).sum() * voxel_ml, abs=1e-3)
    again = Adaptation.from_record(network, TASK, trained[1], result.record).adapt(path)
    assert again.record["labels_sha256"] == result.record["labels_sha256"]
    with pytest.raises(UsageError, match="keep_largest names 'kidney'"):
        make_adaptation(keep_largest=["kidney"])
