# SPDX-License-Identifier: Apache-2.0
"""Distributed processes: rank and number, share of the cases, exchange of values.

Processes of `torchrun` are connected by :func:`join`; a training exchanges gradients. Cases of a prediction or an
adaptation are independent: each process takes its :class:`Shard`, under torchrun or in a job array. Connected processes
wait for each other at the end, because torchrun ends all when one fails. torch is imported inside functions, because
the command line uses this module before torch. Values of any type are exchanged; ignite.distributed supports only some.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import datetime
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from samda.errors import UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_values: Any = None  # the group of gloo that exchanges values; None is the default one, which gradients have

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt in malloc.h of the GNU C library
REUSED = 32 * 2**20  # bytes; the largest blocks that mallopt lets a process keep

CASES_TIMEOUT = datetime.timedelta(days=14)  # of processes that share cases; in practice the limit of the scheduler
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by torchrun


@dataclasses.dataclass(frozen=True)
class Shard:
    """Cases index - 1, index - 1 + count, ... of a list; `index` counts from 1. All `count` shards are the list."""

    index: int
    count: int

    def of(self, cases: Sequence[T]) -> list[T]:
        """The cases of this shard; empty if there are more shards than cases."""
        return list(cases[self.index - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def keep_freed_memory() -> None:
    """Let this process use freed blocks of up to 32 MiB again instead of returning them; on Linux with glibc.

    Maps of a network are allocated anew in every call, and the system hands out new pages slowly: encoding takes a
    tenth less time. What a process needs at most stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, REUSED)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def read_part(text: str | None = None) -> Shard | None:
    """The shard of this process: from `text` ("2/8"), or under torchrun from its rank; None for a single process.

    Under torchrun, `text` is refused, because all processes would have the same shard.
    """
    rank, world = launched()
    if text is None:
        return Shard(rank + 1, world) if world > 1 else None
    if world > 1:
        raise UsageError(f"part {text!r} cannot be combined with torchrun, which distributes the cases; leave it out")
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"part {text!r} must be INDEX/COUNT with an index from 1 to COUNT, for example 2/8")
    return Shard(int(match[1]), int(match[2]))


def launched() -> tuple[int, int]:
    """Rank and number of processes of torchrun, connected or not; (0, 1) without torchrun."""
    ranks = _ranks()
    return (0, 1) if ranks is None else ranks[:2]


def local_device() -> torch.device:
    """The device of a process of torchrun: its own GPU, or the CPU on machines without GPU."""
    import torch

    _, _, local = _require_torchrun()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local + 1} of this machine has no GPU ({torch.cuda.device_count()} found); start as many "
            f"processes per machine with --nproc_per_node={torch.cuda.device_count()}"
        )
    return torch.device("cuda", local)


def join(
    device: torch.device | str,
    rank_zero_only: bool = True,
    timeout: datetime.timedelta = datetime.timedelta(minutes=30),
) -> None:
    """Connect the processes of torchrun (NCCL on GPUs, gloo on CPUs) until :func:`leave`.

    With `rank_zero_only`, only the main process logs. `timeout` is that of collectives. With gloo, values are exchanged
    by a group of their own. :func:`leave` ends its threads, which hold tensors of Python a moment longer than the call
    and would abort an interpreter that already ends; the default group lives as long as the module of a training.
    """
    import torch
    import torch.distributed as dist

    global _values
    _require_torchrun()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        if device.type != "cuda":
            _values = dist.new_group(timeout=timeout)
        atexit.register(leave, wait=False)
    if rank_zero_only and not is_main():
        logging.getLogger("samda").setLevel(logging.ERROR)


def join_for_cases() -> None:
    """Connect processes of torchrun that share cases; does nothing without torchrun."""
    if launched()[1] > 1:
        join("cpu", rank_zero_only=False, timeout=CASES_TIMEOUT)


def leave(wait: bool = True) -> None:
    """End the connection, if any; with `wait`, after all processes have reached this point."""
    if _connected():
        import torch.distributed as dist

        global _values
        if wait:
            exchange(None)  # wait for the main process, which may still write
        if _values is not None:
            dist.destroy_process_group(_values)
            _values = None
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Rank and number of the connected processes; (0, 1) without a connection."""
    if not _connected():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def is_main() -> bool:
    """Is this the main process, which writes files and reports?"""
    return rank_and_world()[0] == 0


def exchange(value: T) -> list[T]:
    """The values of all connected processes by rank; every process must call it."""
    if not _connected():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_values)
    return values


def broadcast(value: T) -> T:
    """The value of the main process; every process must call it."""
    if not _connected():
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, group=_values)
    return values[0]


def _connected() -> bool:
    if "torch" not in sys.modules:  # then nothing is connected; avoids the import
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _require_torchrun() -> tuple[int, int, int]:
    ranks = _ranks()
    if ranks is None:
        raise UsageError(
            "this config is for several processes; start it with torchrun --nproc_per_node=GPUS -m monai.bundle run ..."
        )
    return ranks


def _ranks() -> tuple[int, int, int] | None:
    """Rank, number of processes and local rank of torchrun; None without torchrun."""
    values = [os.environ.get(name, "") for name in VARIABLES]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(value.isdecimal() for value in values):
        return None
    rank, world, local = map(int, values)
    return rank, world, local
