# SPDX-License-Identifier: Apache-2.0
"""The guard as what it is: a function of a few numbers. Every reason code that it gives is reached here."""

from __future__ import annotations

import dataclasses
import math

import pytest

from samda.adaptation.guard import REASONS, Decision, Evidence, GuardSettings, after, before, good_enough
from samda.adaptation.record import schema
from samda.errors import UsageError
from samda.expected_dice import CaseQuality, ExpectedDice

SETTINGS = GuardSettings(improvement=0.0)


def evidence(
    liver: float = 1000.0,
    spleen: float = 200.0,
    plausible: tuple[float | None, float | None] = (0.8, 0.7),
    agreement: float = 0.8,
    entropy: float = 0.3,
) -> Evidence:
    return Evidence(
        {"liver": liver, "spleen": spleen},
        dict(zip(("liver", "spleen"), plausible, strict=True)),
        agreement,
        entropy,
    )


def reason(source: Evidence, adapted: Evidence, last: tuple[float, float] | None = None) -> str:
    return after(source, adapted, SETTINGS, last).reason


def test_a_better_agreed_prediction_is_accepted() -> None:
    decision = after(evidence(), evidence(liver=1100, agreement=0.85), SETTINGS)
    assert (decision.decision, decision.reason) == ("accepted", "accepted")
    assert "0.800 -> 0.850" in decision.explanation


def test_collapse_to_background_falls_back_however_certain() -> None:
    collapsed = evidence(0, 0, (None, None), agreement=0.0, entropy=0.0)
    assert reason(evidence(), collapsed) == "fallback_vanished"
    assert reason(evidence(plausible=(0.1, 0.1)), collapsed) == "fallback_vanished"  # also from an implausible start


def test_a_plausible_class_must_not_vanish() -> None:
    assert reason(evidence(), evidence(spleen=0, plausible=(0.9, None), agreement=0.9)) == "fallback_vanished"
    assert reason(evidence(), evidence(spleen=15, plausible=(0.9, 0.7), agreement=0.9)) == "fallback_vanished"


def test_specks_of_an_absent_organ_may_vanish() -> None:
    source = evidence(spleen=5, plausible=(0.8, 0.05))
    assert reason(source, evidence(spleen=0, plausible=(0.8, None), agreement=0.9)) == "accepted"


def test_a_small_gain_is_no_reason() -> None:
    for agreement, plausible, expected in (
        (0.84, (0.8, 0.7), "fallback_agreement"),
        (0.86, (0.8, 0.7), "accepted"),
        (0.8, (0.84, 0.74), "fallback_agreement"),
        (0.8, (0.86, 0.76), "accepted"),
        (0.79, (0.9, 0.9), "fallback_agreement"),  # one slice may look more plausible by chance
    ):
        assert after(evidence(), evidence(agreement=agreement, plausible=plausible), GuardSettings()).reason == expected


def test_features_must_not_go_away_from_the_source() -> None:
    near, far = (dataclasses.replace(evidence(agreement=a), drift=d) for a, d in ((0.8, 0.4), (0.9, 0.441)))
    assert reason(near, far) == "fallback_drift"
    assert "0.400 -> 0.441" in after(near, far, SETTINGS).explanation
    assert reason(near, dataclasses.replace(far, drift=0.439)) == "accepted"  # 1.1 x 0.4 = 0.44
    assert reason(near, dataclasses.replace(far, drift=math.nan)) == "accepted"  # not measured


def test_forced_doubling_falls_back() -> None:
    odd = (0.9, 0.45)  # the spleen loses 0.25, the whole 0.075
    assert reason(evidence(), evidence(spleen=401, plausible=odd, agreement=0.95)) == "fallback_volume"
    assert reason(evidence(), evidence(spleen=399, plausible=odd, agreement=0.95)) == "accepted"
    assert reason(evidence(), evidence(spleen=401, plausible=(0.8, 0.65), agreement=0.95)) == "accepted"
    assert (
        reason(evidence(), evidence(spleen=401, plausible=(0.8, 0.55), agreement=0.95)) == "accepted"
    )  # an organ still


def test_a_class_of_a_few_voxels_decides_nothing() -> None:
    source = evidence(spleen=0, plausible=(0.8, None))
    assert reason(source, evidence(spleen=40, plausible=(0.9, 0.15), agreement=0.9)) == "accepted"  # 4 % of 1040 ml
    assert reason(source, evidence(spleen=80, plausible=(0.9, 0.15), agreement=0.9)) == "fallback_volume"


def test_a_fifty_fold_growth_to_a_usual_organ_is_accepted() -> None:
    source = evidence(spleen=4, plausible=(0.8, 0.1), agreement=0.5)
    assert reason(source, evidence(spleen=200, plausible=(0.8, 0.9), agreement=0.8)) == "accepted"
    source = evidence(spleen=4, plausible=(0.8, 0.3), agreement=0.5)
    assert reason(source, evidence(spleen=2000, plausible=(0.9, 0.1), agreement=0.8)) == "fallback_volume"


