# SPDX-License-Identifier: Apache-2.0
"""Source statistics: measures of the training slices, stored with a model, by which the adaptation judges predictions
and aligns features without labels.

Shapes and intensities: for each class, quantiles over the slices with the class, since scans differ in how much of the
body they show; no value belongs to one patient. Predictions of a new scan are measured in the same way.

Features: mean and spread of each channel after each layer of the decoder, for each class, since a scan may show other
organs than the training slices did.

Levels: mean and spread over the body of each channel of the encoder's levels, as the head `pyramid` standardizes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage

from samda.adapters.base import modules
from samda.adapters.sites import LevelSite
from samda.data.body import body_mask, body_threshold
from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.embeddings import labeled_batches
from samda.errors import InputError
from samda.networks.head import IMAGE, Pyramid, map_levels
from samda.networks.pyramid_head import PyramidHead
from samda.networks.segmenter import SamSegmenter
from samda.task import Task

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 256  # of the intensity histograms over [0, 1]: quantiles are exact to 1 / 256
COARSE_MM = 3.0  # step of the grid on which the body is searched
VERSION = 1
MOST = 256  # slices whose features are measured: enough for moments of 256 channels over 16 x 16 places or more
EPS = 1e-6
LEAST_VARIANCE = 1e-8
MOST_GAIN = 4.0  # by which the alignment may change a channel's spread
STRENGTHS = (0.5, 1.0)  # of the alignments that are tried

FEATURES = {
    "area_mm2": "area in a slice",
    "components": "connected pieces in a slice (pixels that share an edge)",
    "compactness": "area over that of the ellipse of equal second moments: 1 for an ellipse, 3 / pi for a rectangle, "
    "less where it is scattered or hollow",
    "elongation": "longer over shorter axis of that ellipse",
    "row": "centroid in the box of the body, 0 its first and 1 its last row",
    "column": "the same for columns",
}
Box = tuple[slice, slice]  # rows, columns
Sums = list[list[torch.Tensor]]  # per layer, as `class_sums` has them
ClassFeatures = dict[str, list[float]]  # feature -> its value in each slice that holds the class


class SliceStatistics:
    """Collects statistics of slices with their labels, case by case; what `partial` labels leave open is no part of
    them, nor are shapes in slices with ignored pixels.
    """

    def __init__(self, task: Task, partial: PartialLabels | None = None) -> None:
        self.task = task
        self.possible = None if partial is None else partial.possible().numpy()
        self.known = np.zeros(task.num_classes, np.int64)  # slices whose label tells where the class is
        self.cases = self.slices = 0
        self.features: list[ClassFeatures] = [{name: [] for name in FEATURES} for _ in task.classes]
        self.histograms = np.zeros((task.num_classes, task.in_channels, BINS), np.int64)
        self.body_areas: list[float] = []
        self.body_histogram = np.zeros((task.in_channels, BINS), np.int64)

    def update(self, images: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray) -> None:
        """Add neighboring slices (n, C, H, W) in [0, 1] of one case, in their order, with labels (n, H, W)."""
        images, labels = np.asarray(images), np.asarray(labels)
        if self.possible is not None:
            held = [np.unique(label) for label in labels]
            self.known += sum(~self.possible[v[v >= OPEN]].any(0) for v in held)
            whole = np.array([IGNORED not in v for v in held])
            labels = np.where(labels < OPEN, labels, 0)
        else:
            self.known += len(labels)
            whole = np.ones(len(labels), bool)
        self._check(images, labels)
        bodies = body_masks(images, self.task)
        measured = shape_features(labels * whole[:, None, None], [box_of(body) for body in bodies], self.task)
        for features, added in zip(self.features, measured, strict=True):
            for name, values in added.items():
                features[name] += values
        for image, label, body in zip(images, labels, bodies, strict=True):
            self._count(image, label, body)
            self.body_areas.append(float(body.sum()) * self.task.spacing**2)
        self.cases, self.slices = self.cases + 1, self.slices + len(images)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON.

        Returns:
            {"version", "cases", "slices", "spacing_mm", "quantiles": which, "body": {"area_mm2", "intensity"},
            "classes": {name: {"slices": number that hold it, "share": of the slices that tell, feature of
            `FEATURES`: quantiles over the slices that hold it, "intensity": per channel, quantiles over its
            pixels}}}; None where there is nothing.
        """
        classes = {}
        for k, name in enumerate(self.task.classes):
            if k:
                count = len(self.features[k]["area_mm2"])
                entry: dict[str, Any] = {"slices": count, "share": _short(count / max(1, self.known[k]))}
                entry |= {feature: _quantiles(values) for feature, values in self.features[k].items()}
                entry["intensity"] = [_histogram_quantiles(h) for h in self.histograms[k]]
                classes[name] = entry
        return {
            "version": VERSION,
            "cases": self.cases,
            "slices": self.slices,
            "spacing_mm": self.task.spacing,
            "quantiles": list(QUANTILES),
            "body": {
                "area_mm2": _quantiles(self.body_areas),
                "intensity": [_histogram_quantiles(h) for h in self.body_histogram],
            },
            "classes": classes,
        }

    def _check(self, images: np.ndarray, labels: np.ndarray) -> None:
        if images.ndim != 4 or labels.shape != (len(images), *images.shape[2:]):
            raise InputError(f"images must be (n, C, H, W) and labels (n, H, W), got {images.shape} and {labels.shape}")
        if images.shape[1] != self.task.in_channels:
            raise InputError(f"the task has {self.task.in_channels} channel(s), the images have {images.shape[1]}")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.task.num_classes:
            last = self.task.num_classes - 1
            raise InputError(f"labels hold {labels.min()} to {labels.max()}, the classes are 0 to {last}")

    def _count(self, image: np.ndarray, label: np.ndarray, body: np.ndarray) -> None:
        """Add the intensities of a slice (C, H, W) to the histograms."""
        for channel, values in enumerate(image):
            bins = np.clip((values * BINS).astype(np.int64), 0, BINS - 1)
            joint = np.bincount((label.astype(np.int64) * BINS + bins).ravel(), minlength=self.task.num_classes * BINS)
            self.histograms[:, channel] += joint.reshape(-1, BINS)
            self.body_histogram[channel] += np.bincount(bins[body], minlength=BINS)


