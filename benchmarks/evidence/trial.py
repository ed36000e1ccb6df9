# SPDX-License-Identifier: Apache-2.0
"""One run: the class head on labeled slices, then a method on top of it, then Dice on the slices that are scored.

Both stages take AdamW, Dice + cross-entropy, half a cosine, the last weights; nothing is chosen by looking at scores.
The head comes first for everybody, on embeddings that are computed once: a method that adds nothing to it goes on from
a head that is trained, and what a method adds or spoils is its own doing. The same seed means the same slices, the
same head and the same order for every method.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from monai.losses import DiceCELoss

from samda.io import cache_dir, replacing
from samda.networks.segmenter import SamSegmenter
from samda.training.optim import build_optimizer, build_schedule

from .methods import Method
from .protocol import TASKS, VIEWS, Slices, choose, fingerprint, load, score, views

__all__ = [
    "BATCH",
    "HEAD_STEPS",
    "STEPS",
    "Draw",
    "build_loss",
    "images",
    "mean",
    "order",
    "run",
    "scored",
    "seeded",
    "setup",
]

Draw = Callable[[int], tuple[torch.Tensor, torch.Tensor, bool]]  # step -> inputs, labels, are they embeddings?

BATCH = 4
HEAD_STEPS, HEAD_RATE = 400, 0.01  # the rate of train.json
STEPS, LATER_HEAD_RATE = 80, 1e-3


def run(task: str, method: Method, labels: int, seed: int, part: str = "test") -> tuple[dict[str, Any], SamSegmenter]:
    """Train and score.

    Args:
        task: of :data:`protocol.TASKS`.
        method: what is trained in the second stage.
        labels: labeled slices; 0 for all.
        seed: of slices, order and views, and of the adapters' initialization.
        part: "test", or "choice" for the slices that choose rates.

    Returns:
        {"dice": mean, "classes": Dice per class, "head_dice": mean after the first stage, "parameters": trained in the
        second stage without the head, "seconds": CPU seconds of the second stage, "megabytes": of those parameters};
        and the trained network.
    """
    slices = load(task)
    chosen, frozen = getattr(slices, part), views(task)[0][:, 0]
    network = SamSegmenter("vit_t", num_classes=slices.task.num_classes, adapters=seeded(method, seed))
    network.load_state_dict(_head(task, labels, seed), strict=False)
    head = mean(scored(network, slices, chosen, frozen))
    draw = images(slices, labels, seed) if method.encoder else _embeddings(task, labels, seed, salt=1)
    start = time.process_time()
    _fit(network, draw, STEPS, method.rate, LATER_HEAD_RATE)
    seconds = time.process_time() - start
    classes = scored(network, slices, chosen, None if method.encoder else frozen)
    own = [name for name, p in network.named_parameters() if p.requires_grad and name not in network.head_params()]
    count = sum(network.get_parameter(name).numel() for name in own)
    return {
        "dice": mean(classes),
        "classes": classes,
        "head_dice": head,
        "parameters": count,
        "seconds": round(seconds, 1),
        "megabytes": round(4 * count / 1e6, 3),
    }, network


def setup(task: str, method: Method) -> str:
    """Changes with everything that was set for a run, so that rows of another protocol are not taken for this one's."""
    return fingerprint(_head_setup(task), STEPS, LATER_HEAD_RATE, method)


def _head_setup(task: str) -> str:
    return fingerprint(TASKS[task], VIEWS, BATCH, HEAD_STEPS, HEAD_RATE)


def seeded(method: Method, seed: int) -> dict[str, dict[str, Any]]:
    """The adapters' settings with the seed of the run where they draw random numbers."""
    plain = ("head", "decoder", "full")
    return {name: dict(s) if name in plain else {**s, "seed": seed} for name, s in method.adapters.items()}


def _head(task: str, labels: int, seed: int) -> dict[str, torch.Tensor]:
    """The class head after its own training, kept in the cache folder."""
    file = cache_dir() / "evidence" / f"head_{task}_{labels}_{seed}_{_head_setup(task)}.pt"
    if file.is_file():
        return torch.load(file, weights_only=True)
    network = SamSegmenter("vit_t", num_classes=load(task).task.num_classes, adapters={"head": {}})
    _fit(network, _embeddings(task, labels, seed, salt=0), HEAD_STEPS, HEAD_RATE, HEAD_RATE)
    state = {name: network.get_parameter(name).detach().clone() for name in network.head_params()}
    with replacing(file) as temporary:
        torch.save(state, temporary)
    return state


def build_loss() -> DiceCELoss:
    """Dice + cross-entropy with the settings of train.json."""
    return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)


def _fit(network: SamSegmenter, draw: Draw, steps: int, rate: float, head_rate: float) -> None:
    rates = {"adapters": rate, "head": head_rate, "base": rate}
    optimizer = build_optimizer(network, rates, weight_decay=0.01)
    schedule = build_schedule(optimizer, 1, steps)
    criterion = build_loss()
    network.train()
    for step in range(steps):
        inputs, labels, embedded = draw(step)
        criterion(network(inputs, embedded=embedded), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval()


def order(slices: Slices, labels: int, seed: int, salt: int) -> Iterator[list[int]]:
    """The slices of each step, from shuffled decks; where there are empty slices, one card in ten is one."""
    chosen = choose(slices, labels, seed)
    filled = [i for i in chosen if slices.labels[i].any()]
    empty = [i for i in chosen if not slices.labels[i].any()]
    dice = random.Random(1000 * seed + salt)
    deck: list[int] = []
    while True:
        while len(deck) < BATCH:
            cards = filled + dice.sample(empty, min(len(empty), len(filled) // 9))
            dice.shuffle(cards)
            deck += cards
        yield deck[:BATCH]
        del deck[:BATCH]


def _embeddings(task: str, labels: int, seed: int, salt: int) -> Draw:
    embeddings, maps = views(task)
    steps, dice = order(load(task), labels, seed, salt), random.Random(seed)

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        places = [(i, dice.randrange(VIEWS)) for i in next(steps)]
        return torch.stack([embeddings[p] for p in places]), torch.stack([maps[p] for p in places]), True

    return draw


def images(slices: Slices, labels: int, seed: int) -> Draw:
    """Batches of images, augmented anew in every step."""
    steps = order(slices, labels, seed, salt=1)

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        first = 1_000_000 * seed + 1000 * step
        items = [slices.augmented(index, first + place) for place, index in enumerate(next(steps))]
        return torch.stack([item["image"] for item in items]), torch.stack([item["label"] for item in items]), False

    return draw


def scored(
    network: SamSegmenter, slices: Slices, chosen: Sequence[int], embeddings: torch.Tensor | None = None
) -> dict[str, float | None]:
    """Dice per class on some slices; from their `embeddings` (N, 256, h, w) where the encoder is the frozen one."""
    inputs = slices.images if embeddings is None else embeddings
    with torch.no_grad():
        logits = torch.cat([network(inputs[i : i + 1], embedded=embeddings is not None) for i in chosen])
    return score(logits, slices.labels[list(chosen)], slices.task)


def mean(classes: dict[str, float | None]) -> float:
    """Over the classes that occur."""
    values = [value for value in classes.values() if value is not None]
    return round(sum(values) / len(values), 4)
