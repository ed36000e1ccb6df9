# SPDX-License-Identifier: Apache-2.0
"""One scan: ready to be adapted to, with its source prediction, slices and views encoded once; and the result."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import SpatialImage
from torch.utils.checkpoint import checkpoint

from samda.adaptation.settings import AdaptationSettings
from samda.data.slices import SliceGrid, center_channels
from samda.expected_dice import Calibration, CaseQuality
from samda.inference.dicom_out import DicomOutput
from samda.inference.postprocessing import keep_largest
from samda.inference.volume import VolumeInferer
from samda.networks.head import IMAGE, Pyramid, cat_levels, map_levels, split_levels
from samda.networks.ops import argmax
from samda.networks.segmenter import SamSegmenter
from samda.progress import share
from samda.quality import QualityMeter
from samda.source_statistics import Box, body_boxes, slice_bodies
from samda.task import Task
from samda.views import View, apply_view, make_views, restore_view, seed_of

LEAST_FREE = 1 << 30  # bytes of the disk that are left to others
GRADIENT_PIXELS = 1 << 22  # pixels of the slices decoded at once with gradients: about 0.5 GB for the head `sam`

Scan = str | Path | SpatialImage | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A prediction on the volume's own grid, in RAS order."""

    labels: np.ndarray  # (X, Y, Z) class indices
    uncertainty: np.ndarray  # (X, Y, Z) float16, normalized entropy of the class probabilities, 0 to 1
    expected: CaseQuality | None = None  # where the model has a calibration


