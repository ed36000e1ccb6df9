# SPDX-License-Identifier: Apache-2.0
"""What docs/evidence.md says in words, held to the rows: a sentence that new rows make false fails here."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNTS = (2, 8, 0)
ENCODER = ("bottleneck", "bottleneck_16", "lora", "salt", "s_sam", "lka", "dka", "dka_51", "dka_5")


class Rows:
    """Dice by method, labeled slices and seed, read without the code that writes the page."""

    def __init__(self, page) -> None:
        self.page = page
        self.dice = {(r["method"], r["labels"], r["seed"]): r["dice"] for r in page.main_rows()}
        self.chest = {(r["method"], r["labels"], r["seed"]): r["dice"] for r in page.read("chest")}
        self.fields = {r["network"]: r["block"]["areas"]["mass"]["0.5"] for r in page.read("fields")}
        self.dials = {(r["ablation"], r["row"], r["seed"]): r["dice"] for r in page.read("ablations")}
        rivals = page.read("rivals")
        self.rivals = {(r["rival"], r["budget"], r["labels"]): r for r in rivals if r["seed"] == 0 and "dice" in r}
        self.peft = next(r for r in rivals if r["rival"] == "peft")

    def gains(self, method: str, base: str, labels: int) -> list[float]:
        seeds = [s for s in range(3) if (method, labels, s) in self.dice and (base, labels, s) in self.dice]
        return [self.dice[method, labels, s] - self.dice[base, labels, s] for s in seeds]

    def turned(self, ablation: str, first: str) -> dict[str, list[float]]:
        """Row of an ablation that no method is -> what it has over `first` with eight slices, for each seed."""
        found: dict[str, list[float]] = {}
        for (name, row, seed), dice in sorted(self.dials.items()):
            if name == ablation:
                found.setdefault(row, []).append(dice - self.dice[first, 8, seed])
        return found

    def mean(self, method: str, labels: int) -> float:
        return statistics.fmean(self.dice[method, labels, s] for s in range(3) if (method, labels, s) in self.dice)

    def told_apart(self, method: str, base: str, labels: int) -> bool:
        """Is one told apart from the other?"""
        return apart(self.gains(method, base, labels))


def apart(found: list[float]) -> bool:
    """Does mean ± t s / sqrt(n) leave out zero? t = 4.303 for three values."""
    return len(found) == 3 and abs(statistics.fmean(found)) > 4.303 * statistics.stdev(found) / 3**0.5


CLAIMS: dict[str, Callable[[Rows], bool]] = {
    "Adapters of the encoder gain over the head alone on patient A": lambda rows: all(
        gain > 0 for m in ENCODER for n in COUNTS for gain in rows.gains(m, "head_fresh", n)
    ),
    "With two slices of the chest CT they may lose": lambda rows: (
        any(all(rows.chest[m, 2, s] < rows.chest["head", 2, s] for m in ("lora", "salt", "dka")) for s in range(3))
        and all(rows.chest[m, 8, s] > rows.chest["head", 8, s] for m in ("lora", "salt", "dka") for s in range(3))
    ),
    "Full fine-tuning is a gamble when labels are few": lambda rows: (
        any(g < 0 for n in (2, 8) for g in rows.gains("full", "head_fresh", n))
        and all(rows.mean("full", 0) > rows.mean(m, 0) for m in ENCODER)
        and all(rows.chest["full", 8, s] > rows.chest[m, 8, s] for m in ("lora", "salt", "dka") for s in range(3))
    ),
    "SALT beats S-SAM": lambda rows: all(rows.told_apart("salt", "s_sam", n) for n in COUNTS),
    "not LoRA": lambda rows: not any(rows.told_apart("salt", "lora", n) for n in COUNTS),
    "More rank helps SALT more than any other dial": lambda rows: (
        apart(rows.turned("SALT, r, d and ReLU", "salt")["r = 0, d = 16"])
        and max(rows.turned("SALT, r, d and ReLU", "salt")["r = k - 8, d = 1"]) < 0
        and min(rows.turned("SALT, r, d and ReLU", "salt")["r = k - 8, d = 4, no ReLU"]) > -0.02
        and statistics.fmean(rows.turned("SALT, r, d and ReLU", "salt")["r = 0, d = 16"])
        > max(
            statistics.fmean(gains)
            for dial, first in (("LKA, kernel and placement", "lka"), ("DKA, kernels", "dka"))
            for gains in rows.turned(dial, first).values()
        )
    ),
    "all kernels and both placements of LKA, all sides and numbers of prompts of SAM-DA": lambda rows: (
        not any(
            apart(gains)
            for dial, first in (("LKA, kernel and placement", "lka"), ("SAM-DA, side and prompts", "sam_da"))
            for gains in rows.turned(dial, first).values()
        )
    ),
    "What DKA has over a narrow bottleneck is mostly width": lambda rows: (
        not any(rows.told_apart("dka", "bottleneck_16", n) for n in COUNTS)
        and all(g > 0 for n in COUNTS for base in ("dka_5", "dka_51") for g in rows.gains("dka", base, n))
    ),
    "LKA is not ahead of its bottleneck": lambda rows: all(
        rows.mean("lka", n) < rows.mean("bottleneck", n) for n in COUNTS
    ),
    "Three adapters together lead": lambda rows: (
        all(rows.mean("salt+dka+sam_da", n) > rows.mean(m, n) for n in COUNTS for m in (*ENCODER, "sam_da_fresh"))
        and all(rows.mean("salt+dka+sam_da", n) > rows.mean("full", n) for n in (2, 8))
        and not any(rows.told_apart("salt+sam_da", "salt", n) for n in COUNTS)
    ),
    "SAM-DA beside full fine-tuning": lambda rows: (
        not rows.told_apart("sam_da_fresh", "full", 2)
        and not rows.told_apart("sam_da_fresh", "full", 8)
        and all(g < 0 for g in rows.gains("sam_da_fresh", "full", 0))
        and all(rows.mean("sam_da", n) < rows.mean("decoder", n) for n in COUNTS)
    ),
    "In two CPU minutes, training on embeddings wins": lambda rows: (
        all(
            rows.rivals["sam_da", 120, n]["dice"] > rows.rivals[m, 120, n]["dice"]
            and rows.rivals["sam_da", 120, n]["steps"] > 4 * rows.rivals[m, 120, n]["steps"]
            for n in (8, 0)
            for m in ("lora", "full")
        )
        and all(rows.rivals["decoder", 120, 0]["dice"] > rows.rivals[m, 120, 0]["dice"] + 0.1 for m in ("lora", "full"))
        and all(rows.rivals["sam_da", 600, n]["dice"] < rows.rivals["sam_da", 120, n]["dice"] for n in (8, 0))
    ),
    "Networks from scratch find little in ten CPU minutes": lambda rows: (
        all(rows.rivals["dynunet", budget, n]["dice"] == 0 for budget in (120, 600) for n in (8, 0))
        and rows.rivals["nnunet", 600, 0]["dice"] == 0
        and [k for k, dice in rows.rivals["nnunet", 600, 8]["classes"].items() if dice] == ["liver"]
        and rows.rivals["nnunet", 600, 8]["classes"]["liver"] > rows.rivals["sam_da", 600, 8]["classes"]["liver"]
        and rows.rivals["nnunet", 600, 8]["classes"]["liver"] > rows.rivals["sam_da", 120, 8]["classes"]["liver"]
    ),
    "peft's LoRA and ours are the same numbers": lambda rows: (
        max(rows.peft[key] for key in ("outputs", "losses", "weights", "logits")) < 1e-6 < rows.peft["changed"]
    ),
    "Few views of few slices are dangerous": lambda rows: (
        min(rows.gains("sam_da", "head", 2)) < -0.3 and min(rows.gains("sam_da_fresh", "head_fresh", 2)) > -0.05
    ),
    "Training narrows the receptive field": lambda rows: (
        all(rows.fields[m] < rows.fields["head"] for m in (*ENCODER, "full"))
        and min(rows.fields, key=lambda m: rows.fields[m] if not m.startswith("vit_b") else 1) == "full"
        and rows.fields["vit_b, dka"] > rows.fields["vit_b, dka_5"] > 2 * rows.fields["vit_b"]
        and rows.fields["vit_b, bottleneck_16"] < rows.fields["vit_b"]
    ),
}


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Everything that was measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        return Rows(importlib.import_module("benchmarks.evidence.page"))


@pytest.mark.parametrize("words", CLAIMS)
def test_what_the_page_says_in_words_holds(words: str, rows: Rows) -> None:
    text = " ".join(rows.page.PAGE.read_text(encoding="utf-8").split())
    assert words in text, "the sentence is gone: delete its claim here"
    assert CLAIMS[words](rows)


def test_every_paragraph_of_the_outcome_has_a_claim(rows: Rows) -> None:
    text = rows.page.PAGE.read_text(encoding="utf-8")
    outcome = text.partition("## What came out")[2].partition("\n## ")[0]
    for paragraph in outcome.split("\n* ")[1:]:
        assert any(words in " ".join(paragraph.split()) for words in CLAIMS), paragraph
