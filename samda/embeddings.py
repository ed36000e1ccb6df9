# SPDX-License-Identifier: Apache-2.0
"""Feature pyramids kept: training that leaves the encoder unchanged does not pay for it in every step.

Every slice is encoded in a few augmented views before the first step; a pass over the slices draws one view of each,
and in the meantime old views are replaced by new ones. All choices follow from (seed, pass, index) and the number of
renewed views, so a resumed training sees what an uninterrupted one sees.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
from monai.networks.utils import eval_mode
from torch.utils.data import Dataset

from samda.data.labels import OPEN
from samda.errors import InputError, UsageError
from samda.networks.head import Pyramid, map_levels
from samda.networks.ops import computes_bf16
from samda.processes import broadcast, exchange, rank_and_world
from samda.progress import bar

HALF = torch.float16  # of the kept levels
LEAST = 256 * 256**2  # pixels that are encoded in any case, for the start of the class head: 256 slices of 256 x 256
GRID = 16  # pixels: cuts begin at places of the coarsest level
MOST = 4 * 256**2  # pixels that are encoded at once: vit_t's widest maps take 16 MiB, see `keep_freed_memory`

logger = logging.getLogger(__name__)


class Views(Protocol):
    """A data set of slices that can be seen in augmented views; view 0 is the slice as it is."""

    foreground: torch.Tensor  # (N,) bool, does the slice hold foreground?
    late: torch.Tensor  # (N,) bool, does the slice train only later on?

    def __len__(self) -> int: ...

    def signature(self) -> list[int]:
        """Numbers that tell this data set from another."""
        ...

    def view(self, index: int, view: int) -> dict[str, Any]:
        """The slice `index` in augmentation `view`: {"image": (C, H, W), "label": (1, H, W), ...}."""
        ...


def draw(*parts: object) -> int:
    """A number in [0, 2^32) that depends on nothing but `parts` (no generator is touched)."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def split_key(key: int | tuple[int, int]) -> tuple[int, int]:
    """Epoch and index of a sampler's key: a plain index means epoch 0, that is no augmentation."""
    epoch, index = key if isinstance(key, tuple) else (0, key)
    return int(epoch), int(index)


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, memory_mb: float, folder: str | Path | None = None
) -> torch.Tensor:
    """An empty tensor in memory, or mapped from a nameless file in `folder` where it exceeds `memory_mb`.

    The file vanishes with the process, also when that is killed.

    Args:
        shape: shape of the tensor.
        dtype: its type.
        memory_mb: largest size that is kept in memory (1 MB = 10^6 bytes).
        folder: where the file lies; None takes the system's temporary folder.

    Raises:
        InputError: neither memory nor disk have the room.
    """
    needed = math.prod(shape) * dtype.itemsize
    if needed <= memory_mb * 1e6:
        return torch.empty(shape, dtype=dtype)
    check_disk(needed, memory_mb, folder)
    folder = folder or tempfile.gettempdir()
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the mapping keeps it open
    try:  # the room itself: other programs write there, too, and a mapped file on a full disk ends the process
        os.posix_fallocate(file.fileno(), 0, needed)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_room(needed, memory_mb, folder) from error
    return torch.from_numpy(np.memmap(file, dtype=kind, mode="w+", shape=shape))  # type: ignore[call-overload]


def check_disk(needed: int, memory_mb: float, folder: str | Path | None) -> None:
    """Refuse a disk without room for `needed` bytes: writing to a mapped file would end the process."""
    folder = folder or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _no_room(needed, memory_mb, folder)


def _no_room(needed: int, memory_mb: float, folder: str | Path) -> InputError:
    free = shutil.disk_usage(folder).free
    return InputError(
        f"{needed / 1e9:.1f} GB do not fit into memory_mb={memory_mb:g} nor on the disk of {folder} "
        f"({free / 1e9:.1f} GB free); raise memory_mb, lower views or set TMPDIR to a larger disk"
    )