def body_masks(images: np.ndarray, task: Task) -> np.ndarray:
    """The body in neighboring slices, (n, C, H, W) -> (n, H, W), see :mod:`samda.data.body`; all of a picture."""
    values = images.mean(axis=1)
    if task.modality == "image":
        return np.ones(values.shape, bool)
    step = max(1, int(COARSE_MM // task.spacing))
    small = values[:, ::step, ::step].transpose(1, 2, 0)  # slices last, as axial planes lie in a volume
    spacing_mm = np.array([step * task.spacing] * 2 + [COARSE_MM])
    mask = body_mask(small, spacing_mm, body_threshold(small, task, scaled=True)).transpose(2, 0, 1)
    return mask.repeat(step, 1).repeat(step, 2)[:, : values.shape[1], : values.shape[2]]


def slice_bodies(images: torch.Tensor, task: Task) -> np.ndarray:
    """The body in each of some slices (n, C, H, W) that are no neighbors, or of several scans: (n, H, W)."""
    return np.concatenate([body_masks(image[None], task) for image in images.float().cpu().numpy()])


def body_boxes(images: torch.Tensor, task: Task) -> list[Box]:
    """The box of the body in each of the neighboring slices (n, C, H, W)."""
    return [box_of(mask) for mask in body_masks(np.asarray(images), task)]


def shape_features(labels: np.ndarray, boxes: Sequence[Box], task: Task) -> list[ClassFeatures]:
    """Features of each class, background included, in the slices with it: labels (n, H, W), boxes of the body."""
    found: list[ClassFeatures] = [{name: [] for name in FEATURES} for _ in task.classes]
    for label, box in zip(labels, boxes, strict=True):
        for k in np.unique(label[label > 0]):
            mask = label == k
            rows, columns = np.nonzero(mask)
            compactness, elongation = ellipse_moments(rows, columns)
            measured = {
                "area_mm2": len(rows) * task.spacing**2,
                "components": ndimage.label(mask)[1],
                "compactness": compactness,
                "elongation": elongation,
                "row": _relative(rows.mean(), box[0]),
                "column": _relative(columns.mean(), box[1]),
            }
            for name, value in measured.items():
                found[int(k)][name].append(float(value))
    return found


def ellipse_moments(rows: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
    """Compactness and elongation of a set of pixels, (N,) rows and columns, from its second moments, see `FEATURES`.

    S is the covariance of all points of the pixels: that of their centers, plus 1/12 in both directions as pixels are
    unit squares. The ellipse of equal moments has the area 4 pi sqrt(det S); its axes are as the roots of S's
    eigenvalues.
    """
    covariance = np.cov(np.stack([rows, columns]).astype(float), bias=True) + np.eye(2) / 12
    small, large = np.linalg.eigvalsh(covariance)
    return len(rows) / (4 * np.pi * np.sqrt(small * large)), float(np.sqrt(large / small))


def box_of(mask: np.ndarray) -> Box:
    """Bounding box of a mask, or the whole of it where it is empty."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    return found[0] if found else (slice(0, mask.shape[0]), slice(0, mask.shape[1]))


def _relative(position: float, side: slice) -> float:
    return (position - side.start) / max(1, side.stop - 1 - side.start)


def _quantiles(values: Sequence[float]) -> list[float] | None:
    return [_short(v) for v in np.quantile(values, QUANTILES)] if len(values) else None


def _histogram_quantiles(counts: np.ndarray) -> list[float] | None:
    """Middle of the bin that holds each quantile."""
    total = counts.sum()
    if not total:
        return None
    bins = np.searchsorted(counts.cumsum(), np.asarray(QUANTILES) * total)
    return [_short((b + 0.5) / BINS) for b in bins]


def _short(value: float) -> float:
    """Five significant digits: more would only make the file longer."""
    return float(f"{value:.5g}")


class FeatureTap:
    """Collects a segmenter's features, with gradients, while it is open.

    They are the image side of each decoder layer for the head `sam`, and the last hidden maps of the head `pyramid`,
    averaged to the head's `feature_stride`.

    Attributes:
        features: per layer the features (B, h w, C) of every pass since :meth:`clear`.

    Example:
        >>> with FeatureTap(network) as tap:  # doctest: +SKIP
        ...     network.decode(pyramid)
        ...     mean = tap.features[0][0].mean((0, 1))
    """

    def __init__(self, network: SamSegmenter) -> None:
        self.sites = network.feature_modules
        self.pooling = network.head.feature_stride // network.head.stride  # of hidden maps
        self.features: list[list[torch.Tensor]] = [[] for _ in self.sites]
        self._handles: list[Any] = []

    def clear(self) -> None:
        """Forget what was collected."""
        for kept in self.features:
            kept.clear()

    def __enter__(self) -> FeatureTap:
        for site, kept in zip(self.sites, self.features, strict=True):

            def keep(module: nn.Module, inputs: Any, outputs: Any, kept: list[torch.Tensor] = kept) -> None:
                if isinstance(outputs, tuple):
                    kept.append(outputs[1])  # (tokens, image)
                else:
                    kept.append(F.avg_pool2d(outputs, self.pooling).flatten(2).transpose(1, 2))

            self._handles.append(site.register_forward_hook(keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.clear()


def class_shares(labels: torch.Tensor, num_classes: int, grid: tuple[int, int]) -> torch.Tensor:
    """Share of each class in each place of the features' grid: labels (B, H, W) -> (B, h w, K), summing to 1 over K.

    `grid` is (h, w); H and W are multiples of them.
    """
    rows, columns = labels.shape[1] // grid[0], labels.shape[2] // grid[1]
    maps = F.one_hot(labels.long(), num_classes).movedim(-1, 1).float()
    return F.avg_pool2d(maps, (rows, columns)).flatten(2).transpose(1, 2)


def class_sums(features: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (K,), weighted sum (K, C) and weighted sum of squares (K, C) of features (B, n, C), shares (B, n, K)."""
    weights, values = shares.flatten(0, 1).T, features.flatten(0, 1)
    return weights.sum(1), weights @ values, weights @ values.square()


@torch.no_grad()
def feature_statistics(
    network: SamSegmenter, task: Task, items: Any, indices: Sequence[int], batch_size: int = 8
) -> dict[str, list[dict[str, Any]]]:
    """Moments of features and levels over some slices, evenly chosen where there are more than 256.

    Args:
        network: the trained network.
        task: what it segments.
        items: `items[i]` holds "label" (1, H, W) class indices, and "pyramid" or "image" (C, H, W).
        indices: those with foreground, without augmentation.
        batch_size: slices decoded at once.

    Returns:
        Plain values for JSON: {"features": per layer {"mean", "std"}, K rows of C values each, None for a class without
        slices; "levels": per level, fine to coarse, {"mean", "std"} over the body, one row, empty for a head without
        levels}.
    """
    step = max(1, -(-len(indices) // MOST))
    features: Sums = []
    levels: Sums = []
    device = network.pixel_mean.device
    network.eval()
    with FeatureTap(network) as tap:
        for inputs, labels in labeled_batches(items, list(indices)[::step], batch_size):
            tap.clear()
            if isinstance(inputs, dict):
                pyramid = map_levels(lambda level: level.to(device), inputs)
            else:
                pyramid = network.encode(inputs.to(device))
            network.decode(pyramid)
            labels = labels[:, 0].to(device)
            k = network.num_classes  # open background is a class of its own here
            labels = torch.where(labels < OPEN, labels, torch.where(labels == IGNORED, k + 1, k))
            height, width = (side // network.head.feature_stride for side in labels.shape[1:])
            shares = class_shares(labels, k + 2, (height, width))[..., : k + 1].double()
            found = [list(class_sums(torch.cat(kept).double(), shares)) for kept in tap.features]
            features = added(features, found)
            if isinstance(network.head, PyramidHead):
                levels = added(levels, level_sums(network, pyramid, slice_bodies(pyramid[IMAGE], task)))
    features = [[_one_background(part, layer[0]) for part in layer] for layer in features]
    return {"features": [_moments(*layer) for layer in features], "levels": [_moments(*level) for level in levels]}


def _one_background(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums (K + 1, ...) of classes and of open background -> (K, ...); the latter counts where there is no other."""
    background = part[:1] if weight[0] > 0 else part[-1:]
    return torch.cat([background, part[1:-1]])


def level_sums(network: SamSegmenter, pyramid: Pyramid, bodies: np.ndarray) -> Sums:
    """Per level of slices weight (1,), sum and sum of squares (1, C) of its standardized channels in the body.

    `bodies` are the masks (n, H, W) of :func:`slice_bodies`.
    """
    shown = torch.from_numpy(bodies)[:, None].float()
    sums = []
    pyramid = map_levels(lambda level: level.to(network.pixel_mean), pyramid)
    for maps in network.head.standardized(pyramid):  # type: ignore[operator]
        inside = F.interpolate(shown, size=maps.shape[-2:], mode="area").to(maps)
        values, shares = (part.flatten(2).transpose(1, 2).double() for part in (maps, inside))
        sums.append(list(class_sums(values, shares)))
    return sums


def align_levels(
    network: SamSegmenter,
    parameters: Mapping[str, torch.Tensor],
    source: Sequence[Mapping[str, Any]],
    found: Sequence[Sequence[torch.Tensor]],
    strength: float,
) -> dict[str, torch.Tensor]:
    """Values of the adapter `ssf` that bring the moments of a scan's levels to those of the training slices.

    With mean m and deviation s of a channel u in the body of the scan, and m0, s0 in that of the training slices,

        u -> s' / s (u - m) + m',    m' = m + a (m0 - m),    s' = s (s0 / s)^a

    a is the `strength`, 0 to 1; s' / s is limited to 1/4 to 4. The trained scale and shift follow.

    Args:
        network: with the head `pyramid`.
        parameters: those that may move, by name.
        source: the "levels" of :func:`feature_statistics`.
        found: of :func:`level_sums`.
        strength: a.
    """
    aligned: dict[str, torch.Tensor] = {}
    done = set()
    for path, site, adapter in modules(network):
        names = f"{path}.scale", f"{path}.shift"
        if not isinstance(site, LevelSite) or site in done or names[0] not in parameters:
            continue
        done.add(site)
        weight, total, square = (part.squeeze(0) for part in found[site.info.block])
        mean = total / weight
        std = (square / weight - mean.square()).clamp_min(LEAST_VARIANCE).sqrt()
        mean0, std0 = (torch.tensor(source[site.info.block][key][0]).to(mean) for key in ("mean", "std"))
        gain = (std0 / std).pow(strength).clamp(1 / MOST_GAIN, MOST_GAIN)
        trained = 1 + sum(other.delta()[0].detach().double() for other in site.active())
        changes = trained * (gain - 1), trained * (mean + strength * (mean0 - mean) - gain * mean)
        for name, old, change in zip(names, adapter.delta(), changes, strict=True):
            aligned[name] = (old.detach() + change).to(old.dtype)
    return aligned


def added(sums: Sums, found: Sums) -> Sums:
    """Sums of two parts; `sums` may be empty."""
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, found, strict=True)] if sums else found


def _moments(weight: torch.Tensor, total: torch.Tensor, square: torch.Tensor) -> dict[str, Any]:
    mean = total / weight[:, None]
    std = (square / weight[:, None] - mean.square()).clamp_min(EPS**2).sqrt()
    there = (weight > 0).tolist()
    return {
        name: [[_short(v) for v in row.tolist()] if known else None for row, known in zip(rows, there, strict=True)]
        for name, rows in (("mean", mean), ("std", std))
    }
