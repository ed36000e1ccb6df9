# SPDX-License-Identifier: Apache-2.0
"""Unsupervised objectives of an adaptation.

`loss` turns logits into a scalar. Logits have the shape (V, N, K, h, w): V views of N slices, flips undone, K classes
with background first (K = 1: one foreground logit). All losses are means over pixels, so a learning rate holds for
every image size.

Notation: p_v = softmax z_v, pbar = mean_v p_v, H the entropy of a pixel, h = H / ln K in [0, 1], sg = stop-gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from samda.adaptation.settings import AdaptationSettings
from samda.adapters.attach import check_scope
from samda.errors import UsageError, check_numbers, from_mapping, nearest
from samda.networks.ops import argmax

CLASS_DIM = -3  # of (..., K, h, w)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """ln p of logits (..., K, h, w); one logit (K = 1) becomes the two classes of a sigmoid, background first."""
    if logits.shape[CLASS_DIM] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=CLASS_DIM)
    return F.log_softmax(logits, dim=CLASS_DIM)


def most_likely(p: torch.Tensor) -> torch.Tensor:
    """The class of highest probability or logit, (..., K, h, w) -> (..., h, w), int16; the first of equal values."""
    return argmax(p, CLASS_DIM)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """H = -sum_k p_k ln p_k in nats, (..., K, h, w) -> (..., h, w); finite wherever ln p is."""
    return -(log_p.exp() * log_p).sum(CLASS_DIM)


def normalized_entropy(log_p: torch.Tensor) -> torch.Tensor:
    """h = H / ln K: 1 for the uniform prediction, 0 for a certain one."""
    return entropy(log_p) / math.log(log_p.shape[CLASS_DIM])


def mean_log_probabilities(log_p: torch.Tensor) -> torch.Tensor:
    """ln of the mean prediction over the views, (V, ...) -> (...), without leaving the log domain."""
    return log_p.logsumexp(0) - math.log(log_p.shape[0])


def soft_dice(p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice of probabilities per class, 2 sum(p t) / sum(p^2 + t^2): (..., N, K, h, w) -> (..., K).

    The squared form is exactly 1 if both agree, for all values, so agreement of uncertain views is not penalized.
    """
    dims = (-4, -2, -1)
    overlap = (p * target).sum(dims)
    total = (p * p + target * target).sum(dims)
    return 2.0 * overlap / total.clamp_min(1e-6)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base: a subclass sets its defaults of `steps` and `lr` and overrides `loss`."""

    name: ClassVar[str] = ""
    gradient_free: ClassVar[bool] = False  # begin with the search of intensities and the alignment of levels?

    steps: int = 8  # optimizer steps, where the settings name none
    lr: float = 1e-3  # learning rate of Adam, where the settings name none
    align: float = 0.0  # weight of the distance of the features, see samda.adaptation.alignment, added by the loop

    def __post_init__(self) -> None:
        where = f"method {self.name!r}"
        check_numbers(self, where)
        for key, value in self.settings().items():
            if isinstance(value, Real) and value < 0:
                raise UsageError(f"{where}: {key} must not be negative, got {value!r}")
            if key == "keep" and not 0 < value <= 1:
                raise UsageError(f"{where}: {key} must be above 0 and at most 1, got {value!r}")

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The scalar to minimize, from logits (V, N, K, h, w) with gradients."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Plain values for the record, without steps and rate, which the adaptation's settings may override."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("steps", "lr")}


@dataclasses.dataclass(frozen=True)
class NoAdaptation(Objective):
    """The source model unchanged, for comparison."""

    name: ClassVar[str] = "none"
    steps: int = 0

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sum() * 0.0


@dataclasses.dataclass(frozen=True)
class Tent(Objective):
    """TENT (arXiv 2006.10726): mean entropy of the image itself. Its trivial minimum is all background."""

    name: ClassVar[str] = "tent"

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        return entropy(log_probabilities(logits[0])).mean()


@dataclasses.dataclass(frozen=True)
class Memo(Objective):
    """MEMO (arXiv 2110.09506): entropy of the mean prediction over the views."""

    name: ClassVar[str] = "memo"

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        return entropy(mean_log_probabilities(log_probabilities(logits))).mean()


def kept_views(log_p: torch.Tensor, keep: float) -> torch.Tensor:
    """Per slice, the views of lowest mean entropy: indices (kept, N), kept = max(1, ceil(keep V)), lowest first."""
    scores = entropy(log_p.detach()).mean((-2, -1))  # (V, N)
    return scores.argsort(dim=0, stable=True)[: _share_of(len(scores), keep)]


def _share_of(count: int, keep: float) -> int:
    """ceil(keep count), at least 1; not one more where keep count is whole but for rounding."""
    return max(1, math.ceil(keep * count - 1e-9))


@dataclasses.dataclass(frozen=True)
class SamDa(Objective):
    """SAM-DA (arXiv 2501.06836) as in its first author's code: normalized entropy of the most confident views."""

    name: ClassVar[str] = "sam_da"
    keep: float = 0.25  # fraction of the views
    reduce: str = "mean_entropy"  # mean of the views' entropies, or "entropy_of_mean": entropy of their mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in ("mean_entropy", "entropy_of_mean"):
            raise UsageError(f"objective 'sam_da': reduce must be mean_entropy or entropy_of_mean, got {self.reduce!r}")

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        log_p = log_probabilities(logits)
        kept = log_p[kept_views(log_p, self.keep), torch.arange(log_p.shape[1], device=log_p.device)]
        if self.reduce == "entropy_of_mean":
            kept = mean_log_probabilities(kept)
        return normalized_entropy(kept).mean()


