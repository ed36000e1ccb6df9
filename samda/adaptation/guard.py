# SPDX-License-Identifier: Apache-2.0
"""The guard: may the adapted prediction replace the plain one? A pure function of a few numbers, no images, no labels.

Where the model has a calibration (:mod:`samda.expected_dice`), the adapted prediction replaces the plain one if its
predicted Dice is higher by the calibrated margin.

Without one, both predictions are judged alike: by their plausibility, that is the agreement of their shapes with the
training slices, and by the agreement of the views of a slice. So an organ may grow fifty-fold where the result has the
usual size and position, and entropy that falls because everything became background is not accepted.

Every decision carries one of the codes of :data:`REASONS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samda.errors import UsageError, check_numbers

if TYPE_CHECKING:  # it imports PyTorch, which `samda adapt --help` must not
    from samda.expected_dice import CaseQuality

REASONS = {
    "accepted": "the predicted Dice rose by the margin; without one, plausibility or the agreement of the views",
    "accepted_unchanged": "no voxel changed, no iterate was better, or no step was taken",
    "skipped_quality": "before adapting: the predicted Dice is high, or the map is plausible and its views agree",
    "skipped_empty": "before adapting: no view shows any foreground; review the scan",
    "fallback_vanished": "a class that the source predicts plausibly is gone (TENT's collapse)",
    "fallback_volume": "a class grew or shrank beyond the limit, became implausible, and the whole less plausible",
    "fallback_plausibility": "plausibility fell by more than better agreement makes up for",
    "fallback_agreement": "the views agree less, or neither agreement nor plausibility rose",
    "fallback_expected": "the predicted Dice did not rise by the calibrated margin",
    "fallback_drift": "the features went away from those of the training slices",
    "fallback_entropy": "certainty rose while agreement fell: the sign of confirmation bias",
    "fallback_nonfinite": "a loss, parameter or output was not finite",
    "fallback_timeout": "the time limit of the case passed",
    "fallback_oom": "out of memory",
    "fallback_error": "any other error while adapting",
    "failed_input": "the scan cannot be used; there is no prediction",
    "failed_error": "an error before there was a source prediction",
}


def mean_plausibility(plausibility: Mapping[str, float | None], absent: float) -> float:
    """Mean over the classes; a missing class (None) counts `absent`, because it may be outside the scan."""
    values = [absent if value is None else value for value in plausibility.values()]
    return sum(values) / len(values) if values else absent


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of one prediction without labels; mappings have the foreground classes."""

    volumes_ml: Mapping[str, float]
    plausibility: Mapping[str, float | None]  # 0 to 1; None where the prediction lacks the class
    agreement: float  # of the views, see samda.adaptation.loop; NaN with a single view, or where none was encoded
    entropy: float  # mean normalized entropy on the foreground of the views; NaN where none was encoded
    drift: float = math.nan  # see samda.adaptation.alignment.FeatureAlignment; NaN where it was not measured
    expected: CaseQuality | None = None  # predicted Dice, where the model has a calibration

    def score(self, absent: float) -> float:
        """See :func:`mean_plausibility`."""
        return mean_plausibility(self.plausibility, absent)

    def to_dict(self, absent: float) -> dict[str, Any]:
        """Plain values for the record."""
        values = dataclasses.asdict(self) | {"score": self.score(absent)}
        values["expected"] = None if self.expected is None else self.expected.to_dict()
        numbers = {name: getattr(self, name) for name in ("agreement", "entropy", "drift")}
        return values | {name: None if math.isnan(value) else value for name, value in numbers.items()}


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """Thresholds of the guard."""

    skip_agreement: float = 0.8  # skip where the views of the source prediction agree this well; above 1 never skips
    skip_plausibility: float = 0.9  # ... and it is this plausible
    absent: float = 0.3  # plausibility of a class that a prediction lacks: between a wrong organ and a right one
    plausible: float = 0.5  # from here a class of the source must not vanish, and an adapted one may have any size
    vanished: float = 0.1  # a class has vanished below this share of the source's volume
    volume_factor: float = 2.0  # growth or shrinkage of a class that is always allowed
    minor: float = 0.05  # changes of volume below this share of the adapted foreground are always allowed
    tolerance: float = 0.1  # largest loss of plausibility, of agreement, and of a resized class's own plausibility
    regain: float = 0.02  # loss of the mean plausibility from which no class may be resized implausibly
    drift_factor: float = 1.1  # largest drift, as a share of the source's
    improvement: float = 0.05  # agreement, or plausibility with no less agreement, must rise by more than this

    def to_dict(self) -> dict[str, float]:
        """Plain values for the record."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        check_numbers(self, "guard")
        if self.volume_factor < 1:
            raise UsageError(f"guard: volume_factor must be at least 1, got {self.volume_factor}")
        if self.tolerance < 0:
            raise UsageError(f"guard: tolerance must not be negative, got {self.tolerance}")
        for name in ("absent", "plausible", "vanished", "minor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"guard: {name} must be between 0 and 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Decision:
    """Decision on a case, reason code, and explanation."""

    decision: str  # "accepted", "fallback", "skipped" or "failed"
    reason: str
    explanation: str

    @classmethod
    def of(cls, reason: str, explanation: str) -> Decision:
        """The decision for a reason code."""
        return cls(reason.partition("_")[0], reason, explanation)


def good_enough(source: Evidence, settings: GuardSettings, least: float) -> Decision | None:
    """The decision for a case whose predicted Dice is `least` or more, as that of scans like the training's.

    `least` is NaN without a calibration.
    """
    if source.expected is None or not source.expected.mean >= least or settings.skip_agreement > 1:
        return None
    return Decision.of("skipped_quality", f"predicted Dice {source.expected.mean:.3f}, usual are {least:.3f}")


def before(source: Evidence, shown: bool, settings: GuardSettings, calibrated: bool = False) -> Decision | None:
    """A reason not to adapt at all that the views show.

    `shown`: does any view show foreground on any slice that would be adapted on? `calibrated`: has
    :func:`good_enough` decided by the predicted Dice already?
    """
    if not shown and not any(source.volumes_ml.values()):
        return Decision.of("skipped_empty", "neither the scan nor its views have any foreground; check the scan")
    score = source.score(settings.absent)
    if calibrated and source.expected is not None:
        return None
    if source.agreement >= settings.skip_agreement and score >= settings.skip_plausibility:
        numbers = f"views agree to {source.agreement:.3f}, plausibility {score:.2f}"
        return Decision.of("skipped_quality", f"the source prediction is good: {numbers}")
    return None


def after(
    source: Evidence,
    adapted: Evidence,
    settings: GuardSettings,
    last: tuple[float, float] | None = None,
    margin: float = math.nan,
) -> Decision:
    """Accept the kept iterate or fall back to the source.

    `last` is (agreement, entropy) of the last iterate; `margin` that of the calibration, where there is one.
    """
    if source.expected is not None and adapted.expected is not None and not math.isnan(margin):
        return _by_expected_dice(source.expected, adapted.expected, margin)
    for name, volume in source.volumes_ml.items():
        reason = _class_reason(name, volume, source, adapted, settings)
        if reason is not None:
            return reason
    if any(source.volumes_ml.values()) and not any(adapted.volumes_ml.values()):
        return Decision.of("fallback_vanished", "the adapted prediction is all background")
    gain = adapted.score(settings.absent) - source.score(settings.absent)
    agreed = adapted.agreement - source.agreement
    single = math.isnan(agreed)  # a single view: plausibility only
    agreed = 0.0 if single else agreed
    if gain < -settings.tolerance:
        return Decision.of("fallback_plausibility", f"plausibility fell by {-gain:.3f}")
    agreement = "" if single else f"agreement {source.agreement:.3f} -> {adapted.agreement:.3f}, "
    if agreed < -settings.tolerance:
        return Decision.of("fallback_agreement", f"{agreement}plausibility {gain:+.3f}: views agree much less")
    if (agreed if agreed < 0 else max(agreed, gain)) <= settings.improvement:
        return Decision.of("fallback_agreement", f"{agreement}plausibility {gain:+.3f}: no gain")
    if adapted.drift > settings.drift_factor * source.drift:
        moved = f"{source.drift:.3f} -> {adapted.drift:.3f}"
        return Decision.of("fallback_drift", f"the features went away from the source's: {moved}")
    if last is not None and last[0] < source.agreement and last[1] < source.entropy and gain <= settings.improvement:
        return Decision.of("fallback_entropy", "at the last step, agreement had fallen and confidence had risen")
    return Decision.of("accepted", f"{agreement}plausibility {gain:+.3f}")


def _by_expected_dice(source: CaseQuality, adapted: CaseQuality, margin: float) -> Decision:
    gain = adapted.gain_over(source)
    text = f"predicted Dice {gain:+.3f} from {source.mean:.3f}, margin {margin:.3f}"
    return Decision.of("accepted" if gain > margin else "fallback_expected", text)


def _class_reason(
    name: str, volume: float, source: Evidence, adapted: Evidence, settings: GuardSettings
) -> Decision | None:
    """A reason to fall back due to one class."""
    now, was, is_ = adapted.volumes_ml[name], source.plausibility[name], adapted.plausibility[name]
    if volume and now < settings.vanished * volume and was is not None and was >= settings.plausible:
        text = f"{name}: {volume:.1f} ml of plausibility {was:.2f} shrank to {now:.1f} ml"
        return Decision.of("fallback_vanished", text)
    large, small = max(volume, now), min(volume, now)
    if large <= settings.volume_factor * small or large - small <= settings.minor * sum(adapted.volumes_ml.values()):
        return None
    old, new = (settings.absent if value is None else value for value in (was, is_))
    whole = adapted.score(settings.absent) - source.score(settings.absent)
    odd = is_ is None or is_ < settings.plausible
    if odd and new - old < -settings.tolerance and whole <= -settings.regain:
        text = f"{name}: {volume:.1f} -> {now:.1f} ml and plausibility {new - old:+.2f}"
        return Decision.of("fallback_volume", text)
    return None
