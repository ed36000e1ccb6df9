# SPDX-License-Identifier: Apache-2.0
"""Unsupervised objectives of an adaptation.

`prepare` receives the source model's logits once and returns what the objective keeps of them (pseudo-labels, nothing);
`loss` turns the current logits into a scalar. Logits have the shape (V, N, K, h, w): V views of N slices, flips undone,
K classes with background first (K = 1: one foreground logit). All losses are means over pixels, so a learning rate
holds for every image size.

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
from samda.inference.volume import largest

CLASS_DIM = -3  # of (..., K, h, w)
POSITIVE = ("keep", "slack")  # settings that may not be 0
SHARES = ("keep", "quota")  # settings of at most 1


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """ln p of logits (..., K, h, w); one logit (K = 1) becomes the two classes of a sigmoid, background first."""
    if logits.shape[CLASS_DIM] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=CLASS_DIM)
    return F.log_softmax(logits, dim=CLASS_DIM)


def most_likely(p: torch.Tensor) -> torch.Tensor:
    """The class of highest probability or logit, (..., K, h, w) -> (..., h, w), int16; the first of equal values."""
    return largest(p.movedim(CLASS_DIM, 0))


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """H = -sum_k p_k ln p_k in nats, (..., K, h, w) -> (..., h, w); finite wherever ln p is."""
    return -(log_p.exp() * log_p).sum(CLASS_DIM)


def normalized_entropy(log_p: torch.Tensor) -> torch.Tensor:
    """h = H / ln K: 1 for the uniform prediction, 0 for a certain one."""
    return entropy(log_p) / math.log(log_p.shape[CLASS_DIM])


def mean_log_probabilities(log_p: torch.Tensor) -> torch.Tensor:
    """ln of the mean prediction over the views, (V, ...) -> (...), without leaving the log domain."""
    return log_p.logsumexp(0) - math.log(log_p.shape[0])


def soft_dice(p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Dice of probabilities per class, 2 sum(p t) / sum(p^2 + t^2): (..., N, K, h, w) -> (..., K).

    The squared form is exactly 1 if both agree, for all values, so agreement of uncertain views is not penalized.
    """
    weight = p.new_ones(()) if weight is None else weight
    dims = (-4, -2, -1)
    overlap = (weight * p * target).sum(dims)
    total = (weight * (p * p + target * target)).sum(dims)
    return 2.0 * overlap / total.clamp_min(1e-6)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base: a subclass sets its defaults of `steps` and `lr` and overrides `loss`."""

    name: ClassVar[str] = ""

    steps: int = 8  # optimizer steps, where the settings name none
    lr: float = 1e-3  # learning rate of Adam, where the settings name none
    anchor: float = 0.0  # weight of |theta - theta_0|^2 / |theta_0|^2, added by the loop
    align: float = 0.0  # weight of the distance of the features, see samda.adaptation.alignment, added by the loop

    def __post_init__(self) -> None:
        where = f"method {self.name!r}"
        check_numbers(self, where)
        for key, value in self.settings().items():
            if isinstance(value, Real) and value < 0:
                raise UsageError(f"{where}: {key} must not be negative, got {value!r}")
            if key in POSITIVE and value == 0:
                raise UsageError(f"{where}: {key} must be above 0, got {value!r}")
            if key in SHARES and value > 1:
                raise UsageError(f"{where}: {key} must be at most 1, got {value!r}")

    def prepare(self, logits: torch.Tensor) -> Any:
        """State computed from the source model's logits (V, N, K, h, w); called once, without gradients."""
        return None

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
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

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        return logits.sum() * 0.0


@dataclasses.dataclass(frozen=True)
class Tent(Objective):
    """TENT (arXiv 2006.10726): mean entropy of the image itself. Its trivial minimum is all background."""

    name: ClassVar[str] = "tent"

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        return entropy(log_probabilities(logits[0])).mean()


@dataclasses.dataclass(frozen=True)
class Memo(Objective):
    """MEMO (arXiv 2110.09506): entropy of the mean prediction over the views."""

    name: ClassVar[str] = "memo"

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        return entropy(mean_log_probabilities(log_probabilities(logits))).mean()


def kept_views(log_p: torch.Tensor, keep: float) -> torch.Tensor:
    """Per slice, the views of lowest mean entropy: indices (kept, N), kept = max(1, ceil(keep V)), lowest first."""
    scores = entropy(log_p.detach()).mean((-2, -1))  # (V, N)
    return scores.argsort(dim=0, stable=True)[: _share_of(len(scores), keep)]


