# SPDX-License-Identifier: Apache-2.0
"""MONAI's DynUNet from scratch, laid out and trained as nnU-Net does in 2D (Isensee et al., Nature Methods 2021).

From nnU-Net: the plan of the levels, instance norm, deep supervision, Dice + cross-entropy, SGD with Nesterov momentum
0.99 and decay 3e-5, a rate of 0.01 that falls polynomially, gradients clipped at 12, and a third of each batch, at
least a slice, that must show a class, each class as often as the others. From samda: the augmentation and the slices.
The budget is CPU time, so the rate follows the share of it that is spent: at the end it is 0, however many steps this
machine made.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from monai.networks.nets import DynUNet

from samda.embeddings import draw

from .apart import Exam
from .trial import build_loss

__all__ = ["SupervisedHeads", "batches", "build_dynunet", "plan", "rate", "train_dynunet"]

SMALLEST = 4  # pixels of the deepest level, as nnU-Net plans
FORCED = 0.33  # of a batch
FEATURES = (32, 512)  # of the first level; at most


def plan(image_size: int) -> dict[str, list[int]]:
    """Kernels, strides and features of the levels: halved while the side stays even and at least 4 pixels.

    256 pixels give 7 levels of 32, 64, 128, 256, 512, 512, 512 features.
    """
    strides, side = [1], image_size
    while side % 2 == 0 and side // 2 >= SMALLEST:
        strides, side = [*strides, 2], side // 2
    features = [min(FEATURES[0] * 2**level, FEATURES[1]) for level in range(len(strides))]
    return {"kernel_size": [3] * len(strides), "strides": strides, "filters": features}


def rate(spent: float, start: float = 0.01, power: float = 0.9) -> float:
    """nnU-Net's learning rate, start (1 - spent)^power, after the share `spent` of the training."""
    return start * (1 - min(1.0, spent)) ** power


def build_dynunet(image_size: int, num_classes: int) -> DynUNet:
    """The network; in training it gives the logits of all supervised levels, (B, L, K, H, W)."""
    levels = plan(image_size)
    return DynUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=num_classes,
        upsample_kernel_size=levels["strides"][1:],
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=True,
        deep_supr_num=max(1, len(levels["strides"]) - 3),  # the two deepest are not supervised, as in nnU-Net
        **levels,
    )


class SupervisedHeads(nn.Module):
    """Dice + cross-entropy of every supervised level, weighted 1, 1/2, 1/4, ... and divided by their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = build_loss()

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """(B, L, K, H, W) and (B, 1, H, W) -> a number."""
        weights = [0.5**level for level in range(logits.shape[1])]
        losses = [self.loss(level, label) for level in logits.unbind(1)]
        return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)  # type: ignore[return-value]


def batches(exam: Exam, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Slices of each step, drawn with replacement; a third of them, at least one, show a class that is drawn first."""
    dice = random.Random(seed)
    showing = {k: [i for i in exam.train if (exam.labels[i] == k).any()] for k in range(1, exam.num_classes)}
    classes = [k for k, slices in showing.items() if slices]
    forced = max(1, batch_size - round(batch_size * (1 - FORCED))) if classes else 0
    while True:
        anywhere = [dice.choice(exam.train) for _ in range(batch_size - forced)]
        yield anywhere + [dice.choice(showing[dice.choice(classes)]) for _ in range(forced)]


def train_dynunet(
    exam: Exam,
    cpu_seconds: float,
    seed: int,
    augmentation: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    batch_size: int = 2,
) -> dict[str, Any]:
    """Train on some slices until the CPU time is spent, on one thread; score others.

    Args:
        exam: the slices, as high as wide.
        cpu_seconds: CPU time of the training; augmentation counts, the scoring does not.
        seed: of the weights, the batches and the augmentation.
        augmentation: of {"image": (1, H, W), "label": (1, H, W)}, as `samda.data.transforms.build_augmentation`
            builds it; None trains on the slices as they are.
        batch_size: slices of a step, see :func:`batches`; 2 is what nnU-Net plans for few slices.

    Returns:
        {"dice": per foreground class, "mean", "steps", "parameters", "batch_size", "cpu_seconds"}
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_dynunet(exam.images.shape[-1], exam.num_classes)
        steps, spent = _train(network, exam, cpu_seconds, seed, augmentation, batch_size)
        predicted = _predict(network, exam.images[exam.test])
    finally:
        torch.set_num_threads(threads)
    return exam.scores(predicted) | {
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch_size": batch_size,
        "cpu_seconds": round(spent, 1),
    }


def _train(
    network: nn.Module,
    exam: Exam,
    cpu_seconds: float,
    seed: int,
    augmentation: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None,
    batch_size: int,
) -> tuple[int, float]:
    """Steps made and CPU seconds spent."""
    loss = SupervisedHeads()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate(0), momentum=0.99, nesterov=True, weight_decay=3e-5)
    chosen = batches(exam, batch_size, seed)
    network.train()
    steps, start = 0, time.process_time()
    while (spent := time.process_time() - start) < cpu_seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate(spent / cpu_seconds)
        items = [{"image": exam.images[i].clone(), "label": exam.labels[i].clone()} for i in next(chosen)]
        if augmentation is not None:
            for position, item in enumerate(items):
                augmentation.set_random_state(seed=draw(seed, "augment", steps, position))  # type: ignore[attr-defined]
                items[position] = augmentation(item)
        optimizer.zero_grad(set_to_none=True)
        value = loss(
            network(torch.stack([item["image"] for item in items])), torch.stack([item["label"] for item in items])
        )
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        steps += 1
    return steps, spent


@torch.no_grad()
def _predict(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) -> (N, H, W) class indices."""
    network.eval()
    return torch.cat([network(part).argmax(1) for part in images.split(4)])
