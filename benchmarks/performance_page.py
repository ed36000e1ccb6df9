# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/performance.md from the results in `benchmarks/results`; the text around them is by hand:

python benchmarks/performance_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from filling import fill
from harness import Row, table

from samda.io import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
MISSING = "not measured; `{command}`"


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew, see :func:`filling.fill`."""
    return fill(text, blocks(results))


def blocks(results: Path) -> dict[str, str]:
    """Every table by its name."""
    speed, scaling = (_read(results / f"{name}_cpu.json") for name in ("speed", "scaling"))
    cuda = _read(results / "speed_cuda.json")
    return {
        "machine": _machine(speed, "make bench"),
        "speed": _speed(speed, "make bench"),
        "cuda": _speed(cuda, "python benchmarks/speed.py --device cuda"),
        "machine_of_the_rest": _machine(scaling, "python benchmarks/scaling.py"),
        "growth": _growth(scaling.get("growth")),
        "profile": _profile(scaling.get("profile")),
        "floor": _floor(scaling.get("profile")),
        "options": _options(scaling.get("options")),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _machine(results: dict[str, Any], command: str) -> str:
    if not results:
        return MISSING.format(command=command)
    facts = results["machine"]
    return (
        f"Measured on: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads of PyTorch "
        f"{facts['torch']}, Python {facts['python']}, {facts['system']}; up to {results['repeats']} repeats; load of "
        f"the machine when it ended, this work included: {facts['load']}."
    )


def _speed(results: dict[str, Any], command: str) -> str:
    if not results:
        return MISSING.format(command=command)
    return table([Row(**row) for rows in results["rows"].values() for row in rows])


def _growth(curves: dict[str, Any] | None) -> str:
    if not curves:
        return MISSING.format(command="python benchmarks/scaling.py --parts growth")
    lines = ["| what grows | measured on | seconds |", "|---|---|---|"]
    for name, curve in curves.items():
        points = ", ".join(f"{value}: {_seconds(took)}" for value, took in curve["seconds"].items())
        lines.append(f"| {name} | {curve['fixed']} | {points} |")
    return "\n".join(lines)


def _profile(jobs: dict[str, Any] | None) -> str:
    if not jobs:
        return MISSING.format(command="python benchmarks/scaling.py --parts profile")
    kinds = sorted({k for job in jobs.values() for k in job["shares"]}, key=lambda k: -_largest(jobs, k))
    lines = ["| share of the time | " + " | ".join(jobs) + " |", "|---|" + "--:|" * len(jobs)]
    for kind in kinds:
        shares = [f"{100 * job['shares'].get(kind, 0.0):.0f} %" for job in jobs.values()]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _largest(jobs: dict[str, Any], kind: str) -> float:
    return max(job["shares"].get(kind, 0.0) for job in jobs.values())


def _floor(jobs: dict[str, Any] | None) -> str:
    if not jobs:
        return MISSING.format(command="python benchmarks/scaling.py --parts profile")
    lines = [
        "| job | measured | GFLOP | floor of arithmetic | GB moved | floor of memory | measured / larger floor |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, job in jobs.items():
        floors, peak = job["floor_seconds"], job["peak"]
        lines.append(
            f"| {name} | {_seconds(job['seconds'])} | {job['gflop']:.1f} | {_seconds(floors['compute'])} at "
            f"{peak['flop_per_s'] / 1e9:.0f} GFLOP/s | {job['gbyte']:.2f} | {_seconds(floors['memory'])} at "
            f"{peak['bytes_per_s'] / 1e9:.1f} GB/s | {job['of_floor']:.1f} |"
        )
    return "\n".join(lines)


def _options(found: dict[str, Any] | None) -> str:
    if not found:
        return MISSING.format(command="python benchmarks/scaling.py --parts options")
    lines = ["| option | measured on | without | with | first call |", "|---|---|--:|--:|--:|"]
    for name, row in found.items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} | | | |")
            continue
        first = _seconds(row["first_call"]) if "first_call" in row else ""
        lines.append(f"| {name} | {row['what']} | {_seconds(row['without'])} | {_seconds(row['with'])} | {first} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def main() -> int:
    """Write the page, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old)
    if not arguments.check:
        write_text(PAGE, new)
    elif new != old:
        print(f"{PAGE} does not show the results; run python benchmarks/performance_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
