# SPDX-License-Identifier: Apache-2.0
"""A training of a few steps in double precision with the parts of multi_gpu_train.json, by one process or by several.

torchrun --nproc_per_node=2 double_precision.py RESULT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from samda.processes import is_main, join, launched, leave
from samda.training import (
    DiceCELoss,
    PaddedDataset,
    PenalizedLoss,
    SliceSampler,
    WholeBatchLoss,
    batch_share,
    distribute,
)

SLICES, BATCH, EPOCHS = 13, 4, 3  # the last batch of an epoch is not full


class Slices(Dataset):
    """Random images with labels that follow from them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(SLICES, 1, 8, 8, generator=generator, dtype=torch.float64)

    def signature(self) -> list[int]:
        """As of a SliceDataset."""
        return [1, SLICES, 0]

    def __len__(self) -> int:
        return SLICES

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        image = self.images[key[1]]
        return {"image": image, "label": (image > -0.5).to(torch.uint8) + (image > 0.5).to(torch.uint8)}


def steps() -> dict[str, torch.Tensor]:
    """The losses of all steps, and the parameters after the last one."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(6, 3, 1)]
    network = torch.nn.Sequential(*layers).double()
    sampler = SliceSampler(torch.ones(SLICES, dtype=torch.bool), 0.0)
    loader = DataLoader(PaddedDataset(Slices()), batch_share(BATCH), sampler=sampler)
    whole = WholeBatchLoss(DiceCELoss(to_onehot_y=True, softmax=True, batch=True))
    loss = PenalizedLoss(whole, network)
    trained = distribute(network) if launched()[1] > 1 else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            value = loss(trained(batch["image"]), batch["label"])
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    return {"losses": torch.stack(losses)} | {key: value.detach() for key, value in network.state_dict().items()}


if __name__ == "__main__":
    join("cpu")
    found = steps()
    if is_main():
        torch.save(found, Path(sys.argv[1]))
    leave()
