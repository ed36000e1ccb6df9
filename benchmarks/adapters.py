# SPDX-License-Identifier: Apache-2.0
"""Every adapter on the same slices: parameters, rates, seconds, memory, and Dice on three patients.

    python benchmarks/adapters.py [--adapters sam_da,salt] [--epochs 300] [--encoder-epochs 40]

Patient A trains (`samda demo` has the same split), B and M are seen for the first time: B comes from another scanner,
with contrast medium; M is an MR scan given to a model that was trained on CT. One patient of each kind, labels that
another model predicted, one seed: a demonstration, no ranking. Adapters that leave the encoder as it is train on
embeddings computed once, for `--epochs`; the others encode in every step, and get `--encoder-epochs`. Each runs in a
process of its own; a row that exists is not measured again. Results: `benchmarks/results/adapters.json`; `--page` fills
docs/adapters.md from them and measures nothing.
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
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filling import fill

from samda.io import load_yaml, packaged, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "adapters.md", ROOT / "benchmarks" / "results" / "adapters.json"
SEEDS = RESULTS.with_name("adaptation.json")  # five trainings of SAM-DA on all of A, plain predictions of B and M
RATES = ("learning_rate", "head_learning_rate")
FROZEN = ("head", "sam_da", "decoder")  # these leave the encoder as it is
TRAINED = ("norm", "lora", "salt", "lka", "dka", "bottleneck", "flagship", "full")
PATIENTS = {"A": "A, held-out slices", "B": "B, other scanner", "M": "M, MR"}


def measure(adapter: str, epochs: int, folder: Path) -> dict[str, Any]:
    """Train one adapter and score it; runs alone in its process, whose peak memory is its own."""
    import torch

    from samda.cli.demo import RECIPE, hold_out
    from samda.examples import fetch_examples
    from samda.inference.evaluate import evaluate
    from samda.inference.predict import Predictor, predict_folder
    from samda.models.folder import load_model
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
    network, _, record = load_model(folder / "model")
    dice = {}
    for patient, dataset in datasets.items():
        own = examples[patient].task  # labels have other ids in M, and its intensities are scaled by percentiles
        predict_folder(Predictor(network, own), dataset, folder / patient)
        summary = evaluate(folder / patient, dataset, own, section="test").summary()
        dice[patient] = round(summary["all"]["pooled_dice"], 4)
    counts = trained["parameters"]
    return {
        "adapter": adapter,
        "adapter_parameters": counts["trainable"] - counts["head"],
        "head_parameters": counts["head"],
        **{key: record["training"]["settings"][key] for key in RATES},
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


def filled(text: str) -> str:
    """docs/adapters.md with what comes from results made anew, see :func:`filling.fill`."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    return fill(text, {"measured": table(rows), "rates": rates(rows), "seeds": seeds(json.loads(SEEDS.read_text()))})


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ["adapter", "trained parameters (without head)", "learning rate", "of the head", "epochs", "seconds"]
    head += ["peak memory (GB)", *PATIENTS.values()]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for row in rows:
        rate = f"{row['learning_rate']:g}" if row["adapter_parameters"] else ""  # `head` trains nothing else
        cells = [f"`{row['adapter']}`", f"{row['adapter_parameters']:,}", rate, f"{row['head_learning_rate']:g}"]
        cells += [row["epochs"], row["seconds"], f"{row['peak_memory_gb']:.1f}"]
        lines.append([*cells, *(f"{row['dice'][patient]:.3f}" for patient in PATIENTS)])
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def rates(rows: Iterable[Mapping[str, Any]]) -> str:
    """Which of the measured rates are not those that `samda train --adapter` takes."""
    defaults = json.loads(packaged("bundles", "sam_segmentation", "configs", "train.json").read_text(encoding="utf-8"))
    other: dict[str, list[str]] = {}
    for row in rows:
        overlay = load_yaml(packaged("configs", "adapters", f"{row['adapter']}.yaml").read_text(encoding="utf-8"))
        shipped = {key: overlay.get(key, defaults[key]) for key in RATES}
        if shipped != {key: row[key] for key in RATES}:
            taken = "{learning_rate:g} (head: {head_learning_rate:g})".format(**shipped)
            other.setdefault(taken, []).append(f"`{row['adapter']}`")
    exceptions = "".join(
        f", except for {', '.join(names)}, to which it gives {taken}" for taken, names in other.items()
    )
    return wrapped(f"These are the rates of `samda train --adapter`{exceptions}.")


def seeds(results: Mapping[str, Any]) -> str:
    """How far the same training swings on B and M, from benchmarks/adaptation.py."""
    plain = [run for run in results["runs"] if run["family"] == "real" and run["method"] == "none"]
    count = len({run["seed"] for run in plain})
    ranges = []
    for case in ("B", "M"):
        dice = [run["mean_dice"]["source"] for run in plain if run["case"] == case]
        ranges.append(f"{min(dice):.3f} to {max(dice):.3f} on {case}")
    return wrapped(
        f"SAM-DA trained on all of A, with seeds 0 to {count - 1}, gave {' and '.join(ranges)}, as a mean over the "
        "organs that the scan shows ([adaptation.md](adaptation.md)): a kidney in the map of B changes nothing there "
        "and counts 0 in the table above."
    )


def wrapped(text: str) -> str:
    """A paragraph in lines of the page's width."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default=",".join((*FROZEN, *TRAINED)), help="comma-separated names of overlays")
    parser.add_argument("--epochs", type=int, default=300, help="of adapters that leave the encoder as it is")
    parser.add_argument("--encoder-epochs", type=int, default=40, help="of the others")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default %(default)s")
    parser.add_argument("--page", action="store_true", help="write docs/adapters.md, measure nothing")
    parser.add_argument("--alone", metavar="ADAPTER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(arguments.alone, arguments.epochs, Path(folder))
        print("ROW " + json.dumps(row))
        return
    if arguments.page:
        write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
        return
    rows = (
        {row["adapter"]: row for row in json.loads(arguments.results.read_text())} if arguments.results.exists() else {}
    )
    for adapter in arguments.adapters.split(","):
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
