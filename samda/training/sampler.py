# SPDX-License-Identifier: Apache-2.0
"""Which slices train: the sampler, and validation patients that join it later on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import ValidationHandler
from torch.utils.data import DistributedSampler

from samda.errors import UsageError
from samda.processes import rank_and_world
from samda.training.pace import Pace

logger = logging.getLogger(__name__)


class SliceSampler(DistributedSampler):
    """Every slice with foreground once, and so many without that they make up `empty_share` of the epoch, in [0, 1).

    Slices that are `late`, (N,) bool, take part after :meth:`join`.

    Empty slices are many and alike; at least one is drawn where there is any, at most all. It yields (epoch, index), so
    a data set can derive the augmentation of a slice from the epoch. Order and choice follow from (seed, epoch) alone;
    MONAI's engines call `set_epoch`. `foreground` is (N,) bool.

    Several processes divide what one would draw: process r of R takes the items r, r + R, ... Where these are not
    equally many, the last is (epoch, None), see :class:`samda.training.ddp.PaddedDataset`.

    After :meth:`start_at` it does not end: one epoch, here a pass, follows on the other without an incomplete batch.
    """

    def __init__(
        self,
        foreground: torch.Tensor,
        empty_share: float = 0.1,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        late: torch.Tensor | None = None,
    ) -> None:
        if not 0 <= empty_share < 1:
            raise UsageError(f"empty_share must lie in [0, 1), got {empty_share}")
        own, world = rank_and_world()
        replicas, rank = num_replicas or world, own if rank is None else rank
        super().__init__(foreground, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.foreground, self.empty_share = foreground, empty_share
        self.late = late is not None and bool(late.any())
        self._choose(torch.ones_like(foreground) if late is None else ~late)
        self._place: int | None = None  # of the stream of passes

    def join(self) -> None:
        """Draw from the late slices, too; to be called between two passes or before :meth:`start_at`."""
        self._choose(torch.ones_like(self.foreground))

    def _choose(self, among: torch.Tensor) -> None:
        self.full = torch.nonzero(self.foreground & among).flatten()
        self.empty = torch.nonzero(~self.foreground & among).flatten()
        wanted = round(len(self.full) * self.empty_share / (1 - self.empty_share))
        self.num_empty = min(len(self.empty), max(1, wanted)) if self.empty_share else 0
        self.num_samples = math.ceil((len(self.full) + self.num_empty) / self.num_replicas)

    def start_at(self, place: int) -> None:
        """Become a stream of passes, from its item `place` on; several processes count their own items."""
        self._place = place

    def __iter__(self) -> Iterator[tuple[int, int | None]]:  # type: ignore[override]
        if self._place is not None:
            return self._stream(self._place * self.num_replicas + self.rank)
        own: list[int | None] = list(self._order(self.epoch)[self.rank :: self.num_replicas])
        own += [None] * (self.num_samples - len(own))
        return iter([(self.epoch, index) for index in own])

    def _stream(self, place: int) -> Iterator[tuple[int, int]]:
        turn, place = divmod(place, len(self.full) + self.num_empty)
        while True:
            order = self._order(turn + 1)
            while place < len(order):
                yield turn + 1, order[place]
                place += self.num_replicas
            turn, place = turn + 1, place - len(order)

    def _order(self, turn: int) -> list[int]:
        """The slices of a pass."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        chosen = self.empty[torch.randperm(len(self.empty), generator=generator)[: self.num_empty]]
        indices = torch.cat([self.full, chosen])
        return indices[torch.randperm(len(indices), generator=generator)].tolist()

    def __len__(self) -> int:
        return self.num_samples


class Validate(ValidationHandler):
    """MONAI's ValidationHandler, until the validation patients train (:class:`JoinValidation`)."""

    def __init__(self, pace: Pace, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.pace = pace

    def __call__(self, engine: Engine) -> None:
        if not self.pace.joined:
            super().__call__(engine)


class JoinValidation:
    """From the share `after` of the training on, the late slices of `sampler` train, too: few labels are not wasted.

    What validated until then estimates the model from below; from then on nothing validates, nothing stops early, and
    the last average is kept. It happens at the end of a round. Attach it behind :class:`RecordEpoch`.

    Args:
        sampler: of the training; without late slices nothing happens.
        pace: the length of the training.
        after: share in (0, 1).
    """

    def __init__(self, sampler: SliceSampler, pace: Pace, after: float = 0.6) -> None:
        self.sampler, self.pace, self.after = sampler, pace, after

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Where a resumed training has come to."""
        if self.pace.joined:
            self.sampler.join()

    def __call__(self, engine: Engine) -> None:
        if self.sampler.late and not self.pace.joined and self.pace.share >= self.after:
            self.pace.joined = True
            self.sampler.join()
            logger.info("the validation patients train from here on")
