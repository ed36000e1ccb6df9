# SPDX-License-Identifier: Apache-2.0
"""What is measured: the runs of each part, each a dict of what tells it from others, and how one of them is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .methods import ABLATIONS, ENCODER, FROZEN, METHODS, Method

__all__ = ["PARTS", "RESULTS", "measure", "planned", "results_file"]

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
COUNTS = (1, 2, 4, 8, 16, 0)  # labelled slices; 0: all
ENCODER_COUNTS = (8, 2, 0)
SEEDS, ENCODER_SEEDS = 5, 3  # from 0; the second where the encoder trains
CHEST = ("lora", "salt", "dka", "full")  # of the methods that train the encoder
RATES = (1e-3, 3e-3)
RATED = ("lora", "salt", "dka", "full")
RATES_SEED = 90  # no other run has it

Run = dict[str, Any]


def planned(part: str) -> list[Run]:
    """The runs of a part, the most telling ones first."""
    return PARTS[part]()


def _rates() -> list[Run]:
    return [
        {"task": "chest", "method": method, "labels": 8, "seed": RATES_SEED, "rate": rate * scale}
        for method in RATED
        for scale in (0.1 if method == "full" else 1.0,)
        for rate in RATES
    ]


def _frozen(task: str) -> list[Run]:
    return [
        {"task": task, "method": method, "labels": labels, "seed": seed}
        for seed in range(SEEDS)
        for method in FROZEN
        for labels in COUNTS  # innermost: neighboring runs, at work at the same time, do not train the same head twice
    ]


def _encoder(task: str, methods: tuple[str, ...]) -> list[Run]:
    return [
        {"task": task, "method": method, "labels": labels, "seed": seed}
        for seed in range(ENCODER_SEEDS)
        for labels in ENCODER_COUNTS
        for method in methods
    ]


def _ablations() -> list[Run]:
    """Those that no other part has, on eight slices of the abdomen."""
    return [
        {"task": "abdomen", "ablation": ablation, "row": row, "labels": 8, "seed": seed}
        for seed in range(ENCODER_SEEDS)
        for ablation, rows in ABLATIONS.items()
        for row, method in rows.items()
        if method not in METHODS.values()
    ]


def _fields() -> list[Run]:
    """What the first seed learned from all slices; ViT-B with random weights."""
    from .fields import RANDOM

    return [{"network": name} for name in ("head", *ENCODER, *RANDOM)]


def _rivals() -> list[Run]:
    """Everybody with the same slices and the same CPU seconds; and peft's LoRA beside ours."""
    from .rivals import BUDGETS, RIVALS, SEEDS

    runs = [
        {"rival": rival, "labels": labels, "seed": seed, "budget": budget}
        for seed in SEEDS
        for budget in BUDGETS
        for rival in RIVALS
        for labels in (8, 0)
    ]
    return [{"rival": "peft", "labels": 8, "seed": 0, "budget": 0}, *runs]


PARTS = {
    "rates": _rates,
    "frozen": lambda: _frozen("abdomen"),
    "encoder": lambda: _encoder("abdomen", ENCODER),
    "ablations": _ablations,
    "rivals": _rivals,
    "fields": _fields,
    "chest": lambda: _frozen("chest") + _encoder("chest", CHEST),
}


def results_file(part: str) -> Path:
    """Where the rows of a part are kept."""
    return RESULTS / f"{part}.json"


def measure(run: Run) -> Run:
    """The run with its results; in a process whose calculations take one core."""
    import torch

    torch.set_num_threads(1)
    from . import fields, trial

    if "rival" in run:
        from .rivals import compete

        return run | compete(run["rival"], run["labels"], run["seed"], run["budget"])
    if "network" in run:
        return run | fields.field(run["network"])

    rate = {"rate": run["rate"]} if "rate" in run else {}
    method: Method = ABLATIONS[run["ablation"]][run["row"]] if "ablation" in run else METHODS[run["method"]]
    row, network = trial.run(
        run["task"],
        dataclasses.replace(method, **rate),
        run["labels"],
        run["seed"],
        part="choice" if rate else "test",
    )
    if run["labels"] == 0 and run["seed"] == 0 and run["task"] == "abdomen":
        fields.keep(run["method"], network)
    return run | row
