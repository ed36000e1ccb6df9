# SPDX-License-Identifier: Apache-2.0
"""Quality of a prediction without labels: plausibility of its shapes, and five features of each class in a scan.

Each feature is higher where a prediction is better; :mod:`samda.expected_dice` makes a predicted Dice of them:

============== ========================================================================================================
feature        of a class over all slices of a scan
============== ========================================================================================================
confidence     soft Dice 2 sum(p y) / sum(p + y) of the prediction y and its probabilities p (arXiv 2402.10665)
stability      Dice of the prediction and that of the same levels with noise of half their spread
linear         Dice of the prediction and that of the linear path of the head `pyramid` alone
plausibility   see :func:`class_plausibility`
closeness      - ln of the distance of the scan's levels from those of the training slices, in standard deviations
============== ========================================================================================================

All of them come from the levels of the encoder, so nothing is encoded again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import logit

from samda.data.slices import center_channels
from samda.errors import InputError
from samda.networks.head import IMAGE, Pyramid, map_levels
from samda.networks.ops import argmax
from samda.networks.pyramid_head import PyramidHead
from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import FEATURES as SHAPES
from samda.source_statistics import (
    LEAST_VARIANCE,
    ClassFeatures,
    Sums,
    added,
    box_of,
    level_sums,
    shape_features,
    slice_bodies,
)
from samda.task import Task

# of a score: least width of the fall-off, as one patient's slices do not show how far patients differ
LEAST = {"area_mm2": 0.4, "components": 1.0, "compactness": 0.1, "elongation": 0.2, "row": 0.06, "column": 0.06}
LOGARITHMIC = ("area_mm2", "elongation")  # compared as ratios
ONE_SIDED = {"components": 1, "compactness": -1}  # fewer pieces or a rounder shape is not penalized
FEATURES = ("confidence", "stability", "linear", "plausibility", "closeness")
NOISE = 0.5  # of the levels, in standard deviations over the places of a slice
PIXEL_NOISE = 0.05  # of the image
EDGE = 0.01  # shares are brought to [EDGE, 1 - EDGE] before their logit


def feature_score(name: str, values: np.ndarray, quantiles: Mapping[float, float]) -> np.ndarray:
    """Score of a feature's (n,) values, 0 to 1, see :func:`class_plausibility`.

    `quantiles` has 0.05, 0.5 and 0.95 of the source.
    """
    low, middle, high = (quantiles[q] for q in (0.05, 0.5, 0.95))
    if name in LOGARITHMIC:
        values = np.log(np.maximum(values, 1e-6))
        low, middle, high = (math.log(max(v, 1e-6)) for v in (low, middle, high))
    below = np.maximum(0.0, low - values) / max(middle - low, LEAST[name])
    above = np.maximum(0.0, values - high) / max(high - middle, LEAST[name])
    side = ONE_SIDED.get(name, 0)
    departure = above if side > 0 else below if side < 0 else below + above
    return np.exp(-0.5 * departure**2)


def class_plausibility(
    measured: Mapping[str, Sequence[float]], source: Mapping[str, Any], quantiles: Sequence[float]
) -> float | None:
    """Plausibility of one class, 0 to 1; None where no slice holds it.

    Only slices with the class are compared, so a scan may be a slab. A feature scores 1 inside the source's 5 % to 95 %
    range and falls off outside like a Gaussian whose width is the distance from the median to that end. The class
    scores the mean over its slices, weighted by area, of the geometric mean of its features: an organ of usual size and
    position scores near 1, specks and leaks near 0.

    `measured` has each feature's (n,) values over the slices with the class; `source` is the class's entry of the
    model's statistics, which lists these `quantiles`.
    """
    areas = np.asarray(measured["area_mm2"], float)
    if not len(areas):
        return None
    if source.get("area_mm2") is None:
        return 0.0  # the training data never showed this class
    logs = []
    for name in SHAPES:
        known = dict(zip(quantiles, source[name], strict=True))
        logs.append(np.log(np.maximum(feature_score(name, np.asarray(measured[name], float), known), 1e-9)))
    scores = np.exp(np.mean(logs, axis=0))
    return float(np.average(scores, weights=areas))


class QualityMeter:
    """Runs a network and measures, batch by batch, what the features of a scan need.

    Call it as the network; :meth:`features` closes a scan and :meth:`clear` begins the next one.

    Args:
        network: the segmenter; merged adapters are fine.
        task: what it segments.
        statistics: the source statistics of the model's record; InputError where they lack a class of the task.
    """

    def __init__(self, network: SamSegmenter, task: Task, statistics: Mapping[str, Any]) -> None:
        classes = statistics.get("classes") or {}
        missing = [name for name in task.classes[1:] if name not in classes]
        if missing or "quantiles" not in statistics:
            raise InputError(f"the model's source statistics lack {[*missing, 'quantiles'][0]!r}; train it again")
        self.network, self.task, self.statistics = network, task, statistics
        self.pyramid_head = network.head if isinstance(network.head, PyramidHead) else None
        self._noise: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Begin a scan."""
        k = self.task.num_classes
        self.soft = np.zeros((2, k))  # sums of p y, and of p + y
        self.overlaps = np.zeros((2, 2, k))  # with the noisy and the linear prediction: overlap, sum of sizes
        self.shapes: list[ClassFeatures] = [{name: [] for name in SHAPES} for _ in range(k)]
        self.levels: Sums = []

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, pyramid: Pyramid | None = None, bodies: np.ndarray | None = None
    ) -> torch.Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W), whose `pyramid` and `bodies`, masks (B, H, W), may be known."""
        pyramid = self.network.encode(images) if pyramid is None else pyramid
        coarse = self.network.decode(pyramid)
        logits = self.network.upsampled(coarse)
        self._add(images, pyramid, bodies, coarse.float(), logits)
        return logits

    def _add(
        self,
        images: torch.Tensor,
        pyramid: Pyramid,
        bodies: np.ndarray | None,
        coarse: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        k = self.task.num_classes
        maps, labels = coarse.softmax(1), argmax(coarse, 1).long()
        sizes = _counts(labels, k)
        confident = torch.stack([maps[:, c][labels == c].sum() for c in range(k)])
        self.soft += torch.stack([confident, maps.sum((0, 2, 3)) + sizes]).double().cpu().numpy()
        shown = labels.flatten(1).any(1)
        if not shown.any():
            return
        pyramid, labels = map_levels(lambda level: level[shown].to(coarse), pyramid), labels[shown]
        if bodies is None:
            bodies = slice_bodies(center_channels(images[shown], self.task), self.task)
        else:
            bodies = bodies[shown.cpu().numpy()]
        others = [self.network.decode(self._noisy(pyramid))]
        if self.pyramid_head is not None:
            height, width = pyramid[IMAGE].shape[-2:]
            levels = self.pyramid_head.standardized(pyramid)
            others.append(self.pyramid_head.linear_logits(levels, (height // 4, width // 4), labels.shape[-2:]))
            self.levels = added(self.levels, level_sums(self.network, pyramid, bodies))
        for sums, logits_ in zip(self.overlaps, others, strict=False):
            other = argmax(logits_, 1).long()
            both = _counts(torch.where(labels == other, labels, 0), k)
            sums += torch.stack([both, sizes + _counts(other, k)]).double().cpu().numpy()
        full = argmax(logits[shown], 1).cpu().numpy()
        for kept, found in zip(self.shapes, shape_features(full, list(map(box_of, bodies)), self.task), strict=True):
            for name, values in found.items():
                kept[name] += values

    def _noisy(self, pyramid: Pyramid) -> Pyramid:
        """Levels with one pattern of noise for all slices, so that batches do not matter."""
        noisy = {}
        for name, level in pyramid.items():
            key = name, tuple(level.shape[1:])
            if key not in self._noise:
                generator = torch.Generator().manual_seed(zlib.crc32(str(key).encode()))
                self._noise[key] = torch.randn(key[1], generator=generator)
            spread = PIXEL_NOISE if name == IMAGE else NOISE * _deviation(level)
            noisy[name] = level + spread * self._noise[key].to(level)
        return noisy

    def features(self) -> dict[str, list[float] | None]:
        """Class -> features in the order of :data:`FEATURES`, None for a class that is not predicted; then clear.

        Features that the head does not have are NaN.
        """
        closeness = self._closeness()
        result: dict[str, list[float] | None] = {}
        for k, name in enumerate(self.task.classes[1:], start=1):
            plausible = class_plausibility(
                self.shapes[k], self.statistics["classes"][name], self.statistics["quantiles"]
            )
            if plausible is None:
                result[name] = None
                continue
            agreed = [2 * both / total if total else math.nan for both, total in self.overlaps[:, :, k]]
            shares = [2 * self.soft[0, k] / self.soft[1, k], *agreed, plausible]
            result[name] = [*(float(logit(min(max(v, EDGE), 1 - EDGE))) for v in shares), closeness]
        self.clear()
        return result

    def _closeness(self) -> float:
        known = self.statistics.get("levels") or []
        distances = []
        for source, sums in zip(known, self.levels, strict=False):
            weight, total, square = (part[0].cpu().numpy() for part in sums)
            if not weight:
                return math.nan
            mean, std = total / weight, np.sqrt(np.maximum(square / weight - (total / weight) ** 2, LEAST_VARIANCE))
            mean0, std0 = (np.asarray(source[key][0]) for key in ("mean", "std"))
            distances.append(np.mean(np.abs(mean - mean0) / std0) + np.mean(np.abs(np.log(std / std0))))
        return -math.log(max(float(np.mean(distances)), EDGE)) if distances else math.nan


def _deviation(level: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the places of a level (B, C, h, w) -> (B, C, 1, 1); `std` takes 20 times as long."""
    return (level - level.mean((2, 3), keepdim=True)).square().mean((2, 3), keepdim=True).sqrt()


def _counts(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.bincount(labels.flatten(), minlength=num_classes).float()
