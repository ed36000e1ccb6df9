# SPDX-License-Identifier: Apache-2.0
"""The Dice that is to be expected of a prediction, from its features (:mod:`samda.quality`).

A logistic regression of the Dice on them, with weights that are not negative, is fitted at the end of a training
(:mod:`samda.training.calibration`) and kept in the record of the model folder. Its interval is conformal: quantiles of
the residuals on patients that the regression had not seen, by the height of the prediction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from samda.errors import InputError
from samda.quality import FEATURES

RIDGE = 0.01  # penalty of the weights, on standardized features
FARTHEST = 3.0  # standard deviations from the mean; beyond, the calibration has seen nothing that tells of the Dice
COVERAGE = 0.9  # of the interval
BINS = 3  # heights of the prediction with residuals of their own
FEWEST = 12  # rows below which nothing is fitted
HARM = 0.02  # loss of the mean Dice that counts as harm
LEAST_GAIN = 0.05  # predicted, for which a label map is replaced
RISK = 0.03  # share of the exchanges, between two predictions of a scan, that may harm
AWAY = 1.02  # growth of the distance of the levels that is rounding
COMPARABLE = 0.5  # predicted Dice from which distances are compared
TRUSTED = 0.6  # cases below this predicted Dice are listed first


@dataclasses.dataclass(frozen=True)
class ExpectedDice:
    """The predicted Dice of a class with its 90 % interval; 0 for a class that is not predicted.

    A class that is not predicted has Dice 0 if the scan shows it, and none if it does not.
    """

    dice: float
    low: float
    high: float
    predicted: bool = True


@dataclasses.dataclass(frozen=True)
class CaseQuality:
    """What is to be expected of the prediction of a scan.

    Attributes:
        dice: class -> predicted Dice.
        distance: of the scan's levels from those of the training slices, in standard deviations; None where the head
            reads no levels or nothing is predicted.
    """

    dice: dict[str, ExpectedDice]
    distance: float | None = None

    @property
    def mean(self) -> float:
        """Mean predicted Dice over the predicted classes; 0 without any."""
        return self.mean_over([name for name, one in self.dice.items() if one.predicted])

    def mean_over(self, classes: Sequence[str]) -> float:
        """The same over some classes."""
        return sum(self.dice[name].dice for name in classes) / len(classes) if len(classes) else 0.0

    def gain_over(self, other: CaseQuality) -> float:
        """Rise of the mean over the classes of either prediction; a class that one of them lacks counts 0 there.

        A rise counts only if the levels do not go away from those of the training slices, where the calibration knows
        little. Distances are of the slices with foreground, so they tell nothing where a prediction is hardly right.
        """
        classes = [name for name, one in other.dice.items() if one.predicted or self.dice[name].predicted]
        gain = self.mean_over(classes) - other.mean_over(classes)
        now, before = self.distance, other.distance
        away = now is not None and before is not None and now > AWAY * before
        return min(gain, 0.0) if away and other.mean >= COMPARABLE else gain

    def shifted(self, shift: float) -> CaseQuality:
        """With `shift` added to the logit of every predicted Dice and its interval, as a site's recalibration says."""
        moved = {}
        for name, one in self.dice.items():
            dice, low, high = (float(expit(logit(value) + shift)) for value in (one.dice, one.low, one.high))
            moved[name] = ExpectedDice(dice, low, high) if one.predicted else one
        return CaseQuality(moved, self.distance)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, four digits."""
        dice = {
            name: {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in dataclasses.asdict(one).items()
            }
            for name, one in self.dice.items()
        }
        return {"dice": dice, "distance": None if self.distance is None else round(self.distance, 4)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CaseQuality:
        """Read what :meth:`to_dict` gave."""
        return cls({name: ExpectedDice(**one) for name, one in values["dice"].items()}, values["distance"])


@dataclasses.dataclass(frozen=True)
class Row:
    """One class of one prediction whose Dice is known: `scan` is the same for predictions of the same image."""

    patient: str
    scan: str
    variant: int  # 0 for the plain prediction
    name: str  # of the class
    features: list[float] | None
    dice: float
    shifted: bool = False  # is the image changed, as another site would?
    true: bool = True  # does the label hold the class? If not, the row counts where predictions are exchanged


Scan = dict[int, tuple[CaseQuality, float]]  # by variant: what is predicted, and the true mean Dice
Fit = tuple[np.ndarray, np.ndarray, np.ndarray, float, dict[str, float]]  # mean, std, weights, bias, bias of classes


@dataclasses.dataclass(frozen=True)
class Calibration:
    """From features to the predicted Dice, its interval, and the gain that replaces a prediction.

    Dice = 1 / (1 + exp(-(b + b_class + w z))), z the standardized features, limited to [-3, 3], w >= 0.

    Attributes:
        mean, std: (F,) of the features.
        weights: (F,).
        bias: b.
        class_bias: class -> b_class.
        heights, low, high: of the residuals: predicted Dice, and what the interval adds to it there.
        margin: predicted gain of the mean Dice from which a prediction replaces another one; None where the rows were
            of plain predictions alone.
        about: numbers of patients and rows, where they are from, and the error on patients left out.
        usual: median of the predicted mean Dice of the scans as they are.
    """

    mean: list[float]
    std: list[float]
    weights: list[float]
    bias: float
    class_bias: dict[str, float]
    heights: list[float]
    low: list[float]
    high: list[float]
    margin: float | None
    about: dict[str, Any]
    usual: float = 1.0

    def expected(self, features: Mapping[str, list[float] | None]) -> CaseQuality:
        """Predicted Dice of each class from :meth:`QualityMeter.features`."""
        quality = _quality(self.fit, features)
        result = dict(quality.dice)
        for name, one in quality.dice.items():
            if not one.predicted:
                continue
            dice = one.dice
            low, high = (float(np.interp(dice, self.heights, side)) for side in (self.low, self.high))
            if self.class_bias and name not in self.class_bias:
                low, high = -1.0, 1.0  # in no row, as of a model that was trained on with labels of other classes
            result[name] = ExpectedDice(dice, max(0.0, dice + low), min(1.0, dice + high))
        return dataclasses.replace(quality, dice=result)

    @property
    def fit(self) -> Fit:
        """The regression."""
        mean, std, weights = (np.asarray(part) for part in (self.mean, self.std, self.weights))
        return mean, std, weights, self.bias, self.class_bias

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record of a model folder."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Calibration | None:
        """Of the record of a model folder; None where it has none. InputError where it is damaged."""
        values = record.get("calibration")
        if values is None:
            return None
        try:
            result = cls(**values)
            numbers = [*result.mean, *result.std, *result.weights, result.bias, *result.heights]
            numbers += [*result.low, *result.high, *result.class_bias.values(), result.margin or 0.0, result.usual]
            sizes = {len(part) for part in (result.mean, result.std, result.weights)}
            if sizes != {len(FEATURES)} or not np.isfinite(numbers).all() or min(result.std) <= 0:
                raise ValueError("numbers are missing or out of range")
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"the calibration in the model folder is damaged ({error}); copy the model folder again"
            ) from error
        return result


def fit_calibration(rows: Sequence[Row], about: Mapping[str, Any] | None = None) -> Calibration | None:
    """Fit a calibration; None where fewer than :data:`FEWEST` rows are of predicted classes.

    Residuals and margin are of patients left out; with one patient, of the fit itself.
    """
    known = [row for row in rows if row.features is not None and row.true]
    if len(known) < FEWEST:
        return None
    patients = sorted({row.patient for row in known})
    model = _fit(known)
    scans: dict[str, Scan] = {}
    for patient in sorted({row.patient for row in rows}):
        rest = [row for row in known if row.patient != patient]
        apart = _fit(rest) if len(patients) > 1 and len(rest) >= FEWEST else model
        scans |= _scans([row for row in rows if row.patient == patient], apart)
    found = np.array([scans[row.scan][row.variant][0].dice[row.name].dice for row in known])
    true = np.array([row.dice for row in known])
    plain = np.array([row.variant == 0 for row in known])  # the interval is one of predictions as they are
    plain = plain if plain.sum() >= FEWEST else np.ones(len(known), bool)
    heights, low, high = _residuals(found[plain], (true - found)[plain])
    mean, std, weights, bias, class_bias = model
    error = float(np.abs(true - found).mean())
    usual = {row.scan for row in rows if not row.shifted and row.variant == 0} or set(scans)
    numbers = {"patients": len(patients), "rows": len(known), "mean_absolute_error": round(error, 4)}
    return Calibration(
        mean=_short(mean),
        std=_short(std),
        weights=_short(weights),
        bias=_short([bias])[0],
        class_bias={name: _short([value])[0] for name, value in class_bias.items()},
        heights=_short(heights),
        low=_short(low),
        high=_short(high),
        margin=_margin(list(scans.values())),
        usual=_short([float(np.median([scans[scan][0][0].mean for scan in usual if 0 in scans[scan]]))])[0],
        about=dict(about or {}) | numbers,
    )


def _fit(rows: Sequence[Row]) -> Fit:
    """Moments of the features, weights and biases: least cross entropy of the Dice with a ridge penalty."""
    raw = np.array([row.features for row in rows], float)
    there = np.isfinite(raw)
    count = np.maximum(there.sum(0), 1)
    mean = np.where(there, raw, 0).sum(0) / count
    std = np.sqrt(np.where(there, (raw - mean) ** 2, 0).sum(0) / count)
    std = np.where(std > 1e-6, std, 1.0)
    z = _standardized(raw, mean, std)
    names = sorted({row.name for row in rows})
    classes = np.array([[row.name == name for name in names] for row in rows], float)
    x, y = np.concatenate([z, classes, np.ones((len(rows), 1))], 1), np.array([row.dice for row in rows])
    penalty = np.array([RIDGE] * (x.shape[1] - 1) + [0.0])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        a = x @ w
        value = float(np.mean(np.logaddexp(0, a) - y * a) + 0.5 * penalty @ w**2)
        return value, x.T @ (expit(a) - y) / len(y) + penalty * w

    free = len(names) + 1
    bounds = [(0.0, None)] * z.shape[1] + [(None, None)] * free
    w = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds).x
    size = z.shape[1]
    return mean, std, w[:size], float(w[-1]), dict(zip(names, w[size:-1].tolist(), strict=True))


def _quality(fit: Fit, features: Mapping[str, Sequence[float] | None]) -> CaseQuality:
    """Predicted Dice of each class, without intervals."""
    mean, std, weights, bias, class_bias = fit
    dice, distance = {}, None
    for name, values in features.items():
        if values is None:
            dice[name] = ExpectedDice(0.0, 0.0, 0.0, predicted=False)
            continue
        z = _standardized(np.asarray(values, float), mean, std)
        dice[name] = ExpectedDice(float(expit(bias + class_bias.get(name, 0.0) + z @ weights)), 0.0, 1.0)
        distance = math.exp(-values[-1]) if math.isfinite(values[-1]) else None
    return CaseQuality(dice, distance)


def _standardized(raw: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Features that the head does not have (NaN) count as average."""
    return np.clip(np.nan_to_num((raw - mean) / std, nan=0.0), -FARTHEST, FARTHEST)


