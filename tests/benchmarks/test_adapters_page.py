# SPDX-License-Identifier: Apache-2.0
"""docs/adapters.md, README and docs/adaptation.md show what benchmarks/results holds."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that measures the adapters and writes their page."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("filling", "adapters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import adapters

    return adapters


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_the_page_shows_the_results(adapters: ModuleType) -> None:
    text = adapters.PAGE.read_text(encoding="utf-8")
    assert adapters.filled(text) == text, "run python benchmarks/adapters.py --page"


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/adapters.md", 4)])
def test_dice_and_seconds_in_sentences(page: str, least: int) -> None:
    rows = {row["adapter"]: row for row in read("adapters.json")}
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    found = re.findall(r"`(\w+)` (0\.\d{3}) in (\d+) s\b", text)
    assert len(found) >= least
    for name, dice, seconds in found:
        assert dice == f"{rows[name]['dice']['A']:.3f}" and int(seconds) == rows[name]["seconds"], name


def test_rates_that_are_not_the_shipped_ones_are_named(adapters: ModuleType) -> None:
    rows = read("adapters.json")
    for row in rows:
        overlay = yaml.safe_load((ROOT / "configs" / "adapters" / f"{row['adapter']}.yaml").read_text())
        same = row["learning_rate"] == overlay.get("learning_rate", 0.003)
        same &= row["head_learning_rate"] == overlay.get("head_learning_rate", 0.01)
        assert same == (f"`{row['adapter']}`" not in adapters.rates(rows)), row["adapter"]
    assert adapters.rates([rows[0]]) == "These are the rates of `samda train --adapter`."


def test_gains_of_the_adaptation_by_hand() -> None:
    runs = [run for run in read("adaptation.json")["runs"] if run["family"] == "real" and run["method"] == "default"]
    text = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    for case in ("B", "M"):
        scores = [run["mean_dice"] for run in runs if run["case"] == case]
        gain = statistics.fmean(score["final"] - score["source"] for score in scores)
        line = next(line for line in text.splitlines() if line.startswith(f"| {case}, adapted |"))
        assert f"{gain:+.3f}" in line
        plain = next(line for line in text.splitlines() if line.startswith(f"| {case}, plain |"))
        assert all(
            abs(float(cell) - score["source"]) < 6e-4 for cell, score in zip(plain.split("|")[2:], scores, strict=False)
        )
        if case == "M":
            assert f"every model gained, {gain:.3f} in the mean" in text
