# SPDX-License-Identifier: Apache-2.0
"""Gray values of a scan that suit the trained model: a search over the adapter `intensity`, without gradients.

The merit is the predicted Dice (:mod:`samda.expected_dice`), whose calibration has seen such changes of the input. Two
rounds: one change alone, each of the three numbers in turn; then a finer curve, and another change beside the best one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from samda.expected_dice import CaseQuality

Values = dict[str, float]  # of `curve`, `invert` and `detail`; those left out are 0
STEP = 0.5  # of `curve`; half of it in the second round

ALONE: tuple[Values, ...] = ({"curve": STEP}, {"curve": -STEP}, {"invert": 1.0}, {"detail": 1.0}, {"detail": -1.0})


def alone(inversion: bool) -> list[Values]:
    """The changes of the first round; without `inversion` where intensities have a unit."""
    return [values for values in ALONE if inversion or "invert" not in values]


def beside(best: Mapping[str, float]) -> list[Values]:
    """The changes of the second round."""
    step = STEP / 2 if "curve" in best else STEP
    found: list[Values] = [{**best, "curve": best.get("curve", 0.0) + sign * step} for sign in (1, -1)]
    return found if "detail" in best else found + [{**best, "detail": sign} for sign in (1.0, -1.0)]


def tried(inversion: bool) -> list[Values]:
    """All changes that :func:`search` may try, but for the sharpness beside another one."""
    first = alone(inversion)
    second = [values for best in first if "detail" not in best for values in beside(best)]
    return first + [values for values in second if "detail" not in values]


def search(judge: Callable[[Values], CaseQuality], inversion: bool, margin: float) -> Values:
    """Values whose predicted Dice is higher than without a change by more than `margin`, the highest; else {}.

    Args:
        judge: what is to be expected of the prediction with some values.
        inversion: may dark be bright?
        margin: that of the calibration.
    """
    plain = judge({})
    best: Values = {}
    highest = 0.0
    for round_ in (alone(inversion), None):
        for values in beside(best) if round_ is None else round_:
            gain = judge(values).gain_over(plain)
            if gain > highest:
                best, highest = values, gain
        if not best:
            break
    return best if highest > margin else {}
