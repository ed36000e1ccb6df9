# SPDX-License-Identifier: Apache-2.0
"""One job on several processes: who this process is, its share of the cases, and what processes tell one another.

Two ways to be several. Processes that `torchrun` started are connected by :func:`join`: a training exchanges gradients.
Cases of a prediction or an adaptation are independent, so each process does its :class:`Part` of them, whether torchrun
started it or a job array; connected ones wait for one another at the end, because torchrun ends all when one fails.
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

DAYS_H = 14 * 24.0  # how long processes wait for one another that share cases: as long as a scheduler lets them run
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun tells each process


@dataclasses.dataclass(frozen=True)
class Part:
    """Part `index` of `count`: cases index - 1, index - 1 + count, ... of a list. All parts together are the list.

    Attributes:
        index: from 1.
        count: number of parts.
    """

    index: int
    count: int

    def of(self, cases: Sequence[T]) -> list[T]:
        """The cases of this part; empty where there are more parts than cases."""
        return list(cases[self.index - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def read_part(text: str | None = None) -> Part | None:
    """The part that this process does: that of `text`, or its own among those that torchrun started.

    Args:
        text: "2/8" is the second of eight; None asks torchrun's variables.

    Returns:
        None where the process does everything.

    Raises:
        UsageError: a text that is no part, or one that is given under torchrun, where all processes would do the same.
    """
    rank, world = launched()
    if text is None:
        return Part(rank + 1, world) if world > 1 else None
    if world > 1:
        raise UsageError(f"part {text!r} was given to processes of torchrun, which share the cases; leave it out")
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"part {text!r} must be INDEX/COUNT with an index from 1 to COUNT, for instance 2/8")
    return Part(int(match[1]), int(match[2]))


def launched() -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, connected or not; (0, 1) without torchrun."""
    ranks = _ranks()
    return (0, 1) if ranks is None else ranks[:2]


def local_device() -> torch.device:
    """The device of this process: a GPU of its own among those of the machine, or the CPU where there is none.

    Raises:
        UsageError: the process was not started by torchrun, or the machine has fewer GPUs than processes.
    """
    import torch

    ranks = _require_torchrun()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks[2] >= torch.cuda.device_count():
        raise UsageError(
            f"process {ranks[2] + 1} of this machine has no GPU ({torch.cuda.device_count()} found); start as many "
            f"processes a machine with --nproc_per_node={torch.cuda.device_count()}"
        )
    return torch.device("cuda", ranks[2])


def join(device: torch.device | str, one_voice: bool = True, patience_h: float = 0.5) -> None:
    """Connect the processes that torchrun started: NCCL between GPUs, gloo between CPUs.

    The connection ends with :func:`leave` or, after an error, with the process.

    Args:
        device: of this process.
        one_voice: all do the same, so only the first process reports.
        patience_h: hours that a process waits for another before it takes it for lost.

    Raises:
        UsageError: the process was not started by torchrun.
    """
    import torch
    import torch.distributed as dist

    _require_torchrun()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        patience = datetime.timedelta(hours=patience_h)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        atexit.register(_disconnect)
    if one_voice and not is_main():
        logging.getLogger("samda").setLevel(logging.ERROR)


def join_for_cases() -> None:
    """Connect processes of torchrun that share the cases of a job; without torchrun, nothing."""
    if launched()[1] > 1:
        join("cpu", one_voice=False, patience_h=DAYS_H)


def leave(wait: bool = True) -> None:
    """End the connection, once every process has come so far if `wait`; without one, nothing."""
    import torch.distributed as dist

    if _connected():
        if wait:
            exchange(None)  # no process leaves while the first still writes
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank and number of the connected processes; (0, 1) without a connection."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if _connected() else (0, 1)


def is_main() -> bool:
    """Is this the process that writes files and reports?"""
    return place()[0] == 0


def exchange(value: T) -> list[T]:
    """The values of all connected processes, in the order of their ranks; every process has to call it."""
    import torch.distributed as dist

    if not _connected():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The value of the first process; every process has to call it."""
    import torch.distributed as dist

    if not _connected():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _connected() -> bool:
    if "torch" not in sys.modules:  # then nothing can be connected, and asking costs no import
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _disconnect() -> None:
    """At the end of a process that did not get as far as :func:`leave`: nobody is waited for."""
    import torch.distributed as dist

    if _connected():
        dist.destroy_process_group()


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