class EmbeddingDataset(Dataset):
    """Slices as the frozen encoder sees them: {"pyramid": {level: (C, h, w)}, "label": (1, H, W), ...}.

    The pyramid holds the levels that the network's class head reads, in half precision. `dataset[index]` is the slice
    without augmentation; `dataset[pass, index]` the view that this pass over the slices draws: a slice runs through the
    views that it holds in turn, from a start of its own. Connected processes share the first encoding, batch by batch,
    and each keeps all of it.

    Each slice has room for `views` views. Slot 0 holds the slice itself; view v > 0 lies in slot 1 + (v - 1) % (views -
    1). With `first` < `views`, :meth:`renew` fills the other slots during the training and then replaces the oldest
    views by new ones: a view is never the last of its kind, and the training starts early. What is held follows from
    the number of renewed slices alone, so a resumed training sees what an uninterrupted one sees.

    Args:
        slices: what is encoded; see :class:`Views`. Its further entries (numbers, for instance the case) pass through.
        network: has `encode(image) -> pyramid`; `encoder_adapted` must not be true.
        views: views of each slice that are kept, the unchanged one included.
        seed: of the choice of views.
        batch_size: slices encoded at once, also in :meth:`renew`.
        device: where the encoder runs; the pyramids stay in main memory.
        memory_mb: size beyond which the pyramids lie on disk (MB).
        folder: folder of these files; None takes the system's temporary folder.
        amp: encode under bfloat16 autocast, on CUDA and on CPUs that compute it
            (:func:`samda.networks.ops.computes_bf16`).
        first: views that are encoded before the training; None takes all.
        enough: asked before each batch; true ends the first encoding. A slice that it did not reach is encoded when it
            is asked for.
        collect: called with the pyramids and labels (B, 1, H, W) of view 0, batch by batch, as they are encoded;
            without those of late slices.
        crop: sides of the image beyond this are cut to it in augmented views (pixels, a multiple of 16); every other
            cut lies around a foreground pixel. None never cuts.

    Attributes:
        cost: what the first encoding took: {"seconds", "megabytes", "slices", "views", "on_disk",
            "precision" ("bf16" or "fp32")}.
        renewed: slices that were encoded anew since.

    Raises:
        UsageError: an adapter changes the encoder, or `views` is below 1.
        InputError: neither memory nor disk have the room, or a level is not finite.
    """

    def __init__(
        self,
        slices: Views,
        network: nn.Module,
        views: int = 1,
        seed: int = 0,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        memory_mb: float = 2048,
        folder: str | Path | None = None,
        amp: bool = False,
        first: int | None = None,
        enough: Callable[[], bool] = lambda: False,
        collect: Callable[[Pyramid, torch.Tensor], None] | None = None,
        crop: int | None = None,
    ) -> None:
        if views < 1:
            raise UsageError(f"views must be at least 1 (the slice itself), got {views}")
        if getattr(network, "encoder_adapted", False):
            raise UsageError(
                "these adapters change the encoder, so embeddings cannot be computed once; set embeddings=False"
            )
        self.slices, self.network, self.views, self.seed = slices, network, views, seed
        self.batch_size, self.device, self.crop = batch_size, torch.device(device), crop
        self.amp = amp and (self.device.type == "cuda" or computes_bf16(self.device))
        self.memory_mb, self.folder = memory_mb, folder
        self.first = views if first is None else min(first, views)
        self.extras: list[dict[str, Any]] = [{} for _ in range(len(slices))]
        self.pyramids: dict[
            int, Pyramid
        ] = {}  # slot -> levels of all slices; a slot takes no room before its first view
        self.labels: dict[int, torch.Tensor] = {}
        self.latest = torch.full((len(slices),), -1)  # newest view of each slice
        self.renewed = 0
        self._order: tuple[int, list[int]] | None = None  # of renewal: number of the cycle, slices
        start = time.perf_counter()
        self._fill(enough, collect)
        self.cost = {
            "seconds": round(time.perf_counter() - start, 3),
            "megabytes": round(self.nbytes / 1e6, 3),
            "slices": len(slices),
            "views": round(float((self.latest + 1).float().mean()), 1),
            "on_disk": self.nbytes > memory_mb * 1e6,
            "precision": "bf16" if self.amp else "fp32",
        }
        logger.info("encoded %(slices)d slices x %(views)g views in %(seconds).1f s: %(megabytes).0f MB", self.cost)

    @property
    def nbytes(self) -> int:
        """Bytes of all pyramids."""
        return sum(level.nbytes for pyramid in self.pyramids.values() for level in pyramid.values())

    def _fill(self, enough: Callable[[], bool], collect: Callable[[Pyramid, torch.Tensor], None] | None) -> None:
        """Encode the first views: view 0 of all slices, then view 1, ...; in random order, as time may end."""
        count, size = len(self.slices), self.batch_size
        generator = torch.Generator().manual_seed(draw(self.seed, "first"))
        order = torch.randperm(count, generator=generator).tolist()
        keys = [(index, view) for view in range(self.first) for index in order]
        cuts = sorted({*range(0, len(keys), size), *range(0, len(keys), count), len(keys)})  # a batch is of one view
        batches = [keys[a:b] for a, b in itertools.pairwise(cuts)]
        progress = bar("encoding", len(keys), "slice")
        rank, world = rank_and_world()
        done = 0  # pixels
        for start in range(0, len(batches), world):
            if done >= LEAST and broadcast(enough()):
                break
            own = [self._encode(batch) for batch in batches[start + rank : start + rank + 1]]
            for batch, pyramid, labels, extras in (result for results in exchange(own) for result in results):
                self._store(batch, pyramid, labels, extras)
                done += labels.numel()
                if batch[0][1] == 0 and collect is not None:
                    early = [place for place, (index, _) in enumerate(batch) if not self.late[index]]
                    if early:
                        collect(map_levels(lambda level, early=early: level[early], pyramid), labels[early])
                progress.update(len(batch))
        progress.close()

    def _store(
        self, batch: list[tuple[int, int]], pyramid: Pyramid, labels: torch.Tensor, extras: list[dict[str, Any]]
    ) -> None:
        for position, (index, view) in enumerate(batch):
            slot = self.slot(view)
            if slot not in self.pyramids:
                self._allocate(slot, pyramid, labels)
            for name, level in pyramid.items():
                self.pyramids[slot][name][index] = level[position]
            self.labels[slot][index] = labels[position]
            self.extras[index] = extras[position]
            self.latest[index] = max(int(self.latest[index]), view)

    def _allocate(self, slot: int, pyramid: Pyramid, labels: torch.Tensor) -> None:
        """Room for a view of all slices, like those of a batch: all levels in memory or all on disk."""
        count = len(self.slices)
        shapes = {name: (count, *level.shape[1:]) for name, level in pyramid.items()}
        needed = sum(math.prod(shape) * HALF.itemsize for shape in shapes.values())
        limit = self.memory_mb if self.nbytes + needed <= self.memory_mb * 1e6 else 0.0
        if not limit:
            check_disk(needed, self.memory_mb, self.folder)
        self.pyramids[slot] = {name: allocate(shape, HALF, limit, self.folder) for name, shape in shapes.items()}
        self.labels[slot] = allocate((count, *labels.shape[1:]), labels.dtype, limit, self.folder)

    def _encode(
        self, batch: list[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], Pyramid, torch.Tensor, list[dict[str, Any]]]:
        """The batch itself, its pyramid and labels, and the further entries of its slices."""
        items = [self.slices.view(index, view) for index, view in batch]
        images = torch.stack([item["image"] for item in items]).to(self.device)
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)
        with torch.no_grad(), cast, eval_mode(self.network):
            pyramid = map_levels(_halved, self.network.encode(images))  # type: ignore[operator]
        extras = [{key: value for key, value in item.items() if key not in ("image", "label")} for item in items]
        return batch, pyramid, torch.stack([item["label"] for item in items]), extras

    def slot(self, view: int) -> int:
        """Where a view is kept."""
        return view if view < self.views else 1 + (view - 1) % (self.views - 1)

    def renew(self, count: int) -> None:
        """Encode the next `count` slices in a view that none has seen; every process does so by itself.

        A resumed training encodes the same batches, as a slice may round otherwise beside others, if `count` is always
        a multiple of the batch size.
        """
        if self.views == 1:
            return
        for batch in self._batches(self.renewed, self.renewed + count, self.latest.clone()):
            self._store(*self._encode(batch))
        self.renewed += count

    def _batches(self, start: int, end: int, latest: torch.Tensor) -> Iterator[list[tuple[int, int]]]:
        """Slices and their new views in the turns from `start` to `end`; `latest`, at the start, is counted up."""
        for first in range(start, end, self.batch_size):
            batch = []
            for turn in range(first, min(first + self.batch_size, end)):
                index = self._turn(turn)
                latest[index] += 1
                batch.append((index, int(latest[index])))
            yield batch

    def _turn(self, turn: int) -> int:
        """The slice that is renewed at this turn: all once, in an order of its own, before any again."""
        cycle, position = divmod(turn, len(self))
        if self._order is None or self._order[0] != cycle:
            generator = torch.Generator().manual_seed(draw(self.seed, "renew", cycle))
            self._order = cycle, torch.randperm(len(self), generator=generator).tolist()
        return self._order[1][position]

    def state_dict(self) -> dict[str, Any]:
        """What is held, for a checkpoint; the pyramids themselves are computed again."""
        return {"renewed": self.renewed, "latest": self.latest.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` noted."""
        end, wanted = state["renewed"], state["latest"]
        first = wanted.clone()  # newest views before the first turn
        for turn in range(end):
            first[self._turn(turn)] -= 1
        missing = [
            (index, view) for index in range(len(self)) for view in range(int(self.latest[index]) + 1, first[index] + 1)
        ]
        batches = [[one] for one in missing]
        oldest = wanted - max(self.views - 2, 0)
        batches += [b for b in self._batches(0, end, first) if any(view >= oldest[index] for index, view in b)]
        progress = bar("encoding", sum(map(len, batches)), "slice")
        for batch in batches:
            self._store(*self._encode(batch))
            progress.update(len(batch))
        progress.close()
        self.renewed = end

    def choose(self, turn: int, index: int) -> int:
        """The slot of slice `index` in this pass; pass 0 is the slice itself."""
        held = min(self.views, int(self.latest[index]) + 1)
        return 0 if turn == 0 else (draw(self.seed, "view", index) + turn) % held

    @property
    def foreground(self) -> torch.Tensor:
        """(N,) bool, does the slice hold foreground?"""
        return self.slices.foreground

    @property
    def late(self) -> torch.Tensor:
        """(N,) bool, does the slice train only later on?"""
        return self.slices.late

    @property
    def cut_share(self) -> float:
        """Pixels of a cut over those of a slice; 1 where nothing is cut."""
        sides = self.labels[0].shape[-2:]
        return math.prod(min(side, self.crop or side) for side in sides) / math.prod(sides)

    def signature(self) -> list[int]:
        """Numbers that tell these slices from others."""
        return self.slices.signature()

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        turn, index = split_key(key)
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        if self.latest[index] < 0:  # there was no time
            self._store(*self._encode([(index, 0)]))
        slot = self.choose(turn, index)
        pyramid, label = map_levels(lambda level: level[index], self.pyramids[slot]), self.labels[slot][index]
        if turn and self.crop is not None and max(label.shape[-2:]) > self.crop:
            pyramid, label = self._cut(pyramid, label, draw(self.seed, "crop", turn, index))
        return {"pyramid": pyramid, "label": label, **self.extras[index]}

    def _cut(self, pyramid: Pyramid, label: torch.Tensor, seed: int) -> tuple[Pyramid, torch.Tensor]:
        """A random part of at most `crop` pixels a side, on the grid of the coarsest level."""
        random = np.random.default_rng(seed)
        center = None
        places = ((label[0] > 0) & (label[0] < OPEN)).nonzero()
        if len(places) and random.random() < 0.5:
            center = places[random.integers(len(places))].tolist()
        starts, sizes = [], []
        for axis, side in enumerate(label.shape[-2:]):
            size = min(side, self.crop or side)
            last = (side - size) // GRID
            start = int(random.integers(last + 1))
            if center is not None:
                start = min(max((center[axis] - int(random.integers(size))) // GRID, 0), last)
            starts.append(start * GRID)
            sizes.append(size)

        def part(level: torch.Tensor) -> torch.Tensor:
            stride = label.shape[-1] // level.shape[-1]
            rows, columns = (slice(a // stride, (a + n) // stride) for a, n in zip(starts, sizes, strict=True))
            return level[:, rows, columns]

        return map_levels(part, pyramid), part(label)


def labeled_batches(
    items: Any, indices: Sequence[int], batch_size: int = 8
) -> Iterator[tuple[torch.Tensor | Pyramid, torch.Tensor]]:
    """Inputs of a network, images (B, C, H, W) or pyramids, and labels (B, 1, H, W), of some items of a data set."""
    for start in range(0, len(indices), batch_size):
        batch = [items[index] for index in indices[start : start + batch_size]]
        labels = torch.stack([item["label"] for item in batch])
        if "pyramid" in batch[0]:
            yield map_levels(lambda *levels: torch.stack(levels), *(item["pyramid"] for item in batch)), labels
        else:
            yield torch.stack([item["image"] for item in batch]), labels


def _halved(level: torch.Tensor) -> torch.Tensor:
    """In half precision on the CPU; what exceeds its range is an outlier of a few channels and is clipped."""
    if not torch.isfinite(level).all():
        raise InputError("the encoder gives values that are not finite; check the scans and the base weights")
    limit = torch.finfo(HALF).max
    return level.clamp(-limit, limit).to(HALF).cpu().contiguous()
