# SPDX-License-Identifier: Apache-2.0
"""Do the slices above and below help? And does the largest piece? The same training with and without, three seeds.

    python benchmarks/context.py [--seeds 0,1,2] [--epochs 100]

`vit_t` with `sam_da` trains on patient A as in `samda demo` (same blocks of slices, same recipe, embeddings computed
once), with `context` 0 and 1. Scored are A's held-out slices, B (another scanner, contrast medium) and M (MR), as the
network gives them and with `keep_largest` for every class. A's held-out slices are five blocks of five slices cut out
as scans of their own: at the ends of a block the missing neighbor is the border slice, and an organ may be cut into
pieces there, so A says little about either. One patient of each kind, labels that another model predicted: a
demonstration, no ranking. A row that exists is not measured again; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from samda.io import write_json

RESULTS = Path(__file__).parent / "results" / "context.json"
EPOCHS = 100  # fewer than those of the demo
PATIENTS = {"A": "A, held-out slices", "B": "B, other scanner", "M": "M, MR"}


def measure(context: int, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train once and score three patients in both ways."""
    import torch

    from samda.cli.demo import RECIPE, hold_out
    from samda.examples import fetch_examples
    from samda.inference.evaluate import evaluate
    from samda.inference.postprocessing import override
    from samda.inference.predict import Predictor, predict_folder
    from samda.models.folder import load_model
    from samda.training import train

    start = time.perf_counter()
    examples = fetch_examples()
    datasets = {
        "A": hold_out(examples["A"], folder / "data"),
        "B": examples.folder / "abdomen_ct.json",
        "M": examples.folder / "abdomen_mr.json",
    }
    task = dataclasses.replace(examples["A"].task, context=context)
    recipe = {key: min(value, epochs) for key, value in RECIPE.items()} | {"epochs": epochs, "seed": seed}
    trained = train(datasets["A"], folder / "model", task, "sam_da", "vit_t", recipe, overwrite=True)
    network, _, _ = load_model(folder / "model")
    dice: dict[str, dict[str, float]] = {"plain": {}, "keep_largest": {}}
    for name, kept in (("plain", False), ("keep_largest", True)):
        for patient, dataset in datasets.items():
            own = override(dataclasses.replace(examples[patient].task, context=context), kept)
            output = folder / f"{patient}_{name}"
            predict_folder(Predictor(network, own), dataset, output)
            summary = evaluate(output, dataset, own, section="test").summary()
            dice[name][patient] = round(summary["all"]["pooled_dice"], 4)
    return {
        "context": context,
        "seed": seed,
        "epochs": epochs,
        "best_epoch": trained["best_epoch"],
        "seconds": round(time.perf_counter() - start),
        "training_seconds": round(trained["seconds"] + trained["embeddings"]["seconds"]),
        "dice": dice,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds, as a Markdown table."""
    lines = ["| context | keep_largest | seeds | " + " | ".join(f"Dice {name}" for name in PATIENTS.values()) + " |"]
    lines.append("|--:|---|--:|" + "--:|" * len(PATIENTS))
    for context in sorted({row["context"] for row in rows}):
        mine = [row for row in rows if row["context"] == context]
        for name, word in (("plain", "no"), ("keep_largest", "yes")):
            cells = []
            for patient in PATIENTS:
                values = [row["dice"][name][patient] for row in mine]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"| {context} | {word} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="default %(default)s")
    parser.add_argument("--contexts", default="0,1", help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default %(default)s")
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    contexts, seeds = ([int(word) for word in text.split(",")] for text in (arguments.contexts, arguments.seeds))
    wanted = [(context, seed) for seed in seeds for context in contexts]
    for context, seed in [] if arguments.table else wanted:
        if any((r["context"], r["seed"], r["epochs"]) == (context, seed, arguments.epochs) for r in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(context, seed, arguments.epochs, Path(folder)))
        print(f"context {context}, seed {seed}: {rows[-1]['dice']}", file=sys.stderr, flush=True)
        write_json(arguments.results, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
