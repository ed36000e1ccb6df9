# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md shows what benchmarks/results holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def page() -> ModuleType:
    """The script that writes the page."""
    from benchmarks import timing

    return timing


def test_the_page_shows_the_results(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run python -m benchmarks.timing"


def test_every_figure_of_a_row_is_on_the_page(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    rows = json.loads((page.RESULTS / "speed_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert rows
    for row in (row for group in rows.values() for row in group):
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['what']} |"))
        assert row["result"] in line and row["goal"] in line
        assert ("(missed)" in line) == (row["reached"] is False)


def test_without_results_the_page_says_how_to_measure(page: ModuleType, tmp_path: Path) -> None:
    text = page.filled(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert text.count("not measured; `") == 8
    assert "not measured; `python -m benchmarks.speed --device cuda`" in text


def test_markers_that_fit_no_table_are_refused(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        page.filled(text.replace("<!-- floor -->", "<!-- roof -->"))
