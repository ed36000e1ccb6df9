# SPDX-License-Identifier: Apache-2.0
"""docs/evidence.md and docs/adapters.md show what benchmarks/results holds, in tables and in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import fmean as mean
from typing import Any

import pytest

ENCODER = ("bottleneck", "bottleneck_16", "lora", "salt", "s_sam", "lka", "dka", "dka_51", "dka_5")
COUNTS = ("2", "8", "0")
TEN = ("pyramid, head alone", "pyramid", "pyramid + SAM-DA", "pyramid + LoRA", "pyramid + SALT", "pyramid + DKA")
OTHERS = ("pyramid + SALT + DKA + SAM-DA", "pyramid, full fine-tuning", "sam + SAM-DA")
DATA = ("hippocampus", "vessels_chase", "lungs_montgomery", "heart_sunnybrook", "nuclei_fluo")


class Rows:
    """What was measured, read without the code that writes the page."""

    def __init__(self) -> None:
        from benchmarks.evidence import page
        from benchmarks.evidence.runs import read

        self.peft = next(iter(read("peft")), None)
        self.areas = {row["network"]: row["block"]["areas"]["mass"]["0.5"] for row in read("fields")}
        self.trained = [row for part in (*DATA, "soon") for row in read(part)]
        self.old: dict[str, Any] = json.loads(page.ONE_PATIENT.read_text("utf-8"))["abdomen"]

    def dice(self, data: str, method: str, patients: int, test: str | None = None, budget: int = 300) -> list[float]:
        """Of the patients of a test set, seeds one after the other."""
        chosen = {"data": data, "method": method, "patients": patients, "budget": budget}
        rows = [row["test"][test or data] for row in self.trained if chosen.items() <= row.items()]
        return [mean(scores[0] for scores in of.values()) for row in rows for of in row.values()]

    def gains(self, method: str, base: str, count: str) -> list[float]:
        """Of the first version: the same slices and seed."""
        return [a - b for a, b in zip(self.old[method][count], self.old[base][count], strict=True)]


def apart(found: list[float]) -> bool:
    """Does mean ± t s / sqrt(n) leave out zero? t = 4.303 for three values."""
    import statistics

    return abs(statistics.fmean(found)) > 4.303 * statistics.stdev(found) / 3**0.5


CLAIMS: dict[str, Callable[[Rows], bool]] = {
    "With the same 300 CPU seconds the default is ahead of the networks from scratch in every comparison": (
        lambda rows: all(
            mean(rows.dice(data, "pyramid", n, test)) > mean(rows.dice(data, rival, n, test))
            for data, n, test, rival in (
                *(("hippocampus", n, None, "DynUNet 3-D") for n in (1, 3, 10, 30)),
                ("hippocampus", 10, None, "nnU-Net 3d_fullres"),
                ("lungs_montgomery", 3, None, "DynUNet 2-D"),
                ("lungs_montgomery", 10, None, "DynUNet 2-D"),
                ("nuclei_fluo", 3, None, "DynUNet 2-D"),
                ("nuclei_fluo", 10, None, "DynUNet 2-D"),
                ("heart_sunnybrook", 3, None, "DynUNet 2-D"),
                ("heart_sunnybrook", 10, None, "DynUNet 2-D"),
                ("vessels_chase", 3, None, "DynUNet 2-D"),
                ("vessels_chase", 3, "vessels_lesav", "DynUNet 2-D"),
                ("vessels_chase", 0, None, "DynUNet 2-D"),
                ("vessels_chase", 0, "vessels_lesav", "DynUNet 2-D"),
            )
        )
    ),
    "Nuclei of three pictures are not decided": lambda rows: (
        [
            [round(mean(both[seed : seed + 32]), 3) for seed in (0, 32, 64)]  # 32 held-out pictures
            for both in (rows.dice("nuclei_fluo", name, 3) for name in ("pyramid", "DynUNet 2-D"))
        ]
        == [[0.904, 0.899, 0.818], [0.905, 0.864, 0.824]]
    ),
    "The margins say as much about the budget as about the methods": lambda rows: (
        {38, 88, 160, 301} <= {row.get("steps") for row in rows.trained if row["method"].startswith("DynUNet")}
        and mean(rows.dice("heart_sunnybrook", "DynUNet 2-D", 3)) < 0.2
        and mean(rows.dice("hippocampus", "DynUNet 3-D", 1)) < mean(rows.dice("hippocampus", "DynUNet 3-D", 30)) - 0.1
    ),
    "All 160 patients of the hippocampus and 1,800 s give .873": lambda rows: (
        [round(mean(rows.dice("hippocampus", name, 0, None, 1800)), 3) for name in ("pyramid", "DynUNet 3-D")]
        == [0.873, 0.869]
    ),
    "A model of 30 hippocampus patients is of use within 90 CPU seconds": lambda rows: (
        [round(mean(rows.dice("hippocampus", "pyramid", 30, None, seconds)), 3) for seconds in (45, 90)]
        == [0.796, 0.841]
        and round(mean(rows.dice("hippocampus", "DynUNet 3-D", 30)), 3) == 0.805
    ),
    "On top of the class head no adapter gains within 300 CPU seconds": lambda rows: (
        [round(mean(rows.dice("hippocampus", name, 10)), 3) for name in TEN] == [0.86, 0.86, 0.856, 0.845, 0.843, 0.843]
        and [round(mean(rows.dice("hippocampus", name, 10)), 3) for name in OTHERS] == [0.839, 0.827, 0.765]
        and [round(mean(rows.dice("hippocampus", name, 30)), 2) for name in TEN[:1] + TEN[3:5]] == [0.86, 0.84, 0.83]
    ),
    "Vessels of the held-out children reach their goal": lambda rows: (
        mean(rows.dice("vessels_chase", "pyramid", 0))
        < 0.78
        < mean(rows.dice("vessels_chase", "pyramid", 0, None, 1800))
    ),
    "peft's LoRA and ours are the same numbers": lambda rows: (
        max(rows.peft[key] for key in ("outputs", "losses", "weights", "logits")) < 1e-6 < rows.peft["changed"]
    ),
    "Large kernels widen the receptive field of a ViT-B with random weights": lambda rows: (
        rows.areas["vit_b, random, DKA"] > rows.areas["vit_b, random, small kernel"] > 2 * rows.areas["vit_b, random"]
        and rows.areas["vit_b, random, bottleneck"] <= rows.areas["vit_b, random"]
    ),
    "adapters of the encoder gained over the head alone in every single pair": lambda rows: all(
        gain > 0 for m in ENCODER for n in COUNTS for gain in rows.gains(m, "head_fresh", n)
    ),
    "SALT beat S-SAM, and not LoRA": lambda rows: (
        all(apart(rows.gains("salt", "s_sam", n)) for n in COUNTS)
        and not any(apart(rows.gains("salt", "lora", n)) for n in COUNTS)
    ),
    "what DKA had over a narrow bottleneck was mostly width": lambda rows: (
        not any(apart(rows.gains("dka", "bottleneck_16", n)) for n in COUNTS)
    ),
}


@pytest.mark.parametrize("name", ["evidence", "adapters"])
def test_the_page_shows_the_results(name: str) -> None:
    from benchmarks.evidence import page

    text = page.PAGES[name].read_text(encoding="utf-8")
    assert page.filled(name, text) == text, "run python -m benchmarks.evidence --page"


def test_the_figures_were_drawn_from_the_results() -> None:
    from benchmarks.evidence import page

    for name, rows in (("labels", page.trained()), ("fields", page.fields())):
        assert page.checksum(rows) in page.FIGURES[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("words", CLAIMS)
def test_what_the_page_says_in_words_holds(words: str) -> None:
    from benchmarks.evidence import page

    text = " ".join(page.PAGES["evidence"].read_text(encoding="utf-8").split())
    assert words in text, "the sentence is gone: delete its claim here"
    assert CLAIMS[words](Rows())


def test_every_paragraph_of_the_outcome_has_a_claim() -> None:
    from benchmarks.evidence import page

    text = page.PAGES["evidence"].read_text(encoding="utf-8")
    outcome = text.partition("## What came out")[2].partition("\n## ")[0]
    for paragraph in outcome.split("\n* ")[1:]:
        assert any(words in " ".join(paragraph.split()) for words in CLAIMS), paragraph
