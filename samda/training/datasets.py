# SPDX-License-Identifier: Apache-2.0
"""From cases to batches: labeled slices in memory, as augmented images or as embeddings; which of them an epoch sees,
and how many fit into the memory of a device at once.
"""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from monai.transforms import Compose
from torch.utils.data import Dataset

from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.data.slices import SliceGrid, axis_tasks, center_channels, with_neighbors
from samda.embeddings import MOST, EmbeddingDataset, allocate, draw, labeled_batches, split_key
from samda.errors import InputError, UsageError, nearest
from samda.io import files_of, free_memory
from samda.networks.head import Pyramid, map_levels
from samda.networks.segmenter import SamSegmenter
from samda.progress import bar, phase
from samda.source_statistics import SliceStatistics
from samda.task import Task
from samda.training.pace import Pace, clock

logger = logging.getLogger(__name__)


FIRST_VIEWS = 2  # the slice itself and another one; the rest comes during the training
DEFAULT = 8  # slices, for which the learning rates of train.json were chosen
PIXELS = 256 * 256  # of the slices that were measured
SHARE = 0.7  # of the memory that is free: the rest is for scans, and for others
# MB (10^6 bytes) of the process with base weights and adapters, and of every slice of 256 x 256 pixels in a training
# step: with adapters in the encoder (flagship), and with adapters in the decoder alone (sam_da, embeddings computed
# before). vit_t and vit_b were measured on a CPU in single precision; vit_l and vit_h are scaled from vit_b, the slices
# by depth x width of the encoder.
MEASURED = {
    "vit_t": (1000.0, 140.0, 20.0),
    "vit_b": (2000.0, 570.0, 20.0),
    "vit_l": (4500.0, 1520.0, 20.0),
    "vit_h": (8500.0, 2540.0, 20.0),
}


def fitting_batch_size(backbone: str, image_size: int, memory_mb: float, encoder: bool = True) -> int:
    """The largest power of two up to 8 that should fit into the free memory (MB), at least 1.

    `image_size` is in pixels; `encoder` says whether adapters change the encoder.
    """
    if backbone not in MEASURED:
        raise UsageError(f"unknown backbone {backbone!r}; {nearest(backbone, MEASURED)}")
    fixed, adapted, embedded = MEASURED[backbone]
    per_slice = (adapted if encoder else embedded) * image_size**2 / PIXELS
    fits = (SHARE * memory_mb - fixed) / per_slice
    return next((size for size in (DEFAULT, 4, 2) if size <= fits), 1)


