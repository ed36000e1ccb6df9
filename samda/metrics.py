# SPDX-License-Identifier: Apache-2.0
"""Overlap, surface distance and volume of a segmentation, in mm and ml, with defined values for empty structures.

| structure is in        | status   | Dice, IoU | HD95                  | NSD |
|------------------------|----------|-----------|-----------------------|-----|
| prediction and label   | `both`   | computed  | computed              | computed |
| the label only         | `missed` | 0         | the volume's diagonal | 0   |
| the prediction only    | `extra`  | 0         | the volume's diagonal | 0   |
| neither                | `absent` | NaN       | NaN                   | NaN |
| no label of the class  | `unlabeled` | NaN    | NaN                   | NaN |

Means exclude NaN and are reported with the number of values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage

from samda.data.labels import IGNORED, OPEN
from samda.errors import InputError

CHUNK = 1 << 22  # voxels counted at once; counting needs about 30 bytes per voxel

SCORES = ("dice", "iou", "hd95_mm", "nsd")
COUNTED = ("missed", "extra", "absent")

DEFINITIONS = {
    "dice": "2 |P & L| / (|P| + |L|), over the voxels of the whole volume on the label's own grid",
    "iou": "|P & L| / |P | L|",
    "hd95_mm": "larger of the two directed 95th percentiles of the distances (mm) between surface voxels, each voxel "
    "counted once (as in MONAI and medpy; not weighted by area)",
    "nsd": "share of the surface voxels of both that are within the tolerance (mm) of the other surface",
    "surface": "voxels of a structure with a face on its outside or on the border of the volume; a volume of one "
    "slice is measured in its plane",
    "volumes": "voxels times the volume of a voxel, in ml",
    "missed": "in the label, not in the prediction: Dice, IoU and NSD 0, HD95 the diagonal of the volume",
    "extra": "in the prediction, not in the label: Dice, IoU and NSD 0, HD95 the diagonal of the volume",
    "absent": "in neither: no value (NaN), excluded from means",
    "unlabeled": "the label lacks the class: no value (NaN), excluded from means; ignored voxels count for no class",
    "pooled_dice": "Dice of the voxels of all cases together",
    "mean": "over the n cases that have a value; `all` is the mean of the classes' means",
}


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Scores of one class in one case, see the table of the module."""

    status: str  # "both", "missed", "extra", "absent" or "unlabeled"
    dice: float
    iou: float
    hd95_mm: float
    nsd: float
    predicted_ml: float
    label_ml: float


