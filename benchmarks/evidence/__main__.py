# SPDX-License-Identifier: Apache-2.0
"""Evidence that can be run again: adapters, few labels, receptive fields, rivals.

    python -m benchmarks.evidence                        every part, then docs/evidence.md
    python -m benchmarks.evidence --parts encoder        one part
    python -m benchmarks.evidence --minutes 30           at most half an hour for each part
    python -m benchmarks.evidence --page                 only the page, from the results that are there

Each run is stored in `benchmarks/results/evidence/` when it ends, and never measured again; stopped at any moment, the
same command goes on. What a budget left out is said here and on the page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from samda.files import write_json

from .page import write_page
from .parts import PARTS, measure, planned, results_file


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between; default %(default)s")
    parser.add_argument("--minutes", type=float, default=120, metavar="N", help="of each part; default %(default)s")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default: one a core")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    for part in [] if arguments.page else arguments.parts.split(","):
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
        complete(part, arguments.minutes, arguments.processes)
    write_page()


def complete(part: str, minutes: float, processes: int, measure: Callable[[dict], dict] = measure) -> None:
    """Measure the runs of a part that have no row yet, until the time is up."""
    file = results_file(part)
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    missing = [run for run in planned(part) if not any(run.items() <= row.items() for row in rows)]
    end = time.monotonic() + 60 * minutes
    # processes of their own: PyTorch's threads and a fork do not go together
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, dict[str, Any]] = {}
        while missing or running:
            while missing and len(running) < processes and time.monotonic() < end:
                run = missing.pop(0)
                running[pool.submit(measure, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    rows.append(future.result())
                except Exception as error:
                    print(f"{part} {run}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                write_json(file, rows)
                print(f"{part} {run}: Dice {rows[-1].get('dice')}", file=sys.stderr, flush=True)
    if missing:
        print(f"{part}: {len(missing)} runs left out, its {minutes:g} minutes are spent", file=sys.stderr)


if __name__ == "__main__":
    main()
