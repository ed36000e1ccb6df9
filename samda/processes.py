# SPDX-License-Identifier: Apache-2.0
"""One job on several processes: which of them this is, its share of the cases, and how they exchange values.

Processes that `torchrun` started are connected by :func:`join`: a training exchanges gradients. Cases of a prediction
or an adaptation are independent: each process takes its :class:`Shard` of them, under torchrun or in a job array.
Connected processes wait for one another at the end, because torchrun ends all when one fails.

torch is imported within the functions: the command line asks this module who it is before it needs torch. Values of any
type are exchanged, which ignite.distributed does for some types only.
"""

from __future__ import annotations

import atexit
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

CASES_TIMEOUT = datetime.timedelta(days=14)  # of processes that share cases: as long as a scheduler lets them run
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by torchrun


@dataclasses.dataclass(frozen=True)
class Shard:
    """Cases index - 1, index - 1 + count, ... of a list; `index` counts from 1. All `count` shards are the list."""

    index: int
    count: int

    def of(self, cases: Sequence[T]) -> list[T]:
        """The cases of this shard; empty where there are more shards than cases."""
        return list(cases[self.index - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def read_part(text: str | None = None) -> Shard | None:
    """The shard of this process: `text` ("2/8" is the second of eight), or with None its own under torchrun.

    None where the process does everything. Under torchrun a text is refused: all processes would do the same.
    """
    rank, world = launched()
    if text is None:
        return Shard(rank + 1, world) if world > 1 else None
    if world > 1:
        raise UsageError(f"part {text!r} was given to processes of torchrun, which share the cases; leave it out")
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"part {text!r} must be INDEX/COUNT with an index from 1 to COUNT, for instance 2/8")
    return Shard(int(match[1]), int(match[2]))


def launched() -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, connected or not; (0, 1) without torchrun."""
    ranks = _ranks()
    return (0, 1) if ranks is None else ranks[:2]


def local_device() -> torch.device:
    """The device of a process of torchrun: a GPU of its own, or the CPU where the machine has no GPU."""
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
    """Connect the processes that torchrun started: NCCL between GPUs, gloo between CPUs.

    The connection ends with :func:`leave` or, after an error, with the process.

    Args:
        device: of this process.
        rank_zero_only: only the first process logs, for all do the same.
        timeout: how long a process waits for the others before it fails.
    """
    import torch
    import torch.distributed as dist

    _require_torchrun()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        atexit.register(leave, wait=False)
    if rank_zero_only and not is_main():
        logging.getLogger("samda").setLevel(logging.ERROR)


def join_for_cases() -> None:
    """Connect processes of torchrun that share the cases of a job; without torchrun, do nothing."""
    if launched()[1] > 1:
        join("cpu", rank_zero_only=False, timeout=CASES_TIMEOUT)


def leave(wait: bool = True) -> None:
    """End the connection, if there is one; with `wait` once every process has come this far."""
    if _connected():
        import torch.distributed as dist

        if wait:
            exchange(None)  # no process leaves while the first still writes
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Rank and number of the connected processes; (0, 1) without a connection."""
    if not _connected():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def is_main() -> bool:
    """Is this the process that writes files and reports?"""
    return rank_and_world()[0] == 0


def exchange(value: T) -> list[T]:
    """The values of all connected processes, in the order of their ranks; every process has to call it."""
    if not _connected():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The value of the first process; every process has to call it."""
    if not _connected():
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _connected() -> bool:
    if "torch" not in sys.modules:  # then nothing can be connected, and asking costs no import
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
    """Rank, number of processes and rank on this machine, as torchrun sets them; None without torchrun."""
    values = [os.environ.get(name, "") for name in VARIABLES]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(value.isdecimal() for value in values):
        return None
    rank, world, local = map(int, values)
    return rank, world, local
