# SPDX-License-Identifier: Apache-2.0
"""Which slices train, which are scored, and what an encoder that nobody trains makes of them.

One scan a task; its axial slices are cut into contiguous blocks. Between a block that is scored and the slices that may
train lie slices that do neither, so that no neighbor of a training slice is scored. `n` labeled slices are the first n
of one permutation per seed: two slices hold the one, four the two, and every method sees the same ones. They are drawn
from the slices that hold a class; "all" takes the empty ones as well.

A further block of the chest CT serves the choice of learning rates, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose

from samda.data.transforms import build_augmentation, build_preprocessing
from samda.examples import fetch_examples
from samda.io import cache_dir
from samda.task import Task
from samda.training.datasets import SliceDataset
from samda.training.handlers import CaseDice

__all__ = ["ALL", "TASKS", "Blocks", "Slices", "choose", "fingerprint", "load", "score", "views"]

ALL = 0  # labeled slices: as many as there are
VIEWS = 8  # of each training slice, where slices are encoded once


@dataclasses.dataclass(frozen=True)
class Blocks:
    """(first, end) of the slices that are scored, that choose rates, and how many slices part them from the rest."""

    scan: str
    test: tuple[tuple[int, int], ...]
    choice: tuple[tuple[int, int], ...]
    gap: int


TASKS = {
    "abdomen": Blocks("A", test=((74, 80), (92, 98)), choice=(), gap=2),  # 3 mm a slice
    "chest": Blocks("slicerio", test=((14, 20),), choice=((26, 29),), gap=1),  # 10 mm a slice
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """All slices of a task: `images` (N, 1, H, W) in [0, 1], `labels` (N, 1, H, W), and the indices of each part."""

    task: Task
    images: torch.Tensor
    labels: torch.Tensor
    training: tuple[int, ...]
    test: tuple[int, ...]
    choice: tuple[int, ...]
    augmentation: Compose

    def augmented(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        """The slice in a random view that `seed` alone decides: {"image", "label"}."""
        self.augmentation.set_random_state(seed=seed)
        item = self.augmentation({"image": self.images[index].clone(), "label": self.labels[index].clone()})
        return {"image": item["image"].float(), "label": item["label"].to(torch.uint8)}


def fingerprint(*settings: Any) -> str:
    """Eight digits that change with any of the settings (plain values and dataclasses)."""
    text = json.dumps(settings, default=dataclasses.asdict, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache
def load(name: str) -> Slices:
    """The slices of a task, preprocessed as in a training."""
    blocks = TASKS[name]
    example = fetch_examples()[blocks.scan]
    data = SliceDataset([example.case], build_preprocessing(example.task, labels=True), example.task)
    images, labels = (torch.as_tensor(values[0]).clone() for values in (data.images, data.labels))
    held = [range(*block) for block in blocks.test + blocks.choice]
    near = {i for block in held for i in range(block.start - blocks.gap, block.stop + blocks.gap)}
    return Slices(
        task=example.task,
        images=images.float(),
        labels=labels.to(torch.uint8),
        training=tuple(i for i in range(len(images)) if i not in near),
        test=tuple(i for block in blocks.test for i in range(*block)),
        choice=tuple(i for block in blocks.choice for i in range(*block)),
        augmentation=build_augmentation(example.task),
    )


def choose(slices: Slices, labels: int, seed: int) -> list[int]:
    """The labeled slices: the first `labels` of a permutation of those that hold a class; all of them for ALL."""
    if labels == ALL:
        return list(slices.training)
    filled = [i for i in slices.training if slices.labels[i].any()]
    if not 1 <= labels <= len(filled):
        raise ValueError(f"{labels} labeled slices of {len(filled)}")
    return random.Random(seed).sample(filled, len(filled))[:labels]


@functools.cache
def views(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, views, 256, h, w) and labels (N, views, 1, H, W) of the frozen encoder, kept in the cache folder.

    View 0 is the slice itself. Slices that do not train have only this one; the others of theirs stay zero.
    """
    from samda.networks.segmenter import SamSegmenter

    file = cache_dir() / "evidence" / f"{name}_{fingerprint(TASKS[name], VIEWS)}.pt"
    if file.is_file():
        stored = torch.load(file, weights_only=True, mmap=True)
        return stored["embeddings"], stored["labels"]
    slices = load(name)
    network = SamSegmenter("vit_t", num_classes=slices.task.num_classes, adapters={"head": {}}).eval()
    embeddings = torch.zeros(len(slices.images), VIEWS, 256, *(side // 16 for side in slices.images.shape[2:]))
    labels = torch.zeros(len(slices.images), VIEWS, *slices.labels.shape[1:], dtype=torch.uint8)
    training = set(slices.training)
    with torch.no_grad():
        for i in range(len(slices.images)):
            items = [{"image": slices.images[i], "label": slices.labels[i]}]
            items += [slices.augmented(i, 1000 * i + view) for view in range(1, VIEWS) if i in training]
            embeddings[i, : len(items)] = network.encode(torch.stack([item["image"] for item in items]))
            labels[i, : len(items)] = torch.stack([item["label"] for item in items])
    _keep({"embeddings": embeddings, "labels": labels}, file)
    return embeddings, labels


def _keep(content: dict[str, Any], file: Path) -> None:
    from samda.io import replacing

    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save(content, temporary)


def score(logits: torch.Tensor, labels: torch.Tensor, task: Task) -> dict[str, float | None]:
    """Dice per class, pooled over all slices; logits (N, K, H, W), labels (N, 1, H, W)."""
    metric = CaseDice(task.classes)
    metric.update(logits, labels, [0] * len(labels))
    return {name: None if value is None else round(value, 4) for name, value in metric.per_class().items()}
