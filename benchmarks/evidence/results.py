# SPDX-License-Identifier: Apache-2.0
"""Where rows are kept: a JSON file a part, a line a row; a row belongs to the planned run whose entries it repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from samda.io import cache_dir, write_text

from . import runs

RESULTS = Path(__file__).parents[1] / "results" / "evidence"

Row = dict[str, Any]


def stored(part: str) -> list[Row]:
    """All rows that are kept, those of other settings included."""
    file = RESULTS / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def read(part: str) -> list[Row]:
    """The rows of the planned runs that are there, in the order of the plan."""
    rows = stored(part)
    return [row for run in runs.planned(part) for row in rows if run.items() <= row.items()]


def missing(part: str) -> list[Row]:
    """The planned runs without a row; one that could not run is tried again."""
    rows = [row for row in stored(part) if "not_run" not in row]
    return [run for run in runs.planned(part) if not any(run.items() <= row.items() for row in rows)]


def store(part: str, row: Row) -> None:
    """Add a row to what is kept now, perhaps by another command, in place of an older one of the same run."""
    keys = {key for run in runs.planned(part)[:1] for key in run} - {"setup"}
    lock = cache_dir() / "evidence" / f"{part}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        kept = [other for other in stored(part) if any(other.get(key) != row.get(key) for key in keys)]
        lines = ",\n".join(json.dumps(one, sort_keys=False) for one in [*kept, row])
        write_text(RESULTS / f"{part}.json", f"[\n{lines}\n]\n")
