# SPDX-License-Identifier: Apache-2.0
"""Feature pyramids computed once: training that leaves the encoder unchanged pays for it once, not in every epoch.

Every slice is encoded in a fixed number of augmented views before the first step; an epoch then draws one view of each
slice. All choices are functions of (seed, epoch, index), so a resumed training sees what an uninterrupted one sees.
"""

from __future__ import annotations

import logging
import math
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
from torch.utils.data import Dataset

from samda.errors import InputError, UsageError
from samda.networks.head import Pyramid, map_levels
from samda.processes import exchange, rank_and_world
from samda.progress import bar

HALF = torch.float16  # of the kept levels

logger = logging.getLogger(__name__)


class Views(Protocol):
    """A data set of slices that can be seen in augmented views; view 0 is the slice as it is."""

    foreground: torch.Tensor  # (N,) bool, does the slice hold foreground?

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
    return torch.from_numpy(np.memmap(file, dtype=kind, mode="w+", shape=shape))  # type: ignore[call-overload]


def check_disk(needed: int, memory_mb: float, folder: str | Path | None) -> None:
    """Refuse a disk without room for `needed` bytes: writing to a mapped file would end the process."""
    folder = folder or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{needed / 1e9:.1f} GB do not fit into memory_mb={memory_mb:g} nor on the disk of {folder} "
            f"({free / 1e9:.1f} GB free); raise memory_mb, lower views or set TMPDIR to a larger disk"
        )


class EmbeddingDataset(Dataset):
    """Slices as the frozen encoder sees them: {"pyramid": {level: (C, h, w)}, "label": (1, H, W), ...}.

    The pyramid holds the levels that the network's class head reads, in half precision. `dataset[index]` is the slice
    without augmentation; `dataset[epoch, index]` the view that this epoch draws. Each slice runs through its views in
    turn, from a start of its own, so a view returns after `views` epochs. Connected processes share the encoding, batch
    by batch, and each keeps all of it: an epoch deals out its slices anew.

    Args:
        slices: what is encoded; see :class:`Views`. Its further entries (numbers, for instance the case) pass through.
        network: has `encode(image) -> pyramid`; `encoder_adapted` must not be true.
        views: views of each slice, the unchanged one included.
        seed: of the choice of views.
        batch_size: slices encoded at once.
        device: where the encoder runs; the pyramids stay in main memory.
        memory_mb: size beyond which the pyramids lie on disk (MB).
        folder: folder of these files; None takes the system's temporary folder.
        amp: encode under bfloat16 autocast (CUDA only).

    Attributes:
        cost: what it took: {"seconds", "megabytes", "slices", "views", "on_disk"}.

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
    ) -> None:
        if views < 1:
            raise UsageError(f"views must be at least 1 (the slice itself), got {views}")
        if getattr(network, "encoder_adapted", False):
            raise UsageError(
                "these adapters change the encoder, so embeddings cannot be computed once; set embeddings=False"
            )
        self.slices, self.views, self.seed = slices, views, seed
        self.extras: list[dict[str, Any]] = []
        start = time.perf_counter()
        device = torch.device(device)
        cast = torch.autocast("cuda", torch.bfloat16, enabled=amp and device.type == "cuda")
        with torch.no_grad(), cast:
            network.eval()
            self._fill(network.encode, batch_size, device, memory_mb, folder)  # type: ignore[arg-type]
        self.cost = {
            "seconds": round(time.perf_counter() - start, 3),
            "megabytes": round(self.nbytes / 1e6, 3),
            "slices": len(slices),
            "views": views,
            "on_disk": self.nbytes > memory_mb * 1e6,
        }
        logger.info("encoded %(slices)d slices x %(views)d views in %(seconds).1f s: %(megabytes).0f MB", self.cost)

    @property
    def nbytes(self) -> int:
        """Bytes of all pyramids."""
        return sum(level.nbytes for level in self.pyramids.values())

    def _fill(
        self,
        encode: Callable[[torch.Tensor], Pyramid],
        batch_size: int,
        device: torch.device,
        memory_mb: float,
        folder: str | Path | None,
    ) -> None:
        keys = [(index, view) for index in range(len(self.slices)) for view in range(self.views)]
        batches = [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]
        progress = bar("encoding", len(keys), "slice")
        rank, world = rank_and_world()
        for first in range(0, len(batches), world):
            own = [self._encode(batch, encode, device) for batch in batches[first + rank : first + rank + 1]]
            for batch, pyramid, labels, extras in (result for results in exchange(own) for result in results):
                if not self.extras:
                    self._allocate(pyramid, labels, memory_mb, folder)
                for position, (index, view) in enumerate(batch):
                    for name, level in pyramid.items():
                        self.pyramids[name][index, view] = level[position]
                    self.labels[index, view] = labels[position]
                self.extras += extras
                progress.update(len(batch))
        progress.close()

    def _allocate(self, pyramid: Pyramid, labels: torch.Tensor, memory_mb: float, folder: str | Path | None) -> None:
        """Room for all levels and labels, like those of a first batch: all levels in memory or all on disk."""
        places = (len(self.slices), self.views)
        shapes = {name: places + tuple(level.shape[1:]) for name, level in pyramid.items()}
        needed = sum(math.prod(shape) * HALF.itemsize for shape in shapes.values())
        limit = memory_mb if needed <= memory_mb * 1e6 else 0.0
        if not limit:
            check_disk(needed, memory_mb, folder)
        self.pyramids = {name: allocate(shape, HALF, limit, folder) for name, shape in shapes.items()}
        self.labels = allocate(places + tuple(labels.shape[1:]), labels.dtype, memory_mb, folder)

    def _encode(
        self, batch: list[tuple[int, int]], encode: Callable[[torch.Tensor], Pyramid], device: torch.device
    ) -> tuple[list[tuple[int, int]], Pyramid, torch.Tensor, list[dict[str, Any]]]:
        """The batch itself, its pyramid and labels, and the further entries of the slices whose view 0 it holds."""
        items = [self.slices.view(index, view) for index, view in batch]
        pyramid = map_levels(_halved, encode(torch.stack([item["image"] for item in items]).to(device)))
        extras = [
            {key: value for key, value in item.items() if key not in ("image", "label")}
            for (_, view), item in zip(batch, items, strict=True)
            if view == 0
        ]
        return batch, pyramid, torch.stack([item["label"] for item in items]), extras

    def choose(self, epoch: int, index: int) -> int:
        """The view of slice `index` in this epoch; epoch 0 is the slice itself."""
        return 0 if epoch == 0 else (draw(self.seed, "view", index) + epoch) % self.views

    @property
    def foreground(self) -> torch.Tensor:
        """(N,) bool, does the slice hold foreground?"""
        return self.slices.foreground

    def signature(self) -> list[int]:
        """Numbers that tell these slices from others."""
        return self.slices.signature()

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = split_key(key)
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        view = self.choose(epoch, index)
        pyramid = map_levels(lambda level: level[index, view], self.pyramids)
        return {"pyramid": pyramid, "label": self.labels[index, view], **self.extras[index]}


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