def confusion_matrix(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxel counts (K, K) of class indices (X, Y, Z): rows are classes of the label, columns of the prediction."""
    _check(prediction, label, num_classes)
    counts = np.zeros(num_classes**2, np.int64)
    planes = max(1, CHUNK // max(1, prediction[..., 0].size))
    for start in range(0, prediction.shape[-1], planes):
        found, true = (a[..., start : start + planes].astype(np.int64).ravel() for a in (prediction, label))
        counts += np.bincount(true * num_classes + found, minlength=len(counts))
    return counts.reshape(num_classes, num_classes)


def score_case(
    prediction: np.ndarray,
    label: np.ndarray,
    spacing_mm: Sequence[float],
    num_classes: int,
    nsd_tolerance_mm: float,
    unlabeled: Sequence[int] = (),
) -> list[ClassScores]:
    """Scores of the foreground classes 1 .. K-1 of one case from class indices (X, Y, Z) on one grid.

    `spacing_mm` is the size of a voxel along X, Y, Z. The label may have values of
    :class:`samda.data.labels.PartialLabels`; `unlabeled` are classes that it lacks. Raises InputError if the shapes
    differ or a value is not a class.
    """
    if prediction.shape == label.shape and label.dtype == np.uint8 and label.max(initial=0) >= OPEN:
        prediction = np.where(label == IGNORED, 0, prediction)
        label = np.where(label >= OPEN, 0, label)
    counts = confusion_matrix(prediction, label, num_classes)
    boxes = [ndimage.find_objects(a, max_label=num_classes) for a in (prediction, label)]
    voxel_ml = float(np.prod(spacing_mm)) / 1000.0
    diagonal_mm = math.hypot(*(n * s for n, s in zip(label.shape, spacing_mm, strict=True)))
    scores = []
    for k in range(1, num_classes):
        overlap, predicted, true = int(counts[k, k]), int(counts[:, k].sum()), int(counts[k].sum())
        volumes = {"predicted_ml": predicted * voxel_ml, "label_ml": true * voxel_ml}
        if k in unlabeled:
            volumes["label_ml"] = math.nan
            scores.append(ClassScores("unlabeled", math.nan, math.nan, math.nan, math.nan, **volumes))
        elif not predicted and not true:
            scores.append(ClassScores("absent", math.nan, math.nan, math.nan, math.nan, **volumes))
        elif not predicted or not true:
            scores.append(ClassScores("missed" if true else "extra", 0.0, 0.0, diagonal_mm, 0.0, **volumes))
        else:
            box = _union(boxes[0][k - 1], boxes[1][k - 1])
            p, t = (_squeezed(a[box] == k, label.shape) for a in (prediction, label))
            spacing = [s for s, kept in zip(spacing_mm, _kept_axes(label.shape), strict=True) if kept]
            hd95, nsd = surface_scores(p, t, spacing, nsd_tolerance_mm)
            dice, iou = 2 * overlap / (predicted + true), overlap / (predicted + true - overlap)
            scores.append(ClassScores("both", dice, iou, hd95, nsd, **volumes))
    return scores


def surface_scores(
    prediction: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float], nsd_tolerance_mm: float
) -> tuple[float, float]:
    """HD95 (mm) and normalized surface distance of one structure; both masks have at least one voxel.

    The boolean masks, in two or three dimensions, may be cropped to the structure: everything outside the array is
    outside the structure. `spacing_mm` is the size of a voxel along each axis.
    """
    _, distances, _ = get_edge_surface_distance(
        torch.from_numpy(np.ascontiguousarray(prediction)),
        torch.from_numpy(np.ascontiguousarray(label)),
        spacing=[float(s) for s in spacing_mm],
        symmetric=True,
        warn_empty=False,
    )
    to_label, to_prediction = (d.double().numpy() for d in distances)
    hd95 = max(np.percentile(to_label, 95), np.percentile(to_prediction, 95))
    # distances are float32: a surface exactly at the tolerance is within it
    within = [(d <= nsd_tolerance_mm * (1 + 1e-6)).sum() for d in (to_label, to_prediction)]
    return float(hd95), float(sum(within) / (len(to_label) + len(to_prediction)))


def summarize(cases: Iterable[Sequence[ClassScores]], classes: Sequence[str]) -> dict[str, Any]:
    """Mean, standard deviation and median per foreground class over cases of :func:`score_case`, with their number n.

    Returns {"classes": {class: entry}, "all": entry}; an entry is {"dice": {"mean", "std", "median", "n"}, ...,
    "pooled_dice": value, "missed": count, "extra": count, "absent": count}. The values of `all` are the means of the
    classes (n is the number of classes with a value), the mean of their pooled Dice and the sums of their counts.
    """
    cases = list(cases)
    per_class: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(classes):
        scores = [case[k] for case in cases]
        entry: dict[str, Any] = {key: _moments([getattr(s, key) for s in scores]) for key in SCORES}
        entry["pooled_dice"] = _pooled(scores)
        per_class[name] = entry | {what: sum(s.status == what for s in scores) for what in COUNTED}
    entries = per_class.values()
    total: dict[str, Any] = {key: _moments([entry[key]["mean"] for entry in entries]) for key in SCORES}
    total["pooled_dice"] = _moments([entry["pooled_dice"] for entry in entries])["mean"]
    return {"classes": per_class, "all": total | {what: sum(entry[what] for entry in entries) for what in COUNTED}}


def _pooled(scores: Sequence[ClassScores]) -> float:
    """Dice of all cases as one volume: their mean, weighted by the compared volumes."""
    parts = [(s.dice, s.predicted_ml + s.label_ml) for s in scores if not math.isnan(s.dice)]
    total_ml = sum(ml for _, ml in parts)
    return sum(dice * ml for dice, ml in parts) / total_ml if total_ml else math.nan


def _moments(values: Sequence[float]) -> dict[str, float]:
    known = np.asarray([v for v in values if not math.isnan(v)], float)
    if not len(known):
        return {"mean": math.nan, "std": math.nan, "median": math.nan, "n": 0}
    spread = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    return {"mean": float(known.mean()), "std": spread, "median": float(np.median(known)), "n": len(known)}


def _check(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> None:
    if prediction.shape != label.shape:
        sizes = [" x ".join(map(str, a.shape)) for a in (prediction, label)]
        raise InputError(f"prediction ({sizes[0]}) and label ({sizes[1]}) differ in size; compare them on one grid")
    for name, array in (("prediction", prediction), ("label", label)):
        if array.dtype.kind not in "iu":
            raise InputError(f"the {name} has voxels of type {array.dtype}; class indices are integers")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= num_classes:
            value = low if low < 0 else high
            raise InputError(f"the {name} contains {value}, which is not a class index (0 to {num_classes - 1})")


def _union(a: tuple[slice, ...], b: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True))


def _kept_axes(shape: Sequence[int]) -> list[bool]:
    """Axes in which surfaces are measured: all, or those of the plane if the volume is a single slice."""
    flat = [axis for axis in reversed(range(len(shape))) if shape[axis] == 1][: max(0, len(shape) - 2)]
    return [axis not in flat for axis in range(len(shape))]


def _squeezed(mask: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return mask.squeeze(tuple(axis for axis, kept in enumerate(_kept_axes(shape)) if not kept))
