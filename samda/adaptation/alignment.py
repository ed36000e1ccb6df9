# SPDX-License-Identifier: Apache-2.0
"""A scan against the statistics of the training slices (:mod:`samda.source_statistics`): features and predictions.

Alignment of features: another scanner shifts and scales the channels that the class head reads. Networks with batch
norm re-estimate their moments at test time; SAM has none, so the adapter restores the moments of the training slices,
as in activation matching (ActMAD, arXiv 2211.12870). A scan may show other organs than the training slices, so the
source's moments are kept by class and mixed in the proportions that the source model predicts. Unlike entropy the
distance has no trivial minimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from samda.adaptation.case import PreparedCase, Segmentation, slice_areas
from samda.adaptation.guard import Evidence, mean_plausibility
from samda.adaptation.loop import mean_agreement
from samda.adaptation.objectives import log_probabilities, most_likely
from samda.errors import InputError
from samda.quality import class_plausibility
from samda.source_statistics import LEAST_VARIANCE, Box, FeatureTap, box_of, class_shares, class_sums, shape_features
from samda.task import Task

FEW = 8.0  # places of the grid that a class must fill to be aligned by itself


class FeatureAlignment:
    """Distance of features from the source's, for each layer and channel.

    d(mu, sigma; mu0, sigma0) = mean_c [ |mu_c - mu0_c| / sigma0_c + |ln(sigma_c / sigma0_c)| ]

        L = mean_l [ d(all places; sum_k pi_k source_k) + mean_k d(places predicted k; source_k) ] / 2

    pi_k is the share of class k in the source model's prediction of the case; sum_k pi_k source_k stands for the
    moments of the mixture: its mean is sum_k pi_k mu0_k, its second moment sum_k pi_k (sigma0_k^2 + mu0_k^2).

    Args:
        source: per layer {"mean", "std"} with a row per class, see :func:`samda.source_statistics.feature_statistics`.
        num_classes: K; InputError where `source` has another number.
    """

    def __init__(self, source: Sequence[Mapping[str, Sequence[Sequence[float] | None]]], num_classes: int) -> None:
        self.num_classes = num_classes
        self.known = [row is not None for row in source[0]["mean"]]
        if len(self.known) != num_classes or not any(self.known):
            raise InputError(
                f"the model's features are of {len(self.known)} classes, not {num_classes}; train it again"
            )
        width = len(next(row for row in source[0]["mean"] if row is not None))
        self.mean, self.square = [], []
        for layer in source:
            mean, std = (torch.tensor([row or [0.0] * width for row in layer[key]]) for key in ("mean", "std"))
            self.mean.append(mean)
            self.square.append(std.square() + mean.square())

    def shares(self, labels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Shares (B, h w, K) of the classes in each place; a class that the source never saw counts as background."""
        unknown = torch.tensor([not known for known in self.known], device=labels.device)
        return class_shares(labels.masked_fill(unknown[labels.long()], 0), self.num_classes, grid)

    def __call__(
        self, features: Sequence[torch.Tensor], shares: torch.Tensor, proportions: torch.Tensor
    ) -> torch.Tensor:
        """The distance, a scalar.

        Args:
            features: per layer (B, n, C), with gradients.
            shares: (B, n, K) of the classes now predicted.
            proportions: (K,) of the classes in the source model's prediction.
        """
        terms = []
        for values, *known in zip(features, self.mean, self.square, strict=True):
            mean0, square0 = (moment.to(values) for moment in known)
            weight, total, square = class_sums(values, shares)
            pi = (proportions / proportions.sum())[None]
            whole = _distance(total.sum(0) / weight.sum(), square.sum(0) / weight.sum(), pi @ mean0, pi @ square0)
            large = [k for k in range(self.num_classes) if weight[k] > FEW]
            by_class = _distance(
                total[large] / weight[large, None], square[large] / weight[large, None], mean0[large], square0[large]
            )
            terms.append((whole + by_class) / 2)
        return torch.stack(terms).mean()


