# SPDX-License-Identifier: Apache-2.0
"""Write the tables and figures of docs/evidence.md from the results in `benchmarks/results`.

The text around them is by hand and holds no number that was measured.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from samda.io import write_text
from samda.training.optim import build_schedule

from ..context import table as context_table
from ..filling import fill
from . import figures, tables
from .methods import ABLATIONS, FROZEN
from .parts import CHEST, PARTS, planned
from .protocol import TASKS, VIEWS
from .results import missing, read
from .trial import BATCH, HEAD_RATE, HEAD_STEPS, LATER_HEAD_RATE, STEPS

__all__ = ["PAGE", "blocks", "filled", "read", "write_page"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence.md"
LABELS_FIGURE = ROOT / "docs" / "evidence_labels.svg"
FIELDS_FIGURE = ROOT / "docs" / "evidence_fields.svg"


def main_rows() -> list[dict[str, Any]]:
    """What the comparison of methods shows."""
    return read("frozen") + read("encoder")


def write_page() -> None:
    """The page and its figures, made anew."""
    figures.draw_labels(main_rows() + read("chest"), LABELS_FIGURE)
    figures.draw_fields(read("fields"), FIELDS_FIGURE)
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return fill(text, blocks())


def blocks() -> dict[str, str]:
    """Every table by its name."""
    main, chest, fields = main_rows(), read("chest"), read("fields")
    return {
        "protocol": _protocol(),
        "done": _done(),
        "rates": tables.rates(read("rates")),
        "few_labels": tables.few_labels(main, "abdomen"),
        "methods": tables.encoder(main, "abdomen"),
        "findings": tables.findings(main),
        "cost": tables.cost(main, "abdomen", read("rivals")),
        "chest": tables.few_labels(chest, "chest"),
        "chest_methods": tables.encoder(chest, "chest", FROZEN + CHEST),
        "rivals": tables.rivals(read("rivals")),
        "peft": tables.peft(read("rivals")),
        "context": context_table(read("context")),
        "adaptation": tables.adaptation(read("adaptation")),
        "fields_block": tables.fields(fields, "block"),
        "fields_neck": tables.fields(fields, "neck"),
        "ablations": "\n\n".join(
            f"**{name}**\n\n{tables.ablation(name, read('ablations'), main)}" for name in ABLATIONS
        ),
    }


def _protocol() -> str:
    abdomen, chest = (TASKS[name] for name in ("abdomen", "chest"))
    warmup = inspect.signature(build_schedule).parameters["warmup"].default
    blocks = {name: ", ".join(f"{a} to {b - 1}" for a, b in t.test) for name, t in (("a", abdomen), ("c", chest))}
    return (
        f"Scored: slices {blocks['a']} of patient A (3 mm a slice, {abdomen.gap} slices on each side of a block are "
        f"not used at all) and {blocks['c']} of the chest CT (10 mm, {chest.gap}). The class head comes first, "
        f"{HEAD_STEPS} steps at a rate of {HEAD_RATE:g} on embeddings of {VIEWS} views of each slice; then every "
        f"method makes {STEPS} steps more, head at {LATER_HEAD_RATE:g}. Batches of {BATCH} slices, AdamW, Dice + "
        f"cross-entropy, {100 * warmup:g} % warm-up and half a cosine, last weights."
    )


def _done() -> str:
    lines = []
    for part in PARTS:
        wanted, left = len(planned(part)), len(missing(part))
        lines.append([part, str(wanted), str(wanted - left), f"{left}, not made yet" if left else "none"])
    return tables.markdown(["part", "runs planned", "done", "left out"], lines)
