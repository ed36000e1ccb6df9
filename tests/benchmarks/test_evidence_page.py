# SPDX-License-Identifier: Apache-2.0
"""docs/evidence.md shows what benchmarks/results/evidence holds."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes the page."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.evidence.page")


def test_the_page_shows_the_results(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run python -m benchmarks.evidence --page"


def test_the_figures_were_drawn_from_the_results(page: ModuleType) -> None:
    drawn = {page.LABELS_FIGURE: page.main_rows() + page.read("chest"), page.FIELDS_FIGURE: page.read("fields")}
    for figure, rows in drawn.items():
        assert page.figures.checksum(rows) in figure.read_text(encoding="utf-8")


def test_claims_ablations_and_rivals_by_hand(page: ModuleType) -> None:
    tables = page.tables
    run = {"task": "abdomen", "labels": 8, "parameters": 7}
    dice = {"salt": (0.5, 0.6, 0.7), "lora": (0.4, 0.5, 0.6), "s_sam": (0.1, 0.65, 0.2)}
    rows = [run | {"method": m, "seed": s, "dice": d} for m, values in dice.items() for s, d in enumerate(values)]
    lines = tables.findings(rows).splitlines()
    assert "| SALT beats LoRA | `salt` - `lora` | - | **+0.100 ± 0.000** | - | 3 of 3 |" in lines
    # 0.4, -0.05, 0.5: mean 0.283, s 0.293, half of the interval 4.303 s / sqrt(3) = 0.728
    assert "| SALT beats S-SAM | `salt` - `s_sam` | - | +0.283 ± 0.293 | - | 2 of 3 |" in lines
    dial = [run | {"ablation": "SALT, r, d and ReLU", "row": "r = 0, d = 4", "seed": 1, "dice": 0.9}]
    lines = tables.ablation("SALT, r, d and ReLU", dial, rows).splitlines()
    assert "| r = k - 8, d = 4 | 7 | 0.600 ± 0.100 |  |" in lines
    assert "| r = 0, d = 4 | 7 | 0.900 (1) | +0.300 (1) |" in lines
    common = {"rival": "dynunet", "budget": 120, "parameters": 5, "seed": 0}
    steps = [common | {"labels": 8, "dice": 0.25, "steps": 60}, common | {"labels": 0, "dice": 0.5, "steps": 62}]
    refused = common | {"rival": "nnunet", "labels": 8, "status": "not run", "reason": "pip failed"}
    del refused["parameters"]
    lines = tables.rivals([*steps, refused]).splitlines()
    assert "| `dynunet` | 120 | 5 | 60 / 62 | 0.250 (1) | 0.500 (1) |" in lines
    assert "| `nnunet` | 120 | not run: pip failed | - / - | - | - |" in lines


def test_means_and_gains_of_the_page_by_hand(page: ModuleType) -> None:
    rows = [row for row in page.main_rows() if row["labels"] == 2 and row["seed"] < 3]
    dice = {(row["method"], row["seed"]): row["dice"] for row in rows}
    seeds = [seed for seed in range(3) if ("lora", seed) in dice and ("head", seed) in dice]
    assert seeds
    line = next(line for line in page.blocks()["methods"].splitlines() if line.startswith("| `lora`"))
    assert f"{statistics.mean(dice['lora', seed] for seed in seeds):.3f}" in line
    assert f"{statistics.mean(dice['lora', s] - dice['head', s] for s in seeds):+.3f}" in line