def confident_views(log_p: torch.Tensor, keep: float) -> torch.Tensor:
    """Those views of each slice: (V, N, K, h, w) -> (kept, N, K, h, w)."""
    return log_p[kept_views(log_p, keep), torch.arange(log_p.shape[1], device=log_p.device)]


def _share_of(count: int, keep: float) -> int:
    """ceil(keep count), at least 1; not one more where keep count is whole but for rounding."""
    return max(1, math.ceil(keep * count - 1e-9))


@dataclasses.dataclass(frozen=True)
class Tpt(Objective):
    """TPT (arXiv 2209.07511): MEMO over the most confident views of each slice."""

    name: ClassVar[str] = "tpt"
    keep: float = 0.25  # fraction of the views; the paper keeps 0.1 of 64

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        return entropy(mean_log_probabilities(confident_views(log_probabilities(logits), self.keep))).mean()


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

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        kept = confident_views(log_probabilities(logits), self.keep)
        if self.reduce == "entropy_of_mean":
            kept = mean_log_probabilities(kept)
        return normalized_entropy(kept).mean()


def class_balanced_entropy(log_p: torch.Tensor, keep: float) -> torch.Tensor:
    """mean_c mean_{Omega_c} h(p): Omega_c are the most confident `keep` of the pixels predicted c, over all views.

    All predicted classes have the same weight, so the background does not dominate small organs.
    """
    h = normalized_entropy(log_p)
    predicted = most_likely(log_p.detach())
    terms = []
    for c in range(log_p.shape[CLASS_DIM]):
        values = h[predicted == c]
        if len(values):
            kept = values.topk(_share_of(len(values), keep), largest=False).values if keep < 1 else values
            terms.append(kept.mean())
    return torch.stack(terms).mean()


@dataclasses.dataclass(frozen=True)
class ClassEntropy(Objective):
    """Class-balanced entropy: the mean over predicted classes of the entropy on their most confident pixels."""

    name: ClassVar[str] = "class_entropy"
    keep: float = 1.0  # fraction of the pixels predicted as a class, most confident first

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        return class_balanced_entropy(log_probabilities(logits), self.keep)


