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


def test_means_and_gains_of_the_page_by_hand(page: ModuleType) -> None:
    rows = [row for row in page.main_rows() if row["labels"] == 2 and row["seed"] < 3]
    dice = {(row["method"], row["seed"]): row["dice"] for row in rows}
    seeds = [seed for seed in range(3) if ("lora", seed) in dice and ("head", seed) in dice]
    assert seeds
    line = next(line for line in page.blocks()["methods"].splitlines() if line.startswith("| `lora`"))
    assert f"{statistics.mean(dice['lora', seed] for seed in seeds):.3f}" in line
    assert f"{statistics.mean(dice['lora', s] - dice['head', s] for s in seeds):+.3f}" in line
