# SPDX-License-Identifier: Apache-2.0
"""Training on several processes such that it is the training of one: the same batches, loss, curve and model.

What multi_gpu_train.json puts around the parts of train.json. A batch is drawn as one process draws it, and each
process runs the network on its share. Dice over a batch is not the mean over shares, so the loss is taken of the whole
batch: every process gets the logits of all, and returns the gradient of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler

from samda.errors import InputError, UsageError
from samda.processes import exchange, rank_and_world

PADDING = -1  # label of an item that is there only so that every process takes part in a step


def batch_share(batch_size: int) -> int:
    """Items of a batch that one process takes; a batch that does not divide evenly is refused."""
    _, world = rank_and_world()
    if batch_size % world:
        raise UsageError(
            f"batch_size {batch_size} cannot be dealt out to {world} processes; choose a multiple of {world}"
        )
    return batch_size // world


def distribute(network: nn.Module) -> DistributedDataParallel:
    """`network` for the training engine: its gradients are the mean over the processes, its start that of the first.

    Parameters may stay unused in a step (an idle adapter, parts of the decoder under a baseline). The frozen base is
    the same everywhere, so its buffers are not sent again.
    """
    device = next(network.parameters()).device
    devices = [device] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.14
    options: dict[str, Any] = {"find_unused_parameters": True, buffers: False}
    return DistributedDataParallel(network, devices, **options)


class PaddedDataset(Dataset):
    """The items of `dataset`, and for the keys (epoch, None) of a sampler an item whose label is -1 everywhere.

    An epoch rarely ends with a full batch; the padding lets all processes take the last step together, and
    :class:`WholeBatchLoss` leaves it out. Processes that do not read the same data are refused.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        rank, _ = rank_and_world()
        signatures = exchange(dataset.signature())
        if signatures[rank] != signatures[0]:
            raise InputError(
                f"process {rank} reads other training data than process 0 (cases, slices, checksum {signatures[rank]}, "
                f"there {signatures[0]}); give all machines the same data set"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int | None]) -> dict[str, Any]:
        epoch, index = key
        item = dict(self.dataset[epoch, 0 if index is None else index])
        label = item["label"].int()  # bytes have no room for -1, and nothing smaller is exchanged
        item["label"] = torch.full_like(label, PADDING) if index is None else label
        return item


class RankSampler(Sampler[int]):
    """Every R-th item, from the rank of this process among R on: all processes together see each item once.

    Fewer items than processes are refused.
    """

    def __init__(self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None) -> None:
        own, connected = rank_and_world()
        world, rank = num_replicas or connected, own if rank is None else rank
        if world > len(dataset):
            raise UsageError(
                f"{len(dataset)} validation slices are too few for {world} processes; start {len(dataset)} or fewer"
            )
        self.indices = range(rank, len(dataset), world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class WholeBatchLoss(nn.Module):
    """A loss of the whole batch, computed by every process from the logits of all.

    With the logits z_r of process r and L = loss(z_1, ..., z_R), the gradient for its parameters is
    sum_r (dz_r / dtheta)^T dL / dz_r. DDP takes the mean of what the processes contribute, so each contributes
    R (dz_r / dtheta)^T dL / dz_r: the gradient that arrives at its logits is multiplied by R.

    `loss` takes (B, K, H, W) logits and (B, 1, H, W) labels.
    """

    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The loss of all items but the padding; the same number on every process."""
        rank, world = rank_and_world()
        parts, labels = _gather(logits.detach(), world), _gather(label, world)
        parts[rank] = _scale_gradient(logits, world)
        # item j of process r is item j R + r of the batch, as one process would have drawn it
        whole, wanted = torch.stack(parts, 1).flatten(0, 1), torch.stack(labels, 1).flatten(0, 1)
        real = wanted.flatten(1)[:, 0] != PADDING
        return self.loss(whole[real], wanted[real])


def _gather(tensor: torch.Tensor, world: int) -> list[torch.Tensor]:
    """The tensors of all processes; they have one shape."""
    if world == 1:
        return [tensor]
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor)
    return parts


def _scale_gradient(tensor: torch.Tensor, factor: int) -> torch.Tensor:
    """`tensor` itself, through which the gradient passes `factor` times as large."""
    result = tensor.view_as(tensor)
    if result.requires_grad:
        result.register_hook(lambda gradient: gradient * factor)
    return result