@dataclasses.dataclass(frozen=True)
class Consistency(Objective):
    """Views of a slice must agree: 1 - soft Dice(p_v, sg p_{v+1}) over the foreground, v cyclic (DG-TTA's loss)."""

    name: ClassVar[str] = "consistency"

    def loss(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        p = log_probabilities(logits).exp()
        return (1.0 - soft_dice(p, p.detach().roll(-1, 0))[..., 1:]).mean()


@dataclasses.dataclass(frozen=True)
class Targets:
    """Pseudo-labels of the source model."""

    q: torch.Tensor  # (N, K, h, w) mean prediction
    labels: torch.Tensor  # (N, h, w) its classes
    trusted: torch.Tensor  # (N, h, w) where they are used


def trusted_targets(logits: torch.Tensor, threshold: float, quota: float) -> Targets:
    """q = mean_v p_v of the source; trusted where max q > threshold, and at least `quota` of each class."""
    q = mean_log_probabilities(log_probabilities(logits)).exp()
    confidence, labels = q.max(CLASS_DIM)
    trusted = confidence > threshold
    for c in range(q.shape[CLASS_DIM]):
        of_class = labels == c
        count = math.ceil(quota * int(of_class.sum()))
        if count:
            floor = confidence[of_class].topk(count, sorted=True).values[-1]
            trusted |= of_class & (confidence >= floor)
    return Targets(q, labels, trusted)


def fit_targets(log_p: torch.Tensor, target: torch.Tensor, targets: Targets, balanced: bool) -> torch.Tensor:
    """Cross-entropy plus (1 - soft Dice over the foreground) towards `target` (N, K, h, w), on the trusted pixels.

    `balanced` averages the cross-entropy per pseudo-label class first, so that classes have the same weight.
    """
    trusted = targets.trusted.to(log_p.dtype)
    cross = -(target * log_p).sum(CLASS_DIM).mean(0)  # (N, h, w), mean over the views
    classes = F.one_hot(targets.labels, log_p.shape[CLASS_DIM]).to(log_p.dtype) * trusted.unsqueeze(-1)
    counts = classes.sum((0, 1, 2))  # trusted pixels per class
    present = counts > 0
    if balanced:
        per_class = (classes * cross.unsqueeze(-1)).sum((0, 1, 2)) / counts.clamp_min(1.0)
        loss = per_class[present].mean()
    else:
        loss = (cross * trusted).sum() / trusted.sum().clamp_min(1.0)
    foreground = present.clone()
    foreground[0] = False  # the Dice of the background would favor its growth
    if foreground.any():
        dice = soft_dice(log_p.exp(), target, trusted.unsqueeze(CLASS_DIM))
        loss = loss + (1.0 - dice[..., foreground]).mean()
    return loss


@dataclasses.dataclass(frozen=True)
class PseudoLabel(Objective):
    """Hard pseudo-labels of the mean source prediction: CE + Dice where it is confident."""

    name: ClassVar[str] = "pseudo_label"
    threshold: float = 0.9  # least mean probability of a trusted pixel

    def prepare(self, logits: torch.Tensor) -> Targets:
        return trusted_targets(logits, self.threshold, quota=0.0)

    def loss(self, logits: torch.Tensor, state: Targets) -> torch.Tensor:
        log_p = log_probabilities(logits)
        hard = F.one_hot(state.labels, log_p.shape[CLASS_DIM]).movedim(-1, CLASS_DIM).to(log_p.dtype)
        return fit_targets(log_p, hard, state, balanced=False)


@dataclasses.dataclass(frozen=True)
class Anchored(Objective):
    """Anchored consistency: views agree with the mean source prediction where it is trusted.

    L = mean_v [CE(p_v, q) + Dice(p_v, q)] on trusted pixels, classes balanced
        + confident * class-balanced entropy + size * L_size + anchor * |theta - theta_0|^2 / |theta_0|^2
    L_size = mean over foreground c of max(0, |ln(pi_c / pi0_c)| - ln slack)^2, pi_c the mean probability of class c
    """

    name: ClassVar[str] = "anchored"
    anchor: float = 0.01
    threshold: float = 0.9  # least mean probability of a trusted pixel
    quota: float = 0.2  # fraction of each predicted class that is trusted in any case, most confident first
    confident: float = 0.1
    size: float = 0.1
    slack: float = 2.0  # factor by which a class may grow or shrink at no cost

    def prepare(self, logits: torch.Tensor) -> Targets:
        return trusted_targets(logits, self.threshold, self.quota)

    def loss(self, logits: torch.Tensor, state: Targets) -> torch.Tensor:
        log_p = log_probabilities(logits)
        loss = fit_targets(log_p, state.q, state, balanced=True)
        loss = loss + self.confident * class_balanced_entropy(log_p, keep=1.0)
        return loss + self.size * self._size(log_p, state.q)

    def _size(self, log_p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        dims = (0, -2, -1)
        now = mean_log_probabilities(log_p).exp().mean(dims).clamp_min(1e-6)
        before = q.mean(dims).clamp_min(1e-6)
        excess = ((now / before).log().abs() - math.log(self.slack)).clamp_min(0.0)
        return excess[1:].square().mean()


@dataclasses.dataclass(frozen=True)
class Default(Consistency):
    """Aligned consistency: features as the source had them, and views that agree.

    L = align * A + mean (1 - soft Dice of neighboring views)

    A is the distance of the features, see :class:`samda.adaptation.alignment.FeatureAlignment`. Neither term has a
    trivial minimum such as an empty map.
    """

    name: ClassVar[str] = "default"
    lr: float = 3e-4
    align: float = 1.0


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (NoAdaptation, Tent, Memo, Tpt, SamDa, ClassEntropy, Consistency, PseudoLabel, Anchored, Default)
}


def build_objective(name: str, settings: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name; invalid names, keys and values raise UsageError."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UsageError(f"unknown method {name!r}; {nearest(str(name), OBJECTIVES)}")
    return from_mapping(OBJECTIVES[name], {} if settings is None else settings, f"method {name!r}")


def check_settings(settings: Mapping[str, Any] | None = None) -> tuple[AdaptationSettings, Objective]:
    """Check settings before a model is loaded (also `initialize` of adapt.json); returns settings and objective.

    Missing steps and learning rate are those of the objective, a missing scope follows from the model; scopes are
    sorted as :data:`samda.adapters.attach.SCOPES`. Modality and keep_largest depend on the task and are checked later.
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