def available_mb(device: str) -> float:
    """Free memory of a device (MB); of the CPU, main memory."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.mem_get_info(kind)[0] / 1e6
    free = free_memory()
    return (free if math.isfinite(free) else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 1e6


def build_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Callable,
    task: Task,
    network: SamSegmenter,
    augmentation: Compose | None = None,
    views: int = 1,
    seed: int = 0,
    embeddings: bool = True,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    memory_mb: float = 2048,
    amp: bool = False,
    part: str = "training",
    renew: bool = False,
    crop: int | None = None,
    closed_form: bool = False,
    pace: Pace | None = None,
    late: Sequence[Mapping[str, Any]] = (),
    partial: PartialLabels | None = None,
) -> SliceDataset | EmbeddingDataset:
    """The data set of one part of a training.

    Embeddings are computed once where `embeddings` allows it and no adapter changes the encoder; otherwise every item
    is an image, augmented anew in every pass. With `closed_form` the class head, where it can, starts from view 0 of
    the slices as soon as these are encoded: the network is usable from then on.

    Args:
        data, transform, task, augmentation, seed, part: see :class:`SliceDataset`.
        network: the segmenter with its adapters attached, on `device`.
        views: augmented views of a slice that are encoded, the unchanged one included; without effect on images.
        embeddings: encode once where possible.
        batch_size: without effect, configs of saved models name it; at most eight slices are encoded at once.
        memory_mb: memory for slices and for embeddings, each (MB); what exceeds it lies on disk.
        amp: encode under bfloat16 autocast where that is faster, see :class:`EmbeddingDataset`.
        renew: views will be renewed during the training, so two are enough to begin with.
        crop: see :class:`EmbeddingDataset`; without effect on images, and for heads that read SAM's decoder.
        pace: the length of the training, which bounds the time for encoding.
        late: further cases, which train later on, see :class:`JoinValidation`; the closed-form start does not see them.
        partial: what the labels leave open.
    """
    slices = SliceDataset([*data, *late], transform, task, augmentation, seed, memory_mb, part, len(late), partial)
    start = None
    if closed_form and network.head.has_closed_form:
        start = network.head.closed_form(slices.counts, None if partial is None else partial.possible())
    if not embeddings or network.encoder_adapted:
        if start is not None:
            _start_from_images(network, slices, start, device)
        return slices
    timed = pace is not None and pace.minutes is not None
    dataset = EmbeddingDataset(
        slices,
        network,
        views if augmentation is not None else 1,
        seed,
        batch_size=min(8, max(1, MOST // task.image_size**2)),
        device=device,
        memory_mb=memory_mb,
        amp=amp,
        first=FIRST_VIEWS if renew and not timed else None,
        enough=pace.encoded_enough if pace is not None else lambda: False,
        collect=None if start is None else _on(device, start.add),
        crop=None if network.head_config.reads_decoder else crop,
    )
    if start is not None:
        start.finish()
        logger.info("the class head starts in closed form")
    return dataset


def _on(device: torch.device | str, add: Callable[[Pyramid, torch.Tensor], None]) -> Callable:
    """`add` with what it is given on `device`, labels without their channel."""

    def collect(pyramid: Pyramid, labels: torch.Tensor) -> None:
        add(map_levels(lambda level: level.to(device), pyramid), labels[:, 0].to(device))

    return collect


def _start_from_images(network: SamSegmenter, slices: SliceDataset, start: Any, device: torch.device | str) -> None:
    """The closed-form start where nothing is encoded for good: slices with foreground, once through the network."""
    chosen = (slices.foreground & ~slices.late).nonzero().flatten().tolist()
    progress = bar("encoding", len(chosen), "slice")
    with torch.no_grad(), eval_mode(network):
        for images, labels in labeled_batches(slices, chosen):
            _on(device, start.add)(network.encode(images.to(device)), labels)  # type: ignore[union-attr]
            progress.update(len(labels))
    progress.close()
    start.finish()


class RenewViews:
    """Encodes slices in new views between the steps, `rate` of them per step, or with minutes for a share of the time.

    Where cuts train, fewer by the share of a slice that a cut is: encoding is then as large a part of a step.
    `dataset` is an :class:`EmbeddingDataset`; with another one, or rate 0, nothing happens.
    """

    def __init__(self, dataset: Dataset, rate: float, pace: Pace) -> None:
        if rate < 0:
            raise UsageError(f"renewed views per step must not be negative, got {rate}")
        self.dataset, self.rate, self.pace = dataset, rate, pace
        self._seconds = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        if self.rate and isinstance(self.dataset, EmbeddingDataset):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.pace.minutes is None:
            rate = self.rate * self.dataset.cut_share  # type: ignore[attr-defined]
            due = int(rate * engine.state.iteration) - self.dataset.renewed  # type: ignore[attr-defined]
        else:
            due = self.dataset.batch_size * self.pace.may_renew(self._seconds)  # type: ignore[attr-defined]
        due -= due % self.dataset.batch_size  # type: ignore[attr-defined]
        if due > 0:
            start = clock()
            self.dataset.renew(due)  # type: ignore[attr-defined]
            self._seconds += clock() - start


def prepare_batch(
    batch: Mapping[str, Any],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor | Pyramid, torch.Tensor]:
    """Inputs and labels for MONAI's engines, from {"pyramid" or "image", "label"}."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=non_blocking, **kwargs)

    inputs = map_levels(move, batch["pyramid"]) if "pyramid" in batch else move(batch["image"])
    return inputs, batch["label"].to(device, non_blocking=non_blocking)


