# SPDX-License-Identifier: Apache-2.0
"""Quality of a prediction without labels: plausibility of its shapes, and the Dice that is to be expected.

The predicted Dice of a class in a scan follows from five features, each higher where a prediction is better:

============== ========================================================================================================
feature        of a class over all slices of a scan
============== ========================================================================================================
confidence     soft Dice 2 sum(p y) / sum(p + y) of the prediction y and its probabilities p (arXiv 2402.10665)
stability      Dice of the prediction and that of the same levels with noise of half their spread
linear         Dice of the prediction and that of the linear path of the head `pyramid` alone
plausibility   see :func:`class_plausibility`
closeness      - ln of the distance of the scan's levels from those of the training slices, in standard deviations
============== ========================================================================================================

All of them come from the levels of the encoder, so nothing is encoded again. A logistic regression of the Dice on them,
with weights that are not negative, is fitted at the end of a training (:mod:`samda.training.calibration`) and kept in
the record of the model folder. Its interval is conformal: quantiles of the residuals on patients that the regression
had not seen, by the height of the prediction.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit

from samda.data.slices import center_channels
from samda.errors import InputError
from samda.networks.head import IMAGE, Pyramid, map_levels
from samda.networks.pyramid_head import PyramidHead
from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import FEATURES as SHAPES
from samda.source_statistics import (
    LEAST_VARIANCE,
    ClassFeatures,
    Sums,
    added,
    body_boxes,
    level_sums,
    shape_features,
)
from samda.task import Task

# of a score: least width of the fall-off, as one patient's slices do not show how far patients differ
LEAST = {"area_mm2": 0.4, "components": 1.0, "compactness": 0.1, "elongation": 0.2, "row": 0.06, "column": 0.06}
LOGARITHMIC = ("area_mm2", "elongation")  # compared as ratios
ONE_SIDED = {"components": 1, "compactness": -1}  # fewer pieces or a rounder shape is not penalized
FEATURES = ("confidence", "stability", "linear", "plausibility", "closeness")
NOISE = 0.5  # of the levels, in standard deviations over the places of a slice
PIXEL_NOISE = 0.05  # of the image
EDGE = 0.01  # shares are brought to [EDGE, 1 - EDGE] before their logit
RIDGE = 0.01  # penalty of the weights, on standardized features
COVERAGE = 0.9  # of the interval
BINS = 3  # heights of the prediction with residuals of their own
FEWEST = 12  # rows below which nothing is fitted
SURE = 0.98  # share of the gains that may not be overestimated by more than the margin: at most 2 % may lose
TRUSTED = 0.6  # cases below this predicted Dice are listed first


def feature_score(name: str, values: np.ndarray, quantiles: Mapping[float, float]) -> np.ndarray:
    """Score of a feature's (n,) values, 0 to 1, see :func:`class_plausibility`.

    `quantiles` has 0.05, 0.5 and 0.95 of the source.
    """
    low, middle, high = (quantiles[q] for q in (0.05, 0.5, 0.95))
    if name in LOGARITHMIC:
        values = np.log(np.maximum(values, 1e-6))
        low, middle, high = (math.log(max(v, 1e-6)) for v in (low, middle, high))
    below = np.maximum(0.0, low - values) / max(middle - low, LEAST[name])
    above = np.maximum(0.0, values - high) / max(high - middle, LEAST[name])
    side = ONE_SIDED.get(name, 0)
    departure = above if side > 0 else below if side < 0 else below + above
    return np.exp(-0.5 * departure**2)


def class_plausibility(
    measured: Mapping[str, Sequence[float]], source: Mapping[str, Any], quantiles: Sequence[float]
) -> float | None:
    """Plausibility of one class, 0 to 1; None where no slice holds it.

    Only slices with the class are compared, so a scan may be a slab. A feature scores 1 inside the source's 5 % to 95 %
    range and falls off outside like a Gaussian whose width is the distance from the median to that end. The class
    scores the mean over its slices, weighted by area, of the geometric mean of its features: an organ of usual size and
    position scores near 1, specks and leaks near 0.

    `measured` has each feature's (n,) values over the slices with the class; `source` is the class's entry of the
    model's statistics, which lists these `quantiles`.
    """
    areas = np.asarray(measured["area_mm2"], float)
    if not len(areas):
        return None
    if source.get("area_mm2") is None:
        return 0.0  # the training data never showed this class
    logs = []
    for name in SHAPES:
        known = dict(zip(quantiles, source[name], strict=True))
        logs.append(np.log(np.maximum(feature_score(name, np.asarray(measured[name], float), known), 1e-9)))
    scores = np.exp(np.mean(logs, axis=0))
    return float(np.average(scores, weights=areas))


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
        """Rise of the mean over the classes of either prediction; a class that one of them lacks counts 0 there."""
        classes = [name for name, one in other.dice.items() if one.predicted or self.dice[name].predicted]
        return self.mean_over(classes) - other.mean_over(classes)

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


class QualityMeter:
    """Runs a network and measures, batch by batch, what the features of a scan need.

    Call it as the network; :meth:`features` closes a scan and :meth:`clear` begins the next one.

    Args:
        network: the segmenter; merged adapters are fine.
        task: what it segments.
        statistics: the source statistics of the model's record; InputError where they lack a class of the task.
    """

    def __init__(self, network: SamSegmenter, task: Task, statistics: Mapping[str, Any]) -> None:
        classes = statistics.get("classes") or {}
        missing = [name for name in task.classes[1:] if name not in classes]
        if missing or "quantiles" not in statistics:
            raise InputError(f"the model's source statistics lack {[*missing, 'quantiles'][0]!r}; train it again")
        self.network, self.task, self.statistics = network, task, statistics
        self.pyramid_head = network.head if isinstance(network.head, PyramidHead) else None
        self._noise: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Begin a scan."""
        k = self.task.num_classes
        self.soft = np.zeros((2, k))  # sums of p y, and of p + y
        self.overlaps = np.zeros((2, 2, k))  # with the noisy and the linear prediction: overlap, sum of sizes
        self.shapes: list[ClassFeatures] = [{name: [] for name in SHAPES} for _ in range(k)]
        self.levels: Sums = []

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, pyramid: Pyramid | None = None) -> torch.Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W), whose `pyramid` may be known."""
        pyramid = self.network.encode(images) if pyramid is None else pyramid
        coarse = self.network.decode(pyramid)
        logits = self.network.upsampled(coarse)
        self._add(images, pyramid, coarse.float(), logits)
        return logits

    def _add(self, images: torch.Tensor, pyramid: Pyramid, coarse: torch.Tensor, logits: torch.Tensor) -> None:
        k = self.task.num_classes
        maps, labels = coarse.softmax(1), coarse.argmax(1)
        sizes = _counts(labels, k)
        confident = torch.stack([maps[:, c][labels == c].sum() for c in range(k)])
        self.soft += torch.stack([confident, maps.sum((0, 2, 3)) + sizes]).double().cpu().numpy()
        shown = labels.flatten(1).any(1)
        if not shown.any():
            return
        pyramid, labels = map_levels(lambda level: level[shown].to(coarse), pyramid), labels[shown]
        others = [self.network.decode(self._noisy(pyramid)).argmax(1)]
        if self.pyramid_head is not None:
            height, width = pyramid[IMAGE].shape[-2:]
            levels = self.pyramid_head.standardized(pyramid)
            others.append(
                self.pyramid_head.linear_logits(levels, (height // 4, width // 4), labels.shape[-2:]).argmax(1)
            )
            self.levels = added(self.levels, level_sums(self.network, pyramid, self.task))
        for sums, other in zip(self.overlaps, others, strict=False):
            both = _counts(torch.where(labels == other, labels, 0), k)
            sums += torch.stack([both, sizes + _counts(other, k)]).double().cpu().numpy()
        full = logits[shown].argmax(1).cpu().numpy()
        boxes = body_boxes(center_channels(images[shown].float().cpu(), self.task), self.task)
        for kept, found in zip(self.shapes, shape_features(full, boxes, self.task), strict=True):
            for name, values in found.items():
                kept[name] += values

    def _noisy(self, pyramid: Pyramid) -> Pyramid:
        """Levels with one pattern of noise for all slices, so that batches do not matter."""
        noisy = {}
        for name, level in pyramid.items():
            key = name, tuple(level.shape[1:])
            if key not in self._noise:
                generator = torch.Generator().manual_seed(zlib.crc32(str(key).encode()))
                self._noise[key] = torch.randn(key[1], generator=generator)
            spread = PIXEL_NOISE if name == IMAGE else NOISE * level.std((2, 3), keepdim=True)
            noisy[name] = level + spread * self._noise[key].to(level)
        return noisy

    def features(self) -> dict[str, list[float] | None]:
        """Class -> features in the order of :data:`FEATURES`, None for a class that is not predicted; then clear.

        Features that the head does not have are NaN.
        """
        closeness = self._closeness()
        result: dict[str, list[float] | None] = {}
        for k, name in enumerate(self.task.classes[1:], start=1):
            plausible = class_plausibility(
                self.shapes[k], self.statistics["classes"][name], self.statistics["quantiles"]
            )
            if plausible is None:
                result[name] = None
                continue
            agreed = [2 * both / total if total else math.nan for both, total in self.overlaps[:, :, k]]
            shares = [2 * self.soft[0, k] / self.soft[1, k], *agreed, plausible]
            result[name] = [*(float(logit(min(max(v, EDGE), 1 - EDGE))) for v in shares), closeness]
        self.clear()
        return result

    def _closeness(self) -> float:
        known = self.statistics.get("levels") or []
        distances = []
        for source, sums in zip(known, self.levels, strict=False):
            weight, total, square = (part[0].cpu().numpy() for part in sums)
            mean, std = total / weight, np.sqrt(np.maximum(square / weight - (total / weight) ** 2, LEAST_VARIANCE))
            mean0, std0 = (np.asarray(source[key][0]) for key in ("mean", "std"))
            distances.append(np.mean(np.abs(mean - mean0) / std0) + np.mean(np.abs(np.log(std / std0))))
        return -math.log(max(float(np.mean(distances)), EDGE)) if distances else math.nan


@dataclasses.dataclass(frozen=True)
class Row:
    """One class of one prediction whose Dice is known: `scan` is the same for predictions of the same image."""

    patient: str
    scan: str
    variant: int  # 0 for the plain prediction
    name: str  # of the class
    features: list[float] | None
    dice: float


Fit = tuple[np.ndarray, np.ndarray, np.ndarray, float, dict[str, float]]  # mean, std, weights, bias, bias of classes


@dataclasses.dataclass(frozen=True)
class Calibration:
    """From features to the predicted Dice, its interval, and the gain that replaces a prediction.

    Dice = 1 / (1 + exp(-(b + b_class + w z))), z the standardized features, w >= 0.

    Attributes:
        mean, std: (F,) of the features.
        weights: (F,).
        bias: b.
        class_bias: class -> b_class.
        heights, low, high: of the residuals: predicted Dice, and what the interval adds to it there.
        margin: predicted gain of the mean Dice from which a prediction replaces another one; None where the rows were
            of plain predictions alone.
        about: numbers of patients and rows, where they are from, and the error on patients left out.
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

    def expected(self, features: Mapping[str, list[float] | None]) -> CaseQuality:
        """Predicted Dice of each class from :meth:`QualityMeter.features`."""
        result = {}
        distance = None
        for name, values in features.items():
            if values is None:
                result[name] = ExpectedDice(0.0, 0.0, 0.0, predicted=False)
                continue
            dice = _dice(self.fit, name, values)
            low, high = (float(np.interp(dice, self.heights, side)) for side in (self.low, self.high))
            result[name] = ExpectedDice(dice, max(0.0, dice + low), min(1.0, dice + high))
            distance = math.exp(-values[-1]) if math.isfinite(values[-1]) else None
        return CaseQuality(result, distance)

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
            numbers += [*result.low, *result.high, *result.class_bias.values(), result.margin or 0.0]
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
    known = [row for row in rows if row.features is not None]
    if len(known) < FEWEST:
        return None
    patients = sorted({row.patient for row in known})
    model = _fit(known)
    predicted: dict[int, float] = {}
    for patient in sorted({row.patient for row in rows}):
        rest = [row for row in known if row.patient != patient]
        apart = _fit(rest) if len(patients) > 1 and len(rest) >= FEWEST else model
        predicted |= {id(row): _dice(apart, row.name, row.features) for row in rows if row.patient == patient}
    found = np.array([predicted[id(row)] for row in known])
    true = np.array([row.dice for row in known])
    heights, low, high = _residuals(found, true - found)
    mean, std, weights, bias, class_bias = model
    error = float(np.abs(true - found).mean())
    margin = _margin(rows, predicted)
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
        margin=margin,
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
    z = np.where(there, (raw - mean) / std, 0.0)
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


def _dice(fit: Fit, name: str, features: Sequence[float] | None) -> float:
    if features is None:
        return 0.0
    mean, std, weights, bias, class_bias = fit
    z = np.nan_to_num((np.asarray(features, float) - mean) / std, nan=0.0)
    return float(expit(bias + class_bias.get(name, 0.0) + z @ weights))


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


def _margin(rows: Sequence[Row], predicted: Mapping[int, float]) -> float | None:
    """Quantile :data:`SURE` of predicted minus true gain of the mean Dice between predictions of the same scan."""
    scans: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        scans.setdefault(row.scan, {}).setdefault(row.variant, []).append((predicted[id(row)], row.dice))
    excess = []
    for variants in scans.values():
        means = {key: np.mean(values, 0) for key, values in variants.items()}
        for key, values in means.items():
            if key and 0 in means:
                gain = values - means[0]
                excess.append(gain[0] - gain[1])
    if not excess:
        return None
    return round(max(0.0, float(np.quantile(excess, SURE, method="higher"))), 5)


def _counts(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.bincount(labels.flatten(), minlength=num_classes).float()


def _short(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
