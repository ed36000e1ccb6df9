# SPDX-License-Identifier: Apache-2.0
"""samda beside networks that know nothing of SAM, with the same slices of patient A and the same CPU seconds.

samda trains class head and adapters together, from nothing: the adapters at the rates of :mod:`.methods`, the head at
that of the shipped overlay. Where the encoder stays as it is, the encoding of the slices is paid from the same budget.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from samda.networks.segmenter import SamSegmenter
from samda.training.optim import build_optimizer, build_schedule

from . import trial
from .apart import Exam
from .methods import METHODS
from .protocol import VIEWS, choose, load

__all__ = ["BUDGETS", "RIVALS", "SEEDS", "compete"]

BUDGETS = (600, 120)  # CPU seconds of one training; the one in which networks from scratch learn anything first
SEEDS = (0, 1, 2)
# the most telling ones first
RIVALS = ("sam_da", "nnunet", "dynunet", "full", "nnunet_unmirrored", "salt+dka+sam_da", "decoder", "lora")
HEAD_RATES = {"full": 1e-3}  # of the shipped overlay; 0.01 otherwise
PEFT_STEPS = 20
TICKS = 1000  # of the schedule


def compete(rival: str, labels: int, seed: int, budget: int) -> dict[str, Any]:
    """Train for `budget` CPU seconds and score: {"dice": mean, "classes", "steps", "parameters", "seconds"}."""
    slices = load("abdomen")
    chosen, scored = choose(slices, labels, seed), list(slices.test)
    exam = Exam(slices.images, slices.labels, chosen, scored, slices.task.num_classes)
    if rival == "peft":
        from .peft_lora import compare

        return compare(exam, PEFT_STEPS, seed)
    if rival in METHODS:
        return _samda(rival, labels, seed, budget)
    if rival == "dynunet":
        from .dynunet import train_dynunet

        row = train_dynunet(exam, budget, seed, slices.augmentation)
    else:
        from .nnunet import train_nnunet

        row = train_nnunet(exam, budget, seed, mirroring=rival == "nnunet")
        if row["status"] == "not run":
            return row
    names = slices.task.classes[1:]
    return {
        "dice": round(row["mean"], 4),
        "classes": dict(zip(names, row["dice"], strict=True)),
        "steps": row["steps"],
        "parameters": row["parameters"],
        "seconds": row["cpu_seconds"],
    }


def _samda(name: str, labels: int, seed: int, budget: int) -> dict[str, Any]:
    slices, method = load("abdomen"), METHODS[name]
    network = SamSegmenter("vit_t", num_classes=slices.task.num_classes, adapters=trial.seeded(method, seed))
    start = time.process_time()
    draw = trial.images(slices, labels, seed) if method.encoder else _encoded(network, labels, seed)
    rates = {"adapters": method.rate, "head": HEAD_RATES.get(name, trial.HEAD_RATE), "base": method.rate}
    optimizer = build_optimizer(network, rates, weight_decay=0.01)
    schedule = build_schedule(optimizer, 1, TICKS)
    criterion = trial.build_loss()
    network.train()
    steps = 0
    while (spent := time.process_time() - start) < budget:
        while schedule.last_epoch < TICKS * spent / budget:
            schedule.step()
        inputs, maps, embedded = draw(steps)
        criterion(network(inputs, embedded=embedded), maps).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    network.eval()
    classes = trial.scored(network, slices, slices.test)
    return {
        "dice": trial.mean(classes),
        "classes": classes,
        "steps": steps,
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "seconds": round(spent, 1),
    }


def _encoded(network: SamSegmenter, labels: int, seed: int) -> trial.Draw:
    """Batches of embeddings in random views, encoded here and now."""
    slices = load("abdomen")
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        for index in choose(slices, labels, seed):
            items = [{"image": slices.images[index], "label": slices.labels[index]}]
            items += [slices.augmented(index, 1000 * index + view) for view in range(1, VIEWS)]
            maps = torch.stack([item["label"] for item in items])
            found[index] = network.encode(torch.stack([item["image"] for item in items])), maps
    steps, dice = trial.order(slices, labels, seed, salt=1), random.Random(seed)

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        places = [(index, dice.randrange(VIEWS)) for index in next(steps)]
        embeddings, maps = (torch.stack([found[i][part][view] for i, view in places]) for part in (0, 1))
        return embeddings, maps, True

    return draw