def _opened(label: torch.Tensor, axis: int, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A label map (1, X, Y, Z) that is open outside the ranges of slices along an axis."""
    opened = torch.full_like(label, IGNORED)
    for first, end in ranges:
        opened.narrow(axis + 1, first, end - first).copy_(label.narrow(axis + 1, first, end - first))
    return opened


def tile_starts(length: int, size: int) -> list[int]:
    """Starts of the fewest windows of `size` that cover `length` pixels, evenly spread."""
    count = -(-length // size)
    return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]


class SliceDataset(Dataset):
    """All slices of some cases with their labels: {"image": (C, H, W), "label": (1, H, W), "case": number of the case}.

    The cases are read once. A case may limit itself to ranges of slices, `"slices": [(first, end), ...]`. Where a body
    exceeds the field of view, a slice gives several tiles. Where the task's `axes` are "all", training cases give
    slices along all three axes, in which labels out of the ranges are open; validation looks along the task's own. With
    `context` the image holds the neighboring slices, too (see :meth:`samda.data.slices.SliceGrid.inputs`); a range is a
    scan of its own then, and slices which are held out are no neighbors. `dataset[index]` is the slice without
    augmentation; `dataset[epoch, index]` is augmented as (seed, epoch, index) say, whatever was drawn before.

    Args:
        data: cases: {"image", "label"} and optionally "id" and "slices".
        transform: preprocessing: paths -> "image" (C, X, Y, Z) in [0, 1] and "label" (1, X, Y, Z) class indices.
        augmentation: random transforms of a slice; None leaves the slices as they are.
        memory_mb: memory for the slices (MB); what exceeds it lies on disk.
        part: "training" or "validation", for messages.
        late: so many of the last cases train later on.
        partial: what the labels leave open.

    Attributes:
        foreground: (N,) bool, does the item hold foreground?
        late: (N,) bool, is it of these cases?
        counts: (K,) pixels of each class; background that is open counts as background.
        present: (K,) bool, does the class occur at all?
        statistics: of the training slices as they are, for the record of the model; empty for another part.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable,
        task: Task,
        augmentation: Compose | None = None,
        seed: int = 0,
        memory_mb: float = 2048,
        part: str = "training",
        late: int = 0,
        partial: PartialLabels | None = None,
    ) -> None:
        self.task, self.augmentation, self.seed, self.part = task, augmentation, seed, part
        self.images: list[torch.Tensor] = []  # per case (n, C, H, W)
        self.labels: list[torch.Tensor] = []  # per case (n, 1, H, W)
        self.neighbors: list[list[tuple[int, int, int]]] = []  # per case, of each position: below, itself, above
        self.items: list[tuple[int, int]] = []  # case, position in it
        if not data:
            raise InputError(f"the data set has no {part} case; add labeled scans")
        self.names = [_name(case) for case in data]
        self.statistics, self.partial = SliceStatistics(task, partial), partial
        left, checksum = memory_mb, 0
        progress = bar(f"reading {part} cases", len(data), "case")
        for number, case in enumerate(data):
            image, label = self._read(case, self.names[number], transform)
            checksum = zlib.crc32(label.numpy().tobytes(), checksum)
            self.images.append(_keep(image, left))
            self.labels.append(_keep(label, left))
            left -= (image.nbytes + label.nbytes) / 1e6
            self.items += [(number, position) for position in range(len(image))]
            progress.update()
        progress.close()
        self._checksum = checksum
        self.foreground = torch.cat([((label > 0) & (label < OPEN)).flatten(1).any(1) for label in self.labels])
        self.late = torch.tensor([case >= len(data) - late for case, _ in self.items])
        counts = torch.as_tensor(sum(torch.bincount(label.flatten().long(), minlength=256) for label in self.labels))
        self.counts = counts[: task.num_classes]
        self.counts[0] += counts[OPEN:IGNORED].sum()
        if partial is None and counts[OPEN:].any():
            raise InputError(f"{part} labels have voxels without a label; build_dataset and the loss need `partial`")
        if counts[IGNORED]:
            share = 100 * int(counts[IGNORED]) / int(counts.sum())
            logger.info("%.3g %% of the %s labels are open and count in no loss or score", share, part)
        self.present = self.counts > 0
        self._check_foreground()

    def _read(self, case: Mapping[str, Any], name: str, transform: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """The slices of a case, cut into tiles of the task's size: (n, C, H, W) and (n, 1, H, W)."""
        if not case.get("label"):
            raise InputError(f"case {name!r} has no label; training needs one for every case")
        with phase("preprocessing"):
            scan = transform(dict(case))
        image, label, ranges = scan["image"], scan["label"], case.get("slices") or []
        tasks = [self.task]
        if self.part == "training":
            tasks = axis_tasks(self.task, image.shape[1:], image.pixdim.tolist(), f"case {name!r}")
        images: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        around: list[tuple[int, int, int]] = []
        for task in tasks:
            start = sum(len(slices) for slices in images)
            own = task is self.task
            known = label if own or not ranges else _opened(label, self.task.slice_axis, ranges)
            one, other, triples = self._slices(ranges if own else [], name, image, known, task)
            images.append(one)
            labels.append(other)
            around += [(a + start, b + start, c + start) for a, b, c in triples]
        self.neighbors.append(around)
        return torch.cat(images), torch.cat(labels)

    def _slices(
        self, ranges: Sequence[tuple[int, int]], name: str, image: torch.Tensor, label: torch.Tensor, task: Task
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
        """Tiles along the axis of `task`, of all slices without ranges: (n, C, H, W), (n, 1, H, W), and of each the
        places of its neighbors."""
        try:
            grid = SliceGrid.from_volume(image, image.affine, task)  # type: ignore[attr-defined]
        except InputError as error:
            raise InputError(f"case {name!r}: {error}") from error
        chosen: list[int] = []
        around: list[tuple[int, int, int]] = []
        for first, end in ranges or [(0, grid.num_slices)]:
            if not 0 <= first < end <= grid.num_slices:
                raise InputError(
                    f"case {name!r}: slices {first} to {end} do not lie within its {grid.num_slices} slices; "
                    "count from 0, end exclusive"
                )
            start = len(chosen)
            chosen += range(first, end)
            around += with_neighbors(range(start, len(chosen)), start, len(chosen))
        images, labels = grid.extract(image, chosen), grid.extract_labels(label, chosen)
        if self.part == "training" and task is self.task:  # adaptation sees the slices of this axis
            self.statistics.update(images, labels)
        size = task.image_size
        rows, columns = (tile_starts(side, size) for side in grid.canvas)
        windows = [(..., slice(r, r + size), slice(c, c + size)) for r in rows for c in columns]
        shifts = [len(chosen) * window for window in range(len(windows))]
        triples = [(a + shift, b + shift, c + shift) for shift in shifts for a, b, c in around]
        return torch.cat([images[w] for w in windows]), torch.cat([labels[w] for w in windows])[:, None], triples

    def _check_foreground(self) -> None:
        names = ", ".join(self.task.classes[1:])
        if not self.foreground.any():
            raise InputError(
                f"the {self.part} labels hold no foreground ({names}) in {len(self)} slices; check the task's labels"
            )
        absent = [name for name, present in zip(self.task.classes, self.present, strict=True) if not present]
        if absent and self.part == "training":
            logger.warning("no training slice holds %s; the network cannot learn it", ", ".join(absent))

    def view(self, index: int, view: int) -> dict[str, Any]:
        """The item in augmentation `view`; 0 is the item as it is."""
        case, position = self.items[index]
        if self.task.context:
            around = list(self.neighbors[case][position])
            item = {"image": self.images[case][around, 0], "label": self.labels[case][around, 0]}
        else:
            item = {"image": self.images[case][position].clone(), "label": self.labels[case][position].clone()}
        if view and self.augmentation is not None:
            self.augmentation.set_random_state(seed=draw(self.seed, "augment", view, index))
            item = self.augmentation(item)  # some transforms write into what they are given
        label = center_channels(item["label"][None], self.task)[0, :1]  # of the slice itself
        return {"image": item["image"].float(), "label": label.to(torch.uint8), "case": case}

    def signature(self) -> list[int]:
        """Numbers that tell this data set from another: cases, slices, and a checksum of the labels."""
        return [len(self.names), len(self.items), self._checksum]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = split_key(key)
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        return self.view(index, epoch)


def _name(case: Mapping[str, Any]) -> str:
    return str(case.get("id") or files_of(case["image"])[0].name)


def _keep(values: torch.Tensor, memory_mb: float) -> torch.Tensor:
    """`values`, on disk if they exceed the memory that is left."""
    if values.nbytes <= memory_mb * 1e6:
        return values
    return allocate(tuple(values.shape), values.dtype, memory_mb=0).copy_(values)