@dataclasses.dataclass(frozen=True)
class ClassEntropy(Objective):
    """Class-balanced entropy, mean_c mean_{Omega_c} h(p) over the predicted classes c.

    Omega_c are the most confident `keep` of the pixels predicted c, over all views. All classes have the same weight,
    so the background does not dominate small organs.
    """

    name: ClassVar[str] = "class_entropy"
    keep: float = 1.0  # fraction of the pixels predicted as a class, most confident first

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        log_p = log_probabilities(logits)
        h, predicted = normalized_entropy(log_p), most_likely(log_p.detach())
        terms = []
        for c in range(log_p.shape[CLASS_DIM]):
            values = h[predicted == c]
            if len(values) and self.keep < 1:
                values = values.topk(_share_of(len(values), self.keep), largest=False).values
            if len(values):
                terms.append(values.mean())
        return torch.stack(terms).mean()


@dataclasses.dataclass(frozen=True)
class Consistency(Objective):
    """Views of a slice must agree: 1 - soft Dice(p_v, sg p_{v+1}) over the foreground, v cyclic (DG-TTA's loss)."""

    name: ClassVar[str] = "consistency"

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        p = log_probabilities(logits).exp()
        return (1.0 - soft_dice(p, p.detach().roll(-1, 0))[..., 1:]).mean()


@dataclasses.dataclass(frozen=True)
class Default(Consistency):
    """Aligned consistency: features as the source had them, and views that agree.

    First comes what needs no gradient: gray values of the input that suit the model
    (:mod:`samda.adapters.intensity`), and levels aligned in closed form by the adapter `ssf`; then

    L = align * A + mean (1 - soft Dice of neighboring views)

    A is the distance of the features, see :class:`samda.adaptation.alignment.FeatureAlignment`. Neither term has a
    trivial minimum such as an empty map.
    """

    name: ClassVar[str] = "default"
    gradient_free: ClassVar[bool] = True
    steps: int = 4
    lr: float = 6e-4
    align: float = 1.0


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (NoAdaptation, Tent, Memo, SamDa, ClassEntropy, Consistency, Default)
}


def build_objective(name: str, settings: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name; invalid names, keys and values raise UsageError."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UsageError(f"unknown method {name!r}; {nearest(str(name), OBJECTIVES)}")
    if isinstance(settings, Mapping) and "anchor" in settings:
        raise UsageError(f"method {name!r}: the setting 'anchor' was removed after samda 0.1; leave it out")
    return from_mapping(OBJECTIVES[name], {} if settings is None else settings, f"method {name!r}")


def check_settings(settings: Mapping[str, Any] | None = None) -> tuple[AdaptationSettings, Objective]:
    """Check settings before a model is loaded (also `initialize` of adapt.json); returns settings and objective.

    Missing steps and learning rate are those of the objective, missing views and scope follow from the model; scopes
    are sorted as :data:`samda.adapters.attach.SCOPES`. Modality and keep_largest depend on the task and are checked
    later.
    """
    given = AdaptationSettings.from_values(settings or {})
    objective = build_objective(given.method, given.objective)
    resolved = dataclasses.replace(
        given,
        scope=None if given.scope is None else "+".join(check_scope(given.scope)),
        steps=objective.steps if given.steps is None else given.steps,
        lr=objective.lr if given.lr is None else given.lr,
    )
    return resolved, objective
