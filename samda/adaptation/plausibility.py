# SPDX-License-Identifier: Apache-2.0
"""How well a prediction fits what the model saw at training time, class by class, without labels.

The model folder carries, for every class, the quantiles over training slices of area, number of pieces, compactness,
elongation and position in the body (:mod:`samda.source_statistics`). They hold for a slab as for a whole body, since
nothing is compared but slices in which the class appears. A feature scores 1 inside the source's 5 % to 95 % range and
falls off outside like a Gaussian whose width is the distance from the median to that end. A class scores the mean over
its slices, weighted by area, of the geometric mean of its features: one organ of the usual size at the usual place is
near 1, specks and leaks into the neighborhood are near 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from samda.adaptation.alignment import FeatureAlignment
from samda.adaptation.case import PreparedCase, Segmentation
from samda.adaptation.guard import Evidence
from samda.errors import InputError
from samda.source_statistics import FEATURES, SliceStatistics
from samda.task import Task

# least width of a feature's fall-off: one patient's slices do not show how far patients differ
LEAST = {"area_mm2": 0.4, "components": 1.0, "compactness": 0.1, "elongation": 0.2, "row": 0.06, "column": 0.06}
LOGARITHMIC = ("area_mm2", "elongation")  # compared as ratios
ONE_SIDED = {"components": 1, "compactness": -1}  # fewer pieces or a rounder shape is no fault


def feature_score(name: str, values: np.ndarray, quantiles: Mapping[float, float]) -> np.ndarray:
    """Score of a feature's values, 0 to 1, see the module.

    Args:
        name: of the feature.
        values: (n,) measured in slices.
        quantiles: quantile -> value over the training slices; 0.05, 0.5 and 0.95 are used.
    """
    low, middle, high = (quantiles[q] for q in (0.05, 0.5, 0.95))
    if name in LOGARITHMIC:
        values, low, middle, high = (
            np.log(np.maximum(values, 1e-6)),
            *(math.log(max(v, 1e-6)) for v in (low, middle, high)),
        )
    below = np.maximum(0.0, low - values) / max(middle - low, LEAST[name])
    above = np.maximum(0.0, values - high) / max(high - middle, LEAST[name])
    side = ONE_SIDED.get(name, 0)
    departure = above if side > 0 else below if side < 0 else below + above
    return np.exp(-0.5 * departure**2)


def class_plausibility(
    measured: Mapping[str, Sequence[float]], source: Mapping[str, Any], quantiles: Sequence[float]
) -> float | None:
    """Plausibility of one class from its features in each slice; None where no slice holds it.

    Args:
        measured: feature -> (n,) values over the slices that hold the class.
        source: the class's entry of the model's statistics.
        quantiles: which quantiles that entry lists.
    """
    areas = np.asarray(measured["area_mm2"], float)
    if not len(areas):
        return None
    if source.get("area_mm2") is None:
        return 0.0  # the training data never showed this class
    logs = []
    for name in FEATURES:
        known = dict(zip(quantiles, source[name], strict=True))
        logs.append(np.log(np.maximum(feature_score(name, np.asarray(measured[name], float), known), 1e-9)))
    scores = np.exp(np.mean(logs, axis=0))
    return float(np.average(scores, weights=areas))


class Judge:
    """Turns predictions into evidence for the guard.

    Args:
        task: the task.
        record: the model folder's record.

    Raises:
        InputError: the record holds no source statistics, or not those of this task.
    """

    def __init__(self, task: Task, record: Mapping[str, Any]) -> None:
        self.task = task
        statistics = record.get("statistics")
        if not statistics:
            raise InputError("the model folder holds no source statistics, which the guard judges by; train it again")
        self.quantiles = statistics["quantiles"]
        self.classes: dict[str, Any] = statistics["classes"]
        missing = [name for name in task.classes[1:] if name not in self.classes]
        if missing:
            raise InputError(f"the model's source statistics lack the class {missing[0]!r}; train it again")
        features = statistics.get("features")
        if not features:
            raise InputError("the model's source statistics lack its features, which are aligned to; train it again")
        self.alignment = FeatureAlignment(features, task.num_classes)

    def evidence(
        self,
        prepared: PreparedCase,
        prediction: Segmentation,
        agreement: float,
        entropy: float,
        drift: float = math.nan,
    ) -> Evidence:
        """Evidence of a prediction of all slices."""
        volume = prepared.data["image"].as_tensor()
        labels = torch.from_numpy(prediction.labels.astype(np.uint8, copy=False))[None]
        every = range(prepared.grid.num_slices)
        plausibility = self.plausibility(
            prepared.grid.extract(volume, every), prepared.grid.extract_labels(labels, every)
        )
        voxel_ml = float(np.prod(prepared.grid.spacing_mm)) / 1000.0
        counts = np.bincount(prediction.labels.ravel(), minlength=self.task.num_classes)
        volumes = {name: int(counts[k]) * voxel_ml for k, name in enumerate(self.task.classes) if k}
        return Evidence(volumes, plausibility, agreement, entropy, drift)

    def plausibility(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
        """Plausibility of each foreground class.

        Args:
            images: (n, C, H, W) neighboring slices.
            labels: (n, H, W) their prediction.
        """
        measured = SliceStatistics(self.task)
        measured.update(images, labels)
        return {
            name: class_plausibility(measured.features[k], self.classes[name], self.quantiles)
            for k, name in enumerate(self.task.classes)
            if k
        }
