# SPDX-License-Identifier: Apache-2.0
"""Speed and memory against named rivals, side by side in one run: `make bench`, or some rows:

    python benchmarks/speed.py [--rows encoder,salt,dka] [--repeats 5] [--device cuda] [--model MODEL]

Prints a table and writes `benchmarks/results/speed_<device>.json`, in which rows that were not asked for stay as they
are. Rows that need a GPU say "not measured" without one. Rivals: `benchmarks/rivals.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Options, Row, interleave, machine, median, table
from network_rows import dka, encoder, merged
from training_rows import embeddings, salt, salt_step, training_memory
from volume_rows import adapt, predict

from samda.io import write_json

RESULTS = Path(__file__).parent / "results"


def start(options: Options) -> Iterator[Row]:
    """`samda --help`."""

    def run() -> None:
        subprocess.run([sys.executable, "-m", "samda", "--help"], check=True, capture_output=True)

    seconds = interleave({"samda --help": run}, options.repeats)
    took = median(seconds["samda --help"])
    yield Row("`samda --help`", "-", "< 0.5 s", seconds, f"{took:.2f} s", took < 0.5)


ROWS = {
    row.__name__: row
    for row in (encoder, training_memory, salt, salt_step, merged, dka, embeddings, predict, adapt, start)
}


def main() -> None:
    """Measure the chosen rows, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated names of rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", type=Path, help="a trained vit_t for the rows predict and adapt; default: train one")
    parser.add_argument("--memory-size", type=int, default=1024, help="pixels, of the row training_memory")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; choose from {', '.join(ROWS)}")
    options = Options(arguments.device, arguments.repeats, arguments.model, arguments.memory_size)
    path = arguments.results / f"speed_{options.device}.json"
    measured = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in names:
        rows = []
        for row in ROWS[name](options):
            print(f"{row.what}: {row.result}  [{row.goal}]", file=sys.stderr, flush=True)
            rows.append(vars(row))
        measured[name] = rows
        ordered = {key: measured[key] for key in ROWS if key in measured}
        write_json(path, {"machine": machine(options.device), "repeats": options.repeats, "rows": ordered})
    print(table([Row(**row) for rows in ordered.values() for row in rows]))


if __name__ == "__main__":
    main()
