# SPDX-License-Identifier: Apache-2.0
"""Label-free measures: agreement between views, uncertainty, and displacement of the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from samda.adaptation.objectives import log_probabilities, most_likely, normalized_entropy


def class_agreement(logits: torch.Tensor) -> dict[int, float]:
    """Per foreground class the mean over views of Dice(argmax p_v, argmax mean_{u != v} p_u), slices pooled.

    `logits` are (V, N, K, h, w), views mapped back. Empty predictions score 0, also against empty ones: a collapse to
    background must not gain. The result has every class that any view predicts; values are NaN with a single view.
    """
    views = logits.shape[0]
    p = log_probabilities(logits).exp()
    labels = most_likely(p)
    shown = sorted(set(labels.unique().tolist()) - {0})
    if views == 1:
        return dict.fromkeys(shown, float("nan"))
    others = most_likely(p.sum(0, keepdim=True) - p)
    dims = tuple(range(1, labels.ndim))
    dice = {}
    for c in shown:
        a, b = labels == c, others == c
        total = (a.sum(dims) + b.sum(dims)).double()
        dice[c] = float((2.0 * (a & b).sum(dims) / total.clamp_min(1.0)).mean())
    return dice


def mean_agreement(dice: Mapping[int, float], classes: Iterable[int] | None = None) -> float:
    """A in [0, 1]: the mean of :func:`class_agreement` over `classes`, by default those predicted.

    A class that no view predicts counts 0, so that a lost class does not raise the mean. 0 without any class.
    """
    chosen = sorted(dice if classes is None else classes)
    if any(math.isnan(value) for value in dice.values()):
        return math.nan
    return sum(dice.get(c, 0.0) for c in chosen) / len(chosen) if chosen else 0.0


def foreground_entropy(logits: torch.Tensor) -> float:
    """Mean normalized entropy over the pixels that view 0 predicts as foreground; 1 if there are none."""
    log_p = log_probabilities(logits[0])
    foreground = most_likely(log_p) > 0
    return float(normalized_entropy(log_p)[foreground].mean()) if foreground.any() else 1.0


def displacement(parameters: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> float:
    """|theta - theta_0| / |theta_0| over all adapted tensors; the root mean square of the change where theta_0 is 0."""
    moved = sum(float((parameters[name].detach() - start[name]).double().square().sum()) for name in start)
    size = sum(float(start[name].double().square().sum()) for name in start)
    return (moved / (size or sum(tensor.numel() for tensor in start.values()))) ** 0.5