@dataclasses.dataclass
class PreparedCase:
    """A case ready to be adapted to, with any objective."""

    name: str
    input_sha256: str  # of its files, or of its preprocessed values where it came as an object
    data: dict[str, Any]  # preprocessed; "image" (C, X, Y, Z) in [0, 1], RAS
    grids: Sequence[SliceGrid]  # of the passes of a prediction, that of the task's axis first
    boxes: list[Box]  # of the body in each slice
    replay: EmbeddingReplay  # the network that the inferer runs
    source: Segmentation  # prediction of the source model
    slices: list[int]  # those adapted on
    images: torch.Tensor  # (m, C, H, W) their windows in [0, 1]
    bodies: np.ndarray  # (m, H, W) of the body in each window
    views: list[View]
    encode: Callable[[], Pyramid]  # gives `inputs`
    seed: int  # of the views
    started: str  # UTC
    seconds: dict[str, float]  # by stage
    scan: Path | SpatialImage | None = None  # file, DICOM folder or nibabel image
    intensity: dict[str, float] = dataclasses.field(default_factory=dict)  # chosen, see samda.adapters.intensity
    quality: CaseQuality | None = None  # of the source model in the chosen slices; None where it was not measured
    deadline: float | None = None  # of `time.monotonic`, for the adaptation; None sets no limit

    @property
    def grid(self) -> SliceGrid:
        """Of the slices along the axis of the task."""
        return self.grids[0]

    def shown(self, num_classes: int) -> list[int]:
        """The chosen slices with foreground, as the slices of the source statistics had; all, if few do."""
        areas = slice_areas(self.source.labels, num_classes, self.grid.axes[0]).sum(0)
        shown = [place for place, index in enumerate(self.slices) if areas[index]]
        return shown if 2 * len(shown) >= len(self.slices) else list(range(len(self.slices)))

    def own_grid(self, values: np.ndarray, dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """A map in RAS order in the axis order of the scan's file, and its affine; MONAI's Invertd makes two copies."""
        image = self.data["image"]
        affine = np.asarray(image.meta["original_affine"], float)
        turn = ornt_transform(io_orientation(np.asarray(image.affine, float)), io_orientation(affine))
        return np.array(apply_orientation(values, turn), dtype, order="C"), affine

    @functools.cached_property
    def inputs(self) -> Pyramid:
        """Levels (V, m, C, h, w) of the views, images alone where the encoder is adapted; encoded when first asked."""
        begin = time.perf_counter()
        levels = self.encode()
        self.seconds["views"] = time.perf_counter() - begin
        return levels


@dataclasses.dataclass
class AdaptedCase(DicomOutput):
    """The result of one scan, on the scan's own grid and in the axis order of its file.

    Attributes:
        case: name of the case.
        labels: (X, Y, Z) the map to use: the adapted one if accepted, else the source's byte for byte.
        source: (X, Y, Z) the plain prediction.
        uncertainty: (X, Y, Z) float32 in [0, 1], normalized entropy of the prediction in `labels`, to 2^-12.
        affine: (4, 4) voxel index to RAS mm.
        record: the audit record.
        scan: the scan's file or DICOM folder, or the nibabel image that it came as.
        tensors: the adapted parameters, where accepted.
        task: of the model, for DICOM output.
        quality: what Dice is to be expected of the map to use; None where the model has no calibration.
    """

    case: str
    labels: np.ndarray
    source: np.ndarray
    uncertainty: np.ndarray
    affine: np.ndarray
    record: dict[str, Any]
    scan: Path | SpatialImage | None = None
    tensors: dict[str, torch.Tensor] | None = None
    task: Task | None = None
    quality: CaseQuality | None = None

    @property
    def difference(self) -> np.ndarray:
        """(X, Y, Z) uint8: 0 as before, 1 foreground removed, 2 foreground added, 3 another class."""
        old, new = self.source > 0, self.labels > 0
        change = old.view(np.uint8) + np.uint8(2) * new.view(np.uint8)  # nothing wider: scans are large
        return change * (self.source != self.labels)


class EmbeddingReplay:
    """A network that encodes a volume on the first pass and only decodes on every later one.

    The inferer asks for the same batches in the same order on every pass, so pyramids are kept in that order. Those
    beyond `memory_mb` (10^6 bytes) lie in nameless temporary files, or are computed again if the disk has no room;
    None keeps none, as an adapted encoder needs. With a `calibration`, `meter` sees what is to be measured.
    """

    def __init__(
        self,
        network: SamSegmenter,
        memory_mb: float | None,
        meter: QualityMeter | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.network, self.memory_mb, self.meter, self.calibration = network, memory_mb, meter, calibration
        self.rewind(forget=True)

    def rewind(self, forget: bool = False) -> None:
        """Begin a pass; with `forget`, as the first one, which encodes."""
        self.next = 0
        if self.meter is not None:
            self.meter.clear()
        if forget:
            self.kept: list[Pyramid | IO[bytes] | None] = []
            self.held = 0  # bytes in memory

    def expected(self) -> CaseQuality | None:
        """What Dice is to be expected of the pass."""
        if self.meter is None or self.calibration is None:
            return None
        return self.calibration.expected(self.meter.features())

    def __call__(self, images: torch.Tensor, measured: bool = True) -> torch.Tensor:
        pyramid = self._pyramid(images)
        return self.meter(images, pyramid) if measured and self.meter is not None else self.network(pyramid)

    def _pyramid(self, images: torch.Tensor) -> Pyramid:
        place, self.next = self.next, self.next + 1
        kept = self.kept[place] if place < len(self.kept) else None
        if isinstance(kept, dict):
            return kept
        if kept is not None:
            kept.seek(0)
            return torch.load(kept, map_location=images.device)
        pyramid = self.network.encode(images)
        if place == len(self.kept):
            self.kept.append(self._stored(pyramid))
        return pyramid

    def _stored(self, pyramid: Pyramid) -> Pyramid | IO[bytes] | None:
        if self.memory_mb is None:
            return None
        size = sum(level.nbytes for level in pyramid.values())
        if self.held + size <= self.memory_mb * 1e6:
            self.held += size
            return pyramid
        try:
            if shutil.disk_usage(tempfile.gettempdir()).free < LEAST_FREE + size:
                return None
            file = tempfile.TemporaryFile()  # noqa: SIM115 - it vanishes with the replay, also when it is killed
            torch.save(pyramid, file)
        except (OSError, RuntimeError):
            return None
        return file


def prepare_case(
    inferer: VolumeInferer,
    replay: EmbeddingReplay,
    settings: AdaptationSettings,
    name: str,
    input_sha256: str,
    data: dict[str, Any],
    started: str,
    seconds: dict[str, float],
) -> PreparedCase:
    """Predict a preprocessed case, choose its slices and make their views; for the arguments see the result."""
    begin = time.perf_counter()
    task, volume, meta = inferer.task, data["image"].as_tensor(), data["image"].meta
    grids = inferer.grids(volume, data["image"].affine)
    grid = grids[0]
    source = segment(inferer, volume, grids, replay)
    seconds["predict"] = time.perf_counter() - begin
    share(0.2)
    areas = slice_areas(source.labels, task.num_classes, grid.axes[0])
    slices = choose_slices(areas, source.uncertainty.sum(axis=grid.axes[1:], dtype=np.float32), settings.slices)
    seed = seed_of(input_sha256, settings.seed)
    assert settings.views is not None
    views = make_views(settings.views, seed, settings.families, settings.strength, settings.flips)
    labels = torch.from_numpy(source.labels)[None]
    images = cut_windows(grid.inputs(volume, slices), grid.extract_labels(labels, slices), task.image_size)

    def encode(images: torch.Tensor) -> Pyramid:
        if replay.memory_mb is None:
            return {IMAGE: images}
        with inferer.autocast(images.device):
            return map_levels(lambda level: level.float(), replay.network.encode(images))

    return PreparedCase(
        name=name,
        input_sha256=input_sha256,
        data=data,
        grids=grids,
        boxes=body_boxes(grid.extract(volume, range(grid.num_slices)), task),
        replay=replay,
        source=source,
        slices=slices,
        images=images,
        bodies=slice_bodies(center_channels(images, task), task),
        views=views,
        encode=lambda: encode_views(images, slices, views, encode, settings.batch_size, inferer.device),
        seed=seed,
        started=started,
        seconds=seconds,
        scan=Path(meta["filename_or_obj"]) if meta.get("filename_or_obj") else None,
    )


@torch.no_grad()
def segment(
    inferer: VolumeInferer, volume: torch.Tensor, grids: Sequence[SliceGrid], replay: EmbeddingReplay
) -> Segmentation:
    """Predict a volume (C, X, Y, Z) at the network's present parameters, slab by slab, as `samda predict` does."""
    labels = np.zeros(volume.shape[1:], np.uint8 if inferer.task.num_classes <= 255 else np.uint16)
    uncertainty = np.zeros(volume.shape[1:], np.float16)  # there are two of them, as large as the scan
    replay.rewind()
    for place, maps in inferer.slabs(volume, grids, lambda images: replay(images, inferer.first_pass)):
        labels[place] = argmax(maps).cpu().numpy()
        entropy = -(maps * maps.clamp_min(1e-12).log()).sum(0) / np.log(len(maps))
        uncertainty[place] = entropy.clamp(0.0, 1.0).cpu().numpy()
    return Segmentation(keep_largest(labels, inferer.task.largest_only), uncertainty, replay.expected())


def choose_slices(areas: np.ndarray, doubt: np.ndarray, count: int) -> list[int]:
    """The slices to adapt on, chosen without labels: at most `count` indices in ascending order.

    Half of them lie evenly over the scan, whatever the source model predicts. A quarter shows the predicted classes at
    their largest, class by class, where pseudo-labels are best. The rest are the least certain ones, where there is
    most to gain. Neighbors are nearly equal and are avoided.

    Args:
        areas: (K - 1, n) predicted area of each foreground class in each slice.
        doubt: (n,) uncertainty of the prediction of each slice.
        count: number of slices.
    """
    n = len(doubt)
    if n <= count:
        return list(range(n))
    even = max(1, count // 2)
    chosen = {int((i + 0.5) * n / even) for i in range(even)}
    gap = max(1, n // (4 * count))

    def take(order: Sequence[int], wanted: int) -> None:
        for near in (gap, 0):  # neighbors only where nothing else is left
            for i in order:
                if len(chosen) >= wanted:
                    return
                if all(abs(int(i) - j) > near for j in chosen):
                    chosen.add(int(i))

    ranks = [np.argsort(-row, kind="stable")[: int((row > 0).sum())] for row in areas if row.any()]
    rounds = max((len(order) for order in ranks), default=0)
    largest = [int(order[i]) for i in range(rounds) for order in ranks if i < len(order)]
    take(largest, even + max(1, count // 4))
    take(np.argsort(-doubt, kind="stable").tolist(), count)
    return sorted(chosen)


def cut_windows(images: torch.Tensor, labels: torch.Tensor, size: int) -> torch.Tensor:
    """Per slice the window around the predicted foreground, where the canvas is larger than the field of view.

    `images` (m, C, rows, columns) and predicted `labels` (m, rows, columns) -> (m, C, size, size).
    """
    rows, columns = images.shape[-2:]
    if (rows, columns) == (size, size):
        return images
    windows = []
    for image, label in zip(images, labels, strict=True):
        places = torch.nonzero(label)
        middle = places.float().mean(0) if len(places) else torch.tensor([rows / 2, columns / 2])
        at = [
            int(min(max(round(float(m) - size / 2), 0), n - size)) for m, n in zip(middle, (rows, columns), strict=True)
        ]
        windows.append(image[:, at[0] : at[0] + size, at[1] : at[1] + size])
    return torch.stack(windows)


@torch.no_grad()
def encode_views(
    images: torch.Tensor,
    indices: Sequence[int],
    views: Sequence[View],
    encode: Callable[[torch.Tensor], Pyramid],
    batch_size: int,
    device: torch.device | str | None,
) -> Pyramid:
    """Every view of every chosen slice: levels (V, m, C, h, w)."""
    stacks = []
    for view in views:
        changed = apply_view(view, images, indices).to(device)
        stacks.append(cat_levels([encode(part) for part in changed.split(batch_size)]))
    return map_levels(lambda *levels: torch.stack(levels), *stacks)


@dataclasses.dataclass(frozen=True)
class ViewDecoder:
    """Logits (V, m, K, h, w) of the views of a case's chosen slices at the network's present parameters."""

    network: SamSegmenter
    embedded: bool  # are the inputs of a case the levels of its views? else their images
    batch_size: int
    mirror: Sequence[int]  # see samda.views.restore_view

    def seen(self, case: PreparedCase) -> torch.Tensor:
        """Of the views as they are, flips not undone."""
        chunk = self.batch_size
        if self.embedded:  # slices in one pass with gradients
            height, width = case.images.shape[-2:]
            chunk = max(1, GRADIENT_PIXELS // (height * width * self.network.head.gradient_cost))
        chunks = split_levels(map_levels(lambda level: level.flatten(0, 1), case.inputs), chunk)
        if len(chunks) > 1 and torch.is_grad_enabled():  # bounds memory at the price of a second forward pass
            parts = [checkpoint(self._decode, chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [self._decode(chunk) for chunk in chunks]
        return torch.cat(parts).unflatten(0, (len(case.views), len(case.slices)))

    def mapped_back(self, case: PreparedCase, logits: torch.Tensor) -> torch.Tensor:
        """What :meth:`seen` gave, flips undone."""
        if not any(view.flip for view in case.views):
            return logits
        return torch.stack(
            [restore_view(view, part, self.mirror) for view, part in zip(case.views, logits, strict=True)]
        )

    def _decode(self, inputs: Pyramid) -> torch.Tensor:
        return self.network.decode(inputs if self.embedded else self.network.encode(inputs[IMAGE]))


def slice_areas(labels: np.ndarray, num_classes: int, axis: int) -> np.ndarray:
    """Voxels of each foreground class in each slice, (K - 1, n); `axis` is the one across the slices."""
    planes = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    return np.stack([(planes == k).sum(1) for k in range(1, num_classes)]).astype(float)
