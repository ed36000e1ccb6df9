# SPDX-License-Identifier: Apache-2.0
"""The guard: may the adapted prediction replace the plain one? A pure function of a few numbers, no images, no labels.

Both predictions are judged alike, by how far they agree with what the model saw at training time (`plausibility`, see
:mod:`samda.adaptation.alignment`) and by how far the views of a slice agree with each other. So a fifty-fold growth
of an organ passes where it leads to an organ of the usual size at the usual place, and an entropy that falls because
everything became background does not.

Every decision carries one of these reason codes:

======================= ================================================================================================
accepted                the adapted prediction is more plausible or better agreed upon, and not much worse in the other
accepted_unchanged      no voxel changed, no iterate was better, or no step was taken
skipped_quality         before adapting: the source prediction is plausible and its views agree; there is little to gain
skipped_empty           before adapting: no view shows any foreground; a person should look at the scan
fallback_vanished       a class that the source predicts plausibly is gone (TENT's collapse ends here)
fallback_volume         a class grew or shrank beyond the limit, became implausible, and the whole less plausible
fallback_plausibility   the adapted prediction fits the source statistics worse than better agreement makes good
fallback_agreement      the views agree much less, or neither agreement nor plausibility rose
fallback_drift          the features came no nearer to those of the training slices, as they do where a shift is undone
fallback_entropy        certainty rose while agreement fell: the sign of a prediction that talks itself into something
fallback_nonfinite      a loss, parameter or output was not finite
fallback_timeout        the time limit of the case passed
fallback_oom            memory ran out
fallback_error          any other error while adapting
failed_input            the scan cannot be used; there is no prediction at all
failed_error            an error before there was a source prediction
======================= ================================================================================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from samda.errors import UsageError, check_numbers

REASONS = (
    "accepted",
    "accepted_unchanged",
    "skipped_quality",
    "skipped_empty",
    "fallback_vanished",
    "fallback_volume",
    "fallback_plausibility",
    "fallback_agreement",
    "fallback_drift",
    "fallback_entropy",
    "fallback_nonfinite",
    "fallback_timeout",
    "fallback_oom",
    "fallback_error",
    "failed_input",
    "failed_error",
)


def mean_plausibility(plausibility: Mapping[str, float | None], absent: float) -> float:
    """Mean over the classes; a class that is lacking (None) counts `absent`, as a scan may not show it."""
    values = [absent if value is None else value for value in plausibility.values()]
    return sum(values) / len(values) if values else absent


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of one prediction without labels. Foreground classes only.

    Attributes:
        volumes_ml: volume of each class.
        plausibility: of each class, 0 to 1; None where the prediction lacks it.
        agreement: between the views, see :func:`samda.adaptation.agreement.agreement`; NaN with a single view.
        entropy: mean normalized entropy on the foreground.
        drift: distance of the features from those of the training slices, see
            :class:`samda.adaptation.alignment.FeatureAlignment`; NaN where it was not measured.
    """

    volumes_ml: Mapping[str, float]
    plausibility: Mapping[str, float | None]
    agreement: float
    entropy: float
    drift: float = math.nan

    def score(self, absent: float) -> float:
        """See :func:`mean_plausibility`."""
        return mean_plausibility(self.plausibility, absent)

    def to_dict(self, absent: float) -> dict[str, Any]:
        """Plain values for the record."""
        values = dataclasses.asdict(self) | {"score": self.score(absent)}
        return values | {"drift": None if math.isnan(self.drift) else self.drift}


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """Thresholds of the guard.

    Args:
        skip_agreement: the views of the source prediction agree at least so well: nothing to gain. Above 1 never skips.
        skip_plausibility: ... and it is at least so plausible.
        absent: plausibility that counts for a class that a prediction lacks: between a wrong organ and a right one.
        plausible: from here on a class of the source prediction must not vanish, and an adapted one may have any size.
        vanished: a class whose volume falls below this share of the source's has vanished.
        volume_factor: growth or shrinkage of a class that needs no justification.
        minor: share of the adapted foreground below which a class's change of volume needs none either.
        tolerance: loss of plausibility that better agreement makes good, and loss of agreement that better
            plausibility makes good; for a class that grew or shrank beyond its limit, the loss of its own plausibility.
        regain: loss of the whole's plausibility at which a class may still grow or shrink beyond its limit.
        drift_factor: the features must be at most so far from the source's as this share of what they were.
        improvement: plausibility or agreement must rise by more than this.
    """

    skip_agreement: float = 0.8
    skip_plausibility: float = 0.9
    absent: float = 0.3
    plausible: float = 0.5
    vanished: float = 0.1
    volume_factor: float = 2.0
    minor: float = 0.05
    tolerance: float = 0.1
    regain: float = 0.02
    drift_factor: float = 0.95
    improvement: float = 0.0

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
                raise UsageError(f"guard: {name} must lie between 0 and 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of a case, the reason code, and the reason in one sentence."""

    decision: str  # "accepted", "fallback", "skipped" or "failed"
    reason: str
    explanation: str

    @classmethod
    def of(cls, reason: str, explanation: str) -> Decision:
        """The decision that a reason code stands for."""
        return cls(reason.partition("_")[0], reason, explanation)


def before(source: Evidence, shown: bool, settings: GuardSettings) -> Decision | None:
    """Is there a reason not to adapt at all?

    Args:
        source: of the source prediction.
        shown: does any view show foreground on any slice that would be adapted on?
        settings: thresholds.
    """
    if not shown and not any(source.volumes_ml.values()):
        return Decision.of("skipped_empty", "neither the scan nor any view of it shows foreground; look at the scan")
    score = source.score(settings.absent)
    if source.agreement >= settings.skip_agreement and score >= settings.skip_plausibility:
        numbers = f"views agree to {source.agreement:.3f}, plausibility {score:.2f}"
        return Decision.of("skipped_quality", f"the source prediction needs no help: {numbers}")
    return None


def after(
    source: Evidence, adapted: Evidence, settings: GuardSettings, last: tuple[float, float] | None = None
) -> Decision:
    """Accept the adapted prediction or fall back to the source's.

    Args:
        source: of the source prediction.
        adapted: of the kept iterate.
        settings: thresholds.
        last: (agreement, entropy) of the last iterate.
    """
    for name, volume in source.volumes_ml.items():
        reason = _class_reason(name, volume, source, adapted, settings)
        if reason is not None:
            return reason
    if any(source.volumes_ml.values()) and not any(adapted.volumes_ml.values()):
        return Decision.of("fallback_vanished", "the adapted prediction is all background")
    gain = adapted.score(settings.absent) - source.score(settings.absent)
    agreed = adapted.agreement - source.agreement
    single = math.isnan(agreed)  # a single view: plausibility alone decides
    agreed = 0.0 if single else agreed
    if gain < -settings.tolerance:
        return Decision.of("fallback_plausibility", f"plausibility fell by {-gain:.3f}")
    agreement = "" if single else f"agreement {source.agreement:.3f} -> {adapted.agreement:.3f}, "
    if agreed < -settings.tolerance:
        return Decision.of("fallback_agreement", f"{agreement}which plausibility {gain:+.3f} does not make good")
    if max(agreed, gain) <= settings.improvement:
        return Decision.of("fallback_agreement", f"{agreement}plausibility {gain:+.3f}: no gain")
    if adapted.drift > settings.drift_factor * source.drift:
        moved = f"{source.drift:.3f} -> {adapted.drift:.3f}"
        return Decision.of("fallback_drift", f"the features came no nearer to the source's: {moved}")
    if last is not None and last[0] < source.agreement and last[1] < source.entropy and gain <= settings.improvement:
        return Decision.of("fallback_entropy", "at the last step the views agreed less while each was more certain")
    return Decision.of("accepted", f"{agreement}plausibility {gain:+.3f}")


def _class_reason(
    name: str, volume: float, source: Evidence, adapted: Evidence, settings: GuardSettings
) -> Decision | None:
    """A reason to fall back that one class gives."""
    now = adapted.volumes_ml[name]
    was_plausible, is_plausible = source.plausibility[name], adapted.plausibility[name]
    if volume and now < settings.vanished * volume and (was_plausible or 0.0) >= settings.plausible:
        return Decision.of(
            "fallback_vanished",
            f"{name}: {volume:.1f} ml of plausibility {was_plausible:.2f} shrank to {now:.1f} ml",
        )
    large, small = max(volume, now), min(volume, now)
    foreground = sum(adapted.volumes_ml.values())
    if large > settings.volume_factor * small and large - small > settings.minor * foreground:
        gain = (settings.absent if is_plausible is None else is_plausible) - (
            settings.absent if was_plausible is None else was_plausible
        )
        whole = adapted.score(settings.absent) - source.score(settings.absent)
        odd = is_plausible is None or is_plausible < settings.plausible
        if odd and gain < -settings.tolerance and whole <= -settings.regain:
            return Decision.of("fallback_volume", f"{name}: {volume:.1f} -> {now:.1f} ml and plausibility {gain:+.2f}")
    return None
