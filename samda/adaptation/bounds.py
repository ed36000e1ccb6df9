# SPDX-License-Identifier: Apache-2.0
"""Bounds of the organs: how large and how far spread the training slices show each class.

Losses that make a prediction more certain also make it grow, and never stop by themselves. These bounds stop it where
no training slice was: a differentiable penalty on the soft moments of every class, in the way of size and shape priors
at test time (Bateson et al., arXiv 2207.03574), from the statistics that the model folder carries. There is no lower
bound: a slab may miss any organ. And there is none on the place: where an arm touches the flank, or the field of view
cuts the body, places shift for every organ at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from samda.adaptation.objectives import most_likely
from samda.data.task import Task

__all__ = ["OrganBounds"]

SLACK = 1.5  # one or few patients' slices do not show how far patients differ
STRIDE = 4  # image pixels per logit


class OrganBounds:
    """Penalty on class probabilities that outgrow what the training slices showed.

    For class k of slice n, with probabilities p over the pixels x that are predicted as k (the others hold a faint haze
    of every class): area a = sum p, centroid c = sum p x / a, spread s = sum p |x - c|^2 / a. The largest spread is
    that of an ellipse of the largest area A and elongation e, s_max = A (e + 1/e) / (4 pi). With ln+ the positive part
    of the logarithm, h(z) = z^2 below 1 and 2 z - 1 above,

        penalty = mean_{v,n,k} w [h(ln+ a / (SLACK A)) + h(ln+ s / (SLACK s_max))]

    where w = min(1, a / median area), held fixed, lets a speck weigh little. A and e are 95 % quantiles.

    Args:
        task: classes and spacing of the slices.
        classes: entry of each class in the model's statistics; a class that no training slice held is not bounded.
        quantiles: which quantiles these entries list.
    """

    def __init__(self, task: Task, classes: Mapping[str, Any], quantiles: Sequence[float]) -> None:
        def quantile(feature: str, q: float) -> torch.Tensor:
            place = list(quantiles).index(q)
            return torch.tensor([(classes[name][feature] or {place: math.inf})[place] for name in task.classes[1:]])

        self.pixel_mm2 = (STRIDE * task.spacing) ** 2
        largest, elongation = quantile("area_mm2", 0.95), quantile("elongation", 0.95)
        self.usual, self.area = quantile("area_mm2", 0.5), SLACK * largest
        self.spread = SLACK * largest * (elongation + 1 / elongation) / (4 * math.pi)

    def __call__(self, p: torch.Tensor) -> torch.Tensor:
        """The penalty, a scalar.

        Args:
            p: probabilities (V, m, K, h, w), the background first.
        """
        classes = torch.arange(1, p.shape[2], device=p.device).view(-1, 1, 1)
        p = p[:, :, 1:] * (most_likely(p.detach()).unsqueeze(2) == classes)
        usual, largest, widest = (limit.to(p) for limit in (self.usual, self.area, self.spread))
        pixels = p.sum((-2, -1)).clamp_min(1e-3)
        area = pixels * self.pixel_mm2
        rows, columns = (p.sum(other) / pixels[..., None] for other in (-1, -2))
        spread = self.pixel_mm2 * (_variance(rows) + _variance(columns))
        weight = (area / usual).detach().clamp_max(1.0)
        excess = weight * (_huber(_excess(area, largest)) + _huber(_excess(spread, widest)))
        return excess.mean()


def _variance(density: torch.Tensor) -> torch.Tensor:
    """Variance of the position under densities (..., n), in pixels squared."""
    x = torch.arange(density.shape[-1], device=density.device, dtype=density.dtype)
    mean = (density * x).sum(-1, keepdim=True)
    return (density * (x - mean) ** 2).sum(-1)


def _excess(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    return (value / limit).clamp_min(1.0).log()


def _huber(z: torch.Tensor) -> torch.Tensor:
    """z^2 below 1, 2 z - 1 above; z is not negative."""
    return torch.where(z < 1, z * z, 2 * z - 1)
