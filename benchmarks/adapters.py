# SPDX-License-Identifier: Apache-2.0
"""Every adapter on the same slices: parameters, seconds, memory, and Dice on three patients.

    python benchmarks/adapters.py [--adapters sam_da,salt] [--epochs 300] [--encoder-epochs 40]

Patient A trains (`samda demo` has the same split), B and M are seen for the first time: B comes from another scanner,
with contrast medium; M is an MR scan given to a model that was trained on CT. One patient of each kind, labels that
another model predicted, one seed: a demonstration, no ranking. Adapters that leave the encoder as it is train on
embeddings computed once, for `--epochs`; the others encode in every step, and get `--encoder-epochs`. Each runs in a
process of its own; a row that exists is not measured again. Results: `benchmarks/results/adapters.json`; `--table`
prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from samda.files import write_json

RESULTS = Path(__file__).parent / "results" / "adapters.json"
FROZEN = ("head", "sam_da", "decoder")  # these leave the encoder as it is
TRAINED = ("norm", "lora", "salt", "lka", "dka", "bottleneck", "flagship", "full")
PATIENTS = {"A": "A, held-out slices", "B": "B, other scanner", "M": "M, MR"}


def measure(adapter: str, epochs: int, folder: Path) -> dict[str, Any]:
    """Train one adapter and score it; runs alone in its process, whose peak memory is its own."""
    import torch

    from samda.cli.demo import RECIPE, hold_out
    from samda.data.examples import fetch_examples
    from samda.inference.evaluate import evaluate
    from samda.inference.predict import Predictor, predict_folder
    from samda.networks.model_folder import load_model
    from samda.training import train

    examples = fetch_examples()
    task = examples["A"].task
    datasets = {
        "A": hold_out(examples["A"], folder / "data"),
        "B": examples.folder / "abdomen_ct.json",
        "M": examples.folder / "abdomen_mr.json",
    }
    recipe = RECIPE | {"epochs": epochs, "val_interval": min(RECIPE["val_interval"], epochs)}
    if adapter == "full":
        recipe |= {"learning_rate": 1e-4, "head_learning_rate": 1e-3}  # of the whole network: small steps
    elif adapter not in FROZEN:
        recipe |= {"learning_rate": 1e-3}  # adapters of the encoder sit in every layer; 3e-3 is for the decoder's
    trained = train(datasets["A"], folder / "model", task, adapter, "vit_t", recipe, overwrite=True)
    network, _, _ = load_model(folder / "model")
    dice = {}
    for patient, dataset in datasets.items():
        own = examples[patient].task  # labels have other ids in M, and its intensities are scaled by percentiles
        predict_folder(Predictor(network, own), dataset, folder / patient, section="test")
        summary = evaluate(folder / patient, dataset, own, section="test").summary()
        dice[patient] = round(summary["all"]["pooled_dice"], 4)
    counts = trained["parameters"]
    return {
        "adapter": adapter,
        "adapter_parameters": counts["trainable"] - counts["head"],
        "head_parameters": counts["head"],
        "epochs": epochs,
        "seconds": round(trained["seconds"] + (trained["embeddings"] or {}).get("seconds", 0)),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "dice": dice,
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "system": platform.system(),
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| adapter | trained parameters (without head) | epochs | seconds | peak memory (GB) | "
        + " | ".join(f"Dice {name}" for name in PATIENTS.values())
        + " |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        dice = " | ".join(f"{row['dice'][patient]:.3f}" for patient in PATIENTS)
        lines.append(
            f"| `{row['adapter']}` | {row['adapter_parameters']:,} | {row['epochs']} | {row['seconds']} | "
            f"{row['peak_memory_gb']:.1f} | {dice} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default=",".join((*FROZEN, *TRAINED)), help="comma-separated names of overlays")
    parser.add_argument("--epochs", type=int, default=300, help="of adapters that leave the encoder as it is")
    parser.add_argument("--encoder-epochs", type=int, default=40, help="of the others")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default %(default)s")
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    parser.add_argument("--alone", metavar="ADAPTER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(arguments.alone, arguments.epochs, Path(folder))
        print("ROW " + json.dumps(row))
        return
    rows = (
        {row["adapter"]: row for row in json.loads(arguments.results.read_text())} if arguments.results.exists() else {}
    )
    for adapter in [] if arguments.table else arguments.adapters.split(","):
        epochs = arguments.epochs if adapter in FROZEN else arguments.encoder_epochs
        if rows.get(adapter, {}).get("epochs") == epochs:
            continue
        command = [sys.executable, __file__, "--alone", adapter, "--epochs", str(epochs)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if not found:
            print(f"{adapter}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        rows[adapter] = json.loads(found[0].removeprefix("ROW "))
        print(f"{adapter}: {rows[adapter]['dice']}, {rows[adapter]['seconds']} s", file=sys.stderr, flush=True)
        write_json(arguments.results, list(rows.values()))
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
