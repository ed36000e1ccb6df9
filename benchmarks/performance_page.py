# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/performance.md from the results in `benchmarks/results`; the text around them is by hand:

python -m benchmarks.performance_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samda.io import write_text

from .timing import RESULTS, Row, duration, fill, markdown, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew."""
    return fill(text, blocks(results))


def blocks(results: Path) -> dict[str, str]:
    """Every table by its name; one without results says how to measure it."""
    speed, scaling, cuda = (_read(results / f"{name}.json") for name in ("speed_cpu", "scaling_cpu", "speed_cuda"))
    measured = {
        "machine": ("make bench", _machine, speed),
        "speed": ("make bench", _speed, speed),
        "cuda": ("python -m benchmarks.speed --device cuda", _speed, cuda),
        "machine_of_the_rest": ("python -m benchmarks.scaling", _machine, scaling),
        "growth": ("python -m benchmarks.scaling --parts growth", _growth, scaling.get("growth")),
        "profile": ("python -m benchmarks.scaling --parts profile", _profile, scaling.get("profile")),
        "floor": ("python -m benchmarks.scaling --parts profile", _floor, scaling.get("profile")),
        "options": ("python -m benchmarks.scaling --parts options", _options, scaling.get("options")),
    }
    return {
        name: write(found) if found else f"not measured; `{command}`"
        for name, (command, write, found) in measured.items()
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _machine(results: dict[str, Any]) -> str:
    facts = results["machine"]
    return (
        f"Measured on: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads of PyTorch "
        f"{facts['torch']}, Python {facts['python']}, {facts['system']}; up to {results['repeats']} repeats; load of "
        f"the machine when it ended, this work included: {facts['load']}."
    )


def _speed(results: dict[str, Any]) -> str:
    return table([Row(**row) for rows in results["rows"].values() for row in rows])


def _growth(curves: dict[str, Any]) -> str:
    lines = []
    for name, curve in curves.items():
        points = ", ".join(f"{value}: {duration(took)}" for value, took in curve["seconds"].items())
        lines.append([name, curve["fixed"], points])
    return markdown(["what grows", "measured on", "seconds"], lines, texts=3)


def _profile(jobs: dict[str, Any]) -> str:
    largest: dict[str, float] = {}
    for job in jobs.values():
        for kind, share in job["shares"].items():
            largest[kind] = max(share, largest.get(kind, 0.0))
    lines = []
    for kind in sorted(sorted(largest), key=lambda kind: -largest[kind]):
        lines.append([kind, *(f"{100 * job['shares'].get(kind, 0.0):.0f} %" for job in jobs.values())])
    return markdown(["share of the time", *jobs], lines)


def _floor(jobs: dict[str, Any]) -> str:
    head = ["job", "measured", "GFLOP", "floor of arithmetic", "GB moved", "floor of memory"]
    lines = []
    for name, job in jobs.items():
        floors, peak = job["floor_seconds"], job["peak"]
        compute = f"{duration(floors['compute'])} at {peak['flop_per_s'] / 1e9:.0f} GFLOP/s"
        memory = f"{duration(floors['memory'])} at {peak['bytes_per_s'] / 1e9:.1f} GB/s"
        cells = [name, duration(job["seconds"]), f"{job['gflop']:.1f}", compute, f"{job['gbyte']:.2f}", memory]
        lines.append([*cells, f"{job['of_floor']:.1f}"])
    return markdown([*head, "measured / larger floor"], lines)


def _options(found: dict[str, Any]) -> str:
    lines = []
    for name, row in found.items():
        if "failed" in row:
            lines.append([name, f"failed: {row['failed']}", "", "", ""])
            continue
        first = duration(row["first_call"]) if "first_call" in row else ""
        lines.append([name, row["what"], duration(row["without"]), duration(row["with"]), first])
    return markdown(["option", "measured on", "without", "with", "first call"], lines, texts=2)


def write_page() -> None:
    """The page, made anew."""
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    write_page()
