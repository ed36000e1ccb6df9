# SPDX-License-Identifier: Apache-2.0
"""What can be measured without labels: agreement between views, uncertainty, and how far the parameters moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from samda.adaptation.objectives import log_probabilities, most_likely, normalized_entropy

__all__ = ["agreement", "displacement", "foreground_entropy", "predicted_classes"]


def predicted_classes(logits: torch.Tensor) -> set[int]:
    """The foreground classes that any view predicts anywhere; logits (V, N, K, h, w)."""
    return set(most_likely(log_probabilities(logits)).unique().tolist()) - {0}


def agreement(logits: torch.Tensor, classes: Iterable[int] | None = None) -> float:
    """A = mean over views and foreground classes of Dice(argmax p_v, argmax mean_{u != v} p_u), slices pooled.

    Empty against anything scores 0, empty against empty too: a prediction that collapses to background must not gain.

    Args:
        logits: (V, N, K, h, w), views mapped back.
        classes: foreground classes to average over; None takes those that any view predicts.

    Returns:
        A in [0, 1]; 0 without any class, NaN with a single view (nothing to agree with).
    """
    views = logits.shape[0]
    if views == 1:
        return float("nan")
    chosen = sorted(predicted_classes(logits) if classes is None else classes)
    if not chosen:
        return 0.0
    p = log_probabilities(logits).exp()
    labels = most_likely(p)
    others = most_likely(p.sum(0, keepdim=True) - p)
    dims = tuple(range(1, labels.ndim))
    dice = []
    for c in chosen:
        a, b = labels == c, others == c
        total = (a.sum(dims) + b.sum(dims)).double()
        dice.append(2.0 * (a & b).sum(dims) / total.clamp_min(1.0))
    return float(torch.stack(dice).mean())


def foreground_entropy(logits: torch.Tensor) -> float:
    """Mean normalized entropy over the pixels that view 0 predicts as foreground; 1 where there is none."""
    log_p = log_probabilities(logits[0])
    foreground = most_likely(log_p) > 0
    return float(normalized_entropy(log_p)[foreground].mean()) if foreground.any() else 1.0


def displacement(parameters: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> float:
    """|theta - theta_0| / |theta_0| over all adapted tensors together."""
    moved = sum(float((parameters[name].detach() - start[name]).double().square().sum()) for name in start)
    size = sum(float(start[name].double().square().sum()) for name in start)
    return (moved / max(size, 1e-24)) ** 0.5
