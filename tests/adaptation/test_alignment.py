# SPDX-License-Identifier: Apache-2.0
"""Alignment of features, by hand and in a whole adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samda.adaptation.alignment import FeatureAlignment
from samda.adaptation.engine import Adaptation
from samda.errors import InputError
from samda.networks.segmenter import SamSegmenter
from tests.adaptation.conftest import TASK

SOURCE = [{"mean": [1.0, -2.0], "std": [2.0, 0.5]}]


def test_the_source_itself_is_at_distance_zero() -> None:
    # two values, mean +- deviation, have exactly these moments
    features = torch.tensor([[1.0 + 2.0, -2.0 + 0.5], [1.0 - 2.0, -2.0 - 0.5]])
    assert float(FeatureAlignment(SOURCE)([features])) == pytest.approx(0.0, abs=1e-6)


def test_shift_and_stretch_by_hand() -> None:
    # channel 0: mean 2 (off by 1, half a deviation), deviation 4 (twice); channel 1 as the source's
    features = torch.tensor([[2.0 + 4.0, -1.5], [2.0 - 4.0, -2.5]])
    assert float(FeatureAlignment(SOURCE)([features])) == pytest.approx((0.5 + math.log(2)) / 2, abs=1e-6)


def test_layers_count_alike() -> None:
    features = torch.tensor([[2.0 + 4.0, -1.5], [2.0 - 4.0, -2.5]])
    same = torch.tensor([[3.0, -1.5], [-1.0, -2.5]])
    both = FeatureAlignment(SOURCE * 2)([features, same])
    assert float(both) == pytest.approx((0.5 + math.log(2)) / 4, abs=1e-6)


def test_aligning_lowers_the_distance_and_leaves_the_model_as_it_was(
    make_adaptation: Callable[..., Adaptation], scans: Path, network: SamSegmenter
) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    adaptation = make_adaptation(method="none", objective={"align": 1.0}, steps=6, lr=1e-3, keep="last")
    prepared = adaptation.prepare(scans / "images" / "case2.nii.gz")
    prepared.inputs = prepared.inputs * 1.3 + 0.2  # another scanner, seen from the decoder
    run = adaptation.optimize(prepared)
    assert run.loss[-1] < 0.8 * run.loss[0]
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_model_without_features_is_refused(network: SamSegmenter, trained: tuple) -> None:
    statistics = {k: v for k, v in trained[1]["statistics"].items() if k != "features"}
    with pytest.raises(InputError, match="lack its features, which are aligned to; train it again"):
        Adaptation(network, TASK, {"statistics": statistics})
