# SPDX-License-Identifier: Apache-2.0
"""Which slices an epoch sees: all with foreground, a few without."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DistributedSampler

from samda.errors import UsageError

__all__ = ["SliceSampler"]


class SliceSampler(DistributedSampler):
    """Every slice with foreground once, and so many of the empty ones that they make up `empty_share` of the epoch.

    Empty slices teach the network to stay silent, but there are many and one is much like the next; at least one is
    drawn where there is any, at most all. It yields (epoch, index), so a data set can derive the augmentation of a
    slice from the epoch. Order and choice follow from (seed, epoch) alone; MONAI's engines call `set_epoch`.

    Several processes deal out what one would draw: process r takes the items r, r + R, ... Where these are not equally
    many, the last is (epoch, None), see :class:`samda.training.distributed.PaddedDataset`.

    Args:
        foreground: (N,) bool, does the slice hold foreground?
        empty_share: share of slices without foreground, in [0, 1).
        seed: of order and choice.
        num_replicas: number of processes; None asks torch.distributed, 1 without it.
        rank: of this process.
    """

    def __init__(
        self,
        foreground: torch.Tensor,
        empty_share: float = 0.1,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not 0 <= empty_share < 1:
            raise UsageError(f"empty_share must lie in [0, 1), got {empty_share}")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        replicas = num_replicas or (torch.distributed.get_world_size() if distributed else 1)
        rank = rank if rank is not None else (torch.distributed.get_rank() if distributed else 0)
        super().__init__(foreground, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.full = torch.nonzero(foreground).flatten()
        self.empty = torch.nonzero(~foreground).flatten()
        wanted = round(len(self.full) * empty_share / (1 - empty_share))
        self.num_empty = min(len(self.empty), max(1, wanted)) if empty_share else 0
        self.num_samples = math.ceil((len(self.full) + self.num_empty) / replicas)

    def __iter__(self) -> Iterator[tuple[int, int | None]]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        chosen = self.empty[torch.randperm(len(self.empty), generator=generator)[: self.num_empty]]
        indices = torch.cat([self.full, chosen])
        own = indices[torch.randperm(len(indices), generator=generator)][self.rank :: self.num_replicas].tolist()
        own += [None] * (self.num_samples - len(own))
        return iter([(self.epoch, index) for index in own])

    def __len__(self) -> int:
        return self.num_samples