def _residuals(found: np.ndarray, residuals: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Quantiles of the residuals in equally large bins of the prediction, as conformal prediction takes them."""
    order = np.argsort(found, kind="stable")
    heights, low, high = [], [], []
    for part in np.array_split(order, min(BINS, max(1, len(order) // FEWEST))):
        n, tail = len(part), (1 - COVERAGE) / 2
        values = np.sort(residuals[part])
        beyond = int(np.floor(tail * (n + 1)))  # that many lie outside on each side
        heights.append(float(np.median(found[part])))
        low.append(float(min(0.0, values[max(0, beyond - 1)])))
        high.append(float(max(0.0, values[min(n - 1, n - beyond)])))
    return heights, low, high


def _scans(rows: Sequence[Row], fit: Fit) -> dict[str, Scan]:
    """Scan -> variant -> what is predicted, and the true mean Dice over the classes of label and prediction."""
    parts: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        parts.setdefault(row.scan, {}).setdefault(row.variant, []).append(row)
    scans: dict[str, Scan] = {}
    for scan, variants in parts.items():
        absent = dict.fromkeys(row.name for own in variants.values() for row in own)
        scans[scan] = {
            variant: (
                _quality(fit, absent | {row.name: row.features for row in own}),
                float(np.mean([row.dice for row in own])),
            )
            for variant, own in variants.items()
        }
    return scans


def _margin(scans: Sequence[Scan]) -> float | None:
    """The least predicted gain above which at most a share :data:`RISK` of the replaced predictions is harmed.

    By conformal risk control (arXiv 2208.02814): of n pairs of predictions of the same scan, (k + 1) / (n + 1) <= RISK,
    with k harmful ones above the margin. An overestimated gain that costs nothing is none of them. With too few pairs
    for that it is the highest gain that was predicted, as nothing is known above.
    """
    pairs = [
        (quality.gain_over(variants[0][0]), dice - variants[0][1])
        for variants in scans
        for key, (quality, dice) in variants.items()
        if key and 0 in variants
    ]
    if not pairs:
        return None
    allowed = math.floor(RISK * (len(pairs) + 1)) - 1
    harmful = sorted((gain for gain, true in pairs if true < -HARM or allowed < 0), reverse=True)
    return round(max([LEAST_GAIN, *harmful[max(allowed, 0) :][:1]]), 5)


def _short(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
