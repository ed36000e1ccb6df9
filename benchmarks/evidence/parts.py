# SPDX-License-Identifier: Apache-2.0
"""What is measured: the runs of each part, each a dict of what tells it from others, and how one of them is done."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..context import EPOCHS
from .methods import ABLATIONS, ENCODER, FRESH, FROZEN, METHODS, Method

__all__ = ["PARTS", "measure", "planned"]

COUNTS = (1, 2, 4, 8, 16, 0)  # labeled slices; 0: all
ENCODER_COUNTS = (8, 2, 0)
SEEDS, ENCODER_SEEDS = 5, 3  # from 0; the second where the encoder trains
CHEST = ("lora", "salt", "dka", "full")  # of the methods that train the encoder
RATES = (1e-3, 3e-3)
RATED = ("lora", "salt", "dka", "full")
RATES_SEED = 90  # no other run has it

Run = dict[str, Any]


def planned(part: str) -> list[Run]:
    """The runs of a part, the most telling ones first, each with the fingerprint of its settings."""
    from . import fields, trial

    runs = PARTS[part]()
    for run in runs:
        if "network" in run:
            run["setup"] = fields.setup(run["network"])
        elif "task" in run:
            run["setup"] = trial.setup(run["task"], _method(run))
    return runs


def _method(run: Run) -> Method:
    return ABLATIONS[run["ablation"]][run["row"]] if "ablation" in run else METHODS[run["method"]]


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


def _adaptation() -> list[Run]:
    """Every objective on B and M, from five source models."""
    from samda.adaptation.objectives import OBJECTIVES

    return [
        {"case": case, "family": "real", "method": method, "seed": seed}
        for method in OBJECTIVES
        for case in ("B", "M")
        for seed in range(SEEDS)  # innermost, so that processes side by side train different source models
    ]


def _context() -> list[Run]:
    """With and without the neighboring slices."""
    return [{"context": n, "seed": seed, "epochs": EPOCHS} for n in (0, 1) for seed in range(ENCODER_SEEDS)]


PARTS = {
    "rates": _rates,
    "frozen": lambda: _frozen("abdomen"),
    "encoder": lambda: _encoder("abdomen", ENCODER + FRESH),
    "ablations": _ablations,
    "rivals": _rivals,
    "fields": _fields,
    "chest": lambda: _frozen("chest") + _encoder("chest", CHEST),
    "adaptation": _adaptation,
    "context": _context,
}


def measure(run: Run) -> Run:
    """The run with its results; in a process whose calculations take one core."""
    import torch

    torch.set_num_threads(1)
    from . import fields, trial

    if "case" in run or "context" in run:
        from .elsewhere import measure_by_script

        return measure_by_script(run)
    if "rival" in run:
        from .rivals import compete

        return run | compete(run["rival"], run["labels"], run["seed"], run["budget"])
    if "network" in run:
        return run | fields.field(run["network"])

    rate = {"rate": run["rate"]} if "rate" in run else {}
    row, network = trial.run(
        run["task"],
        dataclasses.replace(_method(run), **rate),
        run["labels"],
        run["seed"],
        part="choice" if rate else "test",
    )
    if run["labels"] == 0 and run["seed"] == 0 and run["task"] == "abdomen":
        fields.keep(run["method"], network)
    return run | row
