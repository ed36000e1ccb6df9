# SPDX-License-Identifier: Apache-2.0
"""Evidence on real patients that can be run again: methods, few labels, rivals, ablations, receptive fields.

    python -m benchmarks.evidence --data FOLDER                        every part, then docs/evidence.md
    python -m benchmarks.evidence --data FOLDER --parts hippocampus    one part
    python -m benchmarks.evidence --data FOLDER --minutes 30           half an hour for each part
    python -m benchmarks.evidence --page                               only the pages, from the results that are there

FOLDER holds the data sets that docs/evidence.md lists, each in a folder of its name. Each run is stored in
`benchmarks/results/evidence` when it ends, and not measured again as long as its settings stay; stopped at any moment,
the same command goes on. What a budget left out is said here and on the page.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..timing import names_of
from .apart import NotRun
from .page import write_pages
from .runs import PARTS, measure, missing, store


def main() -> None:
    """Measure what is missing, then write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the data sets; not needed for demo, fields, peft")
    every = ",".join(PARTS)
    parser.add_argument("--parts", type=names_of(PARTS), default=every, metavar="NAMES", help="default %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=120, metavar="N", help="after which a part begins no run; default %(default)s"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default: one per core")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error(f"there is no folder {arguments.data}")
    one = functools.partial(measure, root=arguments.data)
    chosen = [] if arguments.page else arguments.parts
    failed = sum(complete(part, arguments.minutes, arguments.processes, one) for part in chosen)
    write_pages()
    if failed:
        raise SystemExit(f"{failed} runs failed, see above; the same command tries them again")


def complete(part: str, minutes: float, processes: int, measure: Callable[[dict], dict]) -> int:
    """Measure the runs of a part that have no row yet, until the time is up; how many of them failed."""
    todo, failed = missing(part), 0
    end = time.monotonic() + 60 * minutes
    # processes of their own: PyTorch's threads and a fork do not go together
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, dict[str, Any]] = {}
        while todo or running:
            while todo and len(running) < processes and time.monotonic() < end:
                run = todo.pop(0)
                running[pool.submit(measure, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    store(part, future.result())
                except BrokenProcessPool:
                    print(f"{part} {run}: its process was killed, perhaps for lack of memory", file=sys.stderr)
                    return failed + 1 + len(running)
                except Exception as error:
                    failed += 1
                    print(f"{part} {run}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    if isinstance(error, NotRun):
                        store(part, run | {"not_run": str(error)})
                else:
                    print(f"{part} {run}: done", file=sys.stderr, flush=True)
    if todo:
        print(f"{part}: {len(todo)} runs left out, its {minutes:g} minutes are spent", file=sys.stderr)
    return failed


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; finished runs are kept, the same command goes on") from None