class CaseAlignment:
    """The alignment of one case while it adapts; it remembers the proportions that the source model predicted.

    Args:
        alignment: the distance.
        tap: open on the network.
        shape: (V, m), views and slices of a pass.
        shown: slices that take part.
        ratio: places of the logits per place of the features, along each side.
    """

    def __init__(
        self, alignment: FeatureAlignment, tap: FeatureTap, shape: Sequence[int], shown: Sequence[int], ratio: int
    ) -> None:
        self.ratio = ratio
        self.alignment, self.tap, self.shape, self.shown = alignment, tap, tuple(shape), list(shown)
        self.proportions: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The distance of the pass that gave `logits` (V, m, K, h, w), views as they were seen (flips not undone)."""
        grid = (logits.shape[-2] // self.ratio, logits.shape[-1] // self.ratio)
        shares = self.alignment.shares(most_likely(logits.detach())[:, self.shown].flatten(0, 1), grid)
        if self.proportions is None:
            self.proportions = shares.mean((0, 1))
        layers = [torch.cat(kept).unflatten(0, self.shape)[:, self.shown].flatten(0, 1) for kept in self.tap.features]
        return self.alignment(layers, shares, self.proportions)


def _distance(mean: torch.Tensor, square: torch.Tensor, mean0: torch.Tensor, square0: torch.Tensor) -> torch.Tensor:
    """d of the class's docstring from first and second moments (..., C), averaged over the rows."""
    variance, variance0 = ((s - m.square()).clamp_min(LEAST_VARIANCE) for m, s in ((mean, square), (mean0, square0)))
    return ((mean - mean0).abs() / variance0.sqrt()).mean() + 0.5 * (variance / variance0).log().abs().mean()


class Judge:
    """Turns predictions into evidence for the guard; its :attr:`alignment` measures features.

    InputError where the model folder's `record` lacks the statistics of this task.
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
        self.levels: list[dict[str, Any]] = statistics.get("levels") or []  # folders of samda 0.1 have none

    def evidence(
        self,
        case: PreparedCase,
        prediction: Segmentation,
        agreement: float = math.nan,
        entropy: float = math.nan,
        drift: float = math.nan,
    ) -> Evidence:
        """Evidence of a prediction of all slices."""
        labels = torch.from_numpy(prediction.labels.astype(np.uint8, copy=False))[None]
        plausibility = self.plausibility(case.grid.extract_labels(labels, range(case.grid.num_slices)), case.boxes)
        voxel_ml = float(np.prod(case.grid.spacing_mm)) / 1000.0
        counts = slice_areas(prediction.labels, self.task.num_classes, case.grid.axes[0]).sum(1)
        volumes = {name: int(count) * voxel_ml for name, count in zip(self.task.classes[1:], counts, strict=True)}
        return Evidence(volumes, plausibility, agreement, entropy, drift, prediction.expected)

    def merit(self, case: PreparedCase, absent: float, logits: torch.Tensor, by_class: Mapping[int, float]) -> float:
        """Plausibility^2 x agreement of the chosen slices, in [0, 1]; it decides which iterates may be kept.

        Either alone can mislead: views agree perfectly on one big blob, and a speck at the right position is plausible.
        Agreement rises with every step of most objectives, so plausibility counts twice. Where slices exceed the field
        of view, their windows are judged. With a single view it is plausibility^2.

        Args:
            case: the case.
            absent: plausibility of a class that the prediction lacks.
            logits: (V, m, K, h, w), the slice itself first.
            by_class: agreement of the classes shown; a class of the task that no view shows counts 0.
        """
        scores = F.interpolate(logits[0], case.images.shape[-2:], mode="bilinear")
        plausibility = self.plausibility(most_likely(log_probabilities(scores)).cpu(), list(map(box_of, case.bodies)))
        agreed = mean_agreement(by_class, range(1, self.task.num_classes))
        return mean_plausibility(plausibility, absent) ** 2 * (1.0 if math.isnan(agreed) else agreed)

    def plausibility(self, labels: torch.Tensor, boxes: Sequence[Box]) -> dict[str, float | None]:
        """Plausibility of each foreground class in predicted slices (n, H, W), whose body lies in `boxes`."""
        measured = shape_features(np.asarray(labels), boxes, self.task)
        pairs = zip(self.task.classes[1:], measured[1:], strict=True)
        return {name: class_plausibility(found, self.classes[name], self.quantiles) for name, found in pairs}
