# SPDX-License-Identifier: Apache-2.0
"""An adaptation that begins with the search for gray values that suit the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samda.adaptation.engine import Adaptation
from samda.adaptation.record import validate_record
from samda.errors import InputError
from samda.inference.predict import Predictor
from samda.metrics import confusion_matrix
from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import feature_statistics
from tests.adaptation.conftest import TASK, save, scan, slices_of
from tests.adaptation.test_commission import CALIBRATION
from tests.conftest import TINY_TINYVIT


def dice(found: np.ndarray, labels: np.ndarray) -> float:
    counts = confusion_matrix(found, labels.astype(np.int64), 3)
    return float(np.mean([2 * counts[k, k] / (counts[k].sum() + counts[:, k].sum()) for k in (1, 2)]))


@pytest.fixture
def pyramid(tiny_tinyvit_weights: Path, trained: tuple, scans: Path) -> tuple[SamSegmenter, dict[str, Any]]:
    """A network with the head `pyramid`, started in closed form on one scan; its record."""
    network = SamSegmenter(TINY_TINYVIT, 3, weights=tiny_tinyvit_weights, adapters=["ssf"], head="pyramid")
    images, labels = slices_of(*(scans / kind / "case0.nii.gz" for kind in ("images", "labels")))
    network.fit_closed_form([(images, labels[:, None])], torch.bincount(labels.flatten()))
    items = [{"image": image, "label": label[None]} for image, label in zip(images, labels, strict=True)]
    moments = feature_statistics(network, TASK, items, range(len(items)))
    calibration = dataclasses.replace(CALIBRATION, usual=1.0)  # nothing is good enough
    return network, {"statistics": trained[1]["statistics"] | moments, "calibration": calibration.to_dict()}


@pytest.mark.parametrize("gamma", [2.0, 2.5])
def test_a_scan_of_darker_gray_values_is_brought_back(gamma: float, pyramid: tuple, tmp_path: Path) -> None:
    network, record = pyramid
    values, labels = scan(3)
    dark = np.where(values < 0, values, 1000 * (values.clip(0, 1000) / 1000) ** gamma)
    path = save(tmp_path / "dark.nii.gz", dark.astype(np.float32))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = Predictor(network, TASK).predict(path)

    engine = Adaptation(network, TASK, record, views=2, slices=4, steps=1)
    assert engine.settings.scope == "intensity+ssf"
    result = engine.adapt(path)
    validate_record(result.record)
    assert result.record["reason"] == "accepted" and result.record["intensity"]["curve"] > 0
    assert np.array_equal(result.source, plain.labels)
    assert dice(result.labels, labels) > dice(result.source, labels) + 0.05
    assert result.tensors is not None and result.tensors["image_encoder.input.adapters.intensity.curve"] > 0

    after = network.state_dict()
    added = {"image_encoder.input.adapters.intensity." + name for name in ("curve", "invert", "detail")}
    assert set(after) == set(before) | added and not any(after[name].any() for name in added)
    assert all(bool((after[name] == tensor).all()) for name, tensor in before.items())
    again = Adaptation(network, TASK, record, views=2, slices=4, steps=1)  # the model is the same, attached or not
    assert again.hashes == engine.hashes
    assert np.array_equal(again.adapt(path).labels, result.labels)
    assert Adaptation.from_record(network, TASK, record, result.record).hashes == engine.hashes


def test_objectives_of_papers_and_models_without_a_calibration_keep_the_gray_values(
    network: SamSegmenter, trained: tuple
) -> None:
    record = trained[1] | {"calibration": CALIBRATION.to_dict()}
    assert Adaptation(network, TASK, record, method="tent").settings.scope == "decoder"
    assert Adaptation(network, TASK, trained[1]).settings.scope == "decoder"
    with pytest.raises(InputError, match=r"'intensity'.*calibration"):
        Adaptation(network, TASK, trained[1], scope="intensity")
    alone = Adaptation(network, TASK, record, scope="intensity")
    assert len(alone.parameters) == 3 and not alone.stepped


def test_the_gray_values_alone_are_adapted(pyramid: tuple, tmp_path: Path) -> None:
    network, record = pyramid
    values, labels = scan(3)
    dark = np.where(values < 0, values, 1000 * (values.clip(0, 1000) / 1000) ** 2.5)
    path = save(tmp_path / "dark.nii.gz", dark.astype(np.float32))
    for settings in ({"scope": "intensity"}, {"scope": "intensity", "steps": 0}):
        result = Adaptation(network, TASK, record, slices=4, **settings).adapt(path)
        assert result.record["reason"] == "accepted" and result.record["steps_run"] == 0
        assert dice(result.labels, labels) > dice(result.source, labels) + 0.05
    none = Adaptation(network, TASK, record, slices=4, scope="intensity", method="none").adapt(path)
    assert none.record["reason"] == "accepted_unchanged"


def test_an_error_of_the_search_falls_back(pyramid: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, record = pyramid
    path = save(tmp_path / "scan.nii.gz", scan(3)[0].astype(np.float32))
    engine = Adaptation(network, TASK, record, slices=4)
    case = engine.prepare(path)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine, "meter", fail)
    outcome = engine.decide(case)
    assert outcome.decision is not None and outcome.decision.reason in ("fallback_oom", "fallback_error")
    assert not case.intensity and np.array_equal(
        engine.restore(case, outcome).labels, case.own_grid(case.source.labels)[0]
    )
    late = Adaptation(network, TASK, record, slices=4, time_limit_s=1e-6).adapt(path)
    assert late.record["reason"] == "fallback_timeout"
