# SPDX-License-Identifier: Apache-2.0
"""Where rows are kept: a JSON file a part; a row belongs to the planned run whose entries it repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from samda.io import cache_dir, write_json

from . import parts

__all__ = ["RESULTS", "missing", "read", "results_file", "store", "stored"]

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]


def results_file(part: str) -> Path:
    """Where the rows of a part are kept; those of a script of its own lie where the script keeps them."""
    return RESULTS / ("" if part in ("adaptation", "context") else "evidence") / f"{part}.json"


def stored(part: str) -> list[Row]:
    """All rows that are kept, those of other settings included."""
    file = results_file(part)
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return content["runs"] if isinstance(content, dict) else content


def read(part: str) -> list[Row]:
    """The rows of the planned runs that are there, in the order of the plan."""
    rows = stored(part)
    return [row for run in parts.planned(part) for row in rows if run.items() <= row.items()]


def missing(part: str) -> list[Row]:
    """The planned runs without a row; a rival that could not run is tried again."""
    rows = [row for row in stored(part) if row.get("status") != "not run"]
    return [run for run in parts.planned(part) if not any(run.items() <= row.items() for row in rows)]


def store(part: str, row: Row) -> None:
    """Add a row to what is kept now, perhaps by another command, in place of one that could not run."""
    lock = cache_dir() / "evidence" / f"{part}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        settled = [other for other in stored(part) if other.get("status") != "not run" or not same(other, row)]
        rows, file = [*settled, row], results_file(part)
        if part == "adaptation" and file.exists():  # says with which versions and settings it was begun, too
            write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"runs": rows})
        else:
            write_json(file, rows)


def same(one: Row, other: Row) -> bool:
    """Do two rows answer for the same run?"""
    return all(one.get(key) == other.get(key) for key in ("rival", "labels", "seed", "budget"))