def test_an_organ_may_appear_if_it_looks_like_one() -> None:
    source = evidence(spleen=0, plausible=(0.8, None))
    assert reason(source, evidence(plausible=(0.8, 0.9), agreement=0.85)) == "accepted"
    assert reason(source, evidence(plausible=(0.8, 0.1), agreement=0.85)) == "fallback_volume"


def test_less_plausible_falls_back() -> None:
    assert reason(evidence(), evidence(plausible=(0.6, 0.65), agreement=0.95)) == "fallback_plausibility"  # -0.125
    assert reason(evidence(), evidence(plausible=(0.7, 0.65), agreement=0.95)) == "accepted"  # -0.075, better agreed
    assert reason(evidence(), evidence(plausible=(0.8, 0.65), agreement=0.8)) == "fallback_agreement"  # for nothing


def test_without_better_agreement_something_must_become_more_plausible() -> None:
    assert reason(evidence(), evidence()) == "fallback_agreement"
    assert reason(evidence(), evidence(plausible=(0.85, 0.75))) == "accepted"
    assert reason(evidence(), evidence(plausible=(0.9, 0.9), agreement=0.65)) == "fallback_agreement"  # much less


def test_growing_certainty_with_falling_agreement_falls_back() -> None:
    assert reason(evidence(), evidence(agreement=0.81), last=(0.7, 0.2)) == "fallback_entropy"
    assert reason(evidence(), evidence(agreement=0.81), last=(0.7, 0.4)) == "accepted"


def test_a_single_view_leaves_it_to_plausibility() -> None:
    nan = float("nan")
    assert reason(evidence(agreement=nan), evidence(plausible=(0.85, 0.75), agreement=nan)) == "accepted"
    assert "nan" not in after(evidence(agreement=nan), evidence(agreement=nan), SETTINGS).explanation


def test_with_a_calibration_the_predicted_dice_decides() -> None:
    def expected(liver: float, spleen: float | None) -> CaseQuality:
        absent = ExpectedDice(0.0, 0.0, 0.0, predicted=False)
        found = absent if spleen is None else ExpectedDice(spleen, 0.0, 1.0)
        return CaseQuality({"liver": ExpectedDice(liver, 0.0, 1.0), "spleen": found})

    source = dataclasses.replace(evidence(), expected=expected(0.6, None))
    for liver, spleen, margin, wanted in (
        (0.7, None, 0.05, "accepted"),
        (0.7, None, 0.15, "fallback_expected"),
        (0.6, 0.4, 0.15, "accepted"),  # 0.3 -> 0.5: the class was missing before
        (0.5, 0.4, 0.2, "fallback_expected"),
        (0.7, None, math.nan, "fallback_agreement"),  # no pairs in the calibration: the other rules
    ):
        adapted = dataclasses.replace(evidence(), expected=expected(liver, spleen))
        assert after(source, adapted, SETTINGS, margin=margin).reason == wanted
    good = dataclasses.replace(evidence(), expected=expected(0.97, 0.96))
    decision = good_enough(good, SETTINGS, 0.95)
    assert decision is not None and decision.reason == "skipped_quality"
    assert good_enough(good, SETTINGS, 0.97) is None
    assert good_enough(good, GuardSettings(skip_agreement=2.0), 0.95) is None  # never skips
    # good by the other rules, which do not count then
    agreed = dataclasses.replace(good, agreement=0.9, plausibility={"liver": 0.95, "spleen": 0.95})
    assert before(agreed, True, SETTINGS, calibrated=True) is None and before(agreed, True, SETTINGS) is not None


def test_good_predictions_are_left_alone() -> None:
    decision = before(evidence(plausible=(0.91, 0.9), agreement=0.81), True, SETTINGS)
    assert decision is not None and (decision.decision, decision.reason) == ("skipped", "skipped_quality")
    assert before(evidence(plausible=(0.5, 0.9), agreement=0.97), True, SETTINGS) is None  # agreed upon, but odd
    assert before(evidence(plausible=(0.91, 0.9), agreement=0.79), True, SETTINGS) is None


def test_nothing_to_see_is_skipped() -> None:
    empty = evidence(0, 0, (None, None), agreement=0.0)
    decision = before(empty, False, SETTINGS)
    assert decision is not None and decision.reason == "skipped_empty"
    assert before(empty, True, SETTINGS) is None  # a view shows something: there is a start


def test_an_absent_class_counts_between_wrong_and_right() -> None:
    assert evidence(plausible=(0.9, None)).score(0.3) == pytest.approx(0.6)
    assert Evidence({}, {}, 1.0, 0.0).score(0.3) == 0.3


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Evidence) if f.name in ("agreement", "entropy")])
def test_evidence_is_plain(name: str) -> None:
    values = evidence().to_dict(0.3)
    assert not math.isnan(values[name]) and values["score"] == pytest.approx(0.75)


def test_reason_codes_are_documented_and_published() -> None:
    assert set(schema()["properties"]["reason"]["enum"]) == set(REASONS)
    for code in REASONS:
        assert Decision.of(code, "").decision in ("accepted", "fallback", "skipped", "failed")


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match=r"volume_factor must be at least 1, got 0\.5"):
        GuardSettings(volume_factor=0.5)
    with pytest.raises(UsageError, match="absent must be between 0 and 1"):
        GuardSettings(absent=1.5)
