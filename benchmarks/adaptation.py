# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation: every objective, the same protocol, several source models, labels for scoring alone.

    python -m benchmarks.adaptation -o /tmp/adaptation                 everything; hours on two cores, resumable
    python -m benchmarks.adaptation -o /tmp/adaptation --cases B M --methods none tent default --seeds 0 1
    python -m benchmarks.adaptation -o /tmp/adaptation --table         print what is there
    python -m benchmarks.adaptation -o /tmp/plain --plain --cases B M --methods none   another source recipe

Scores go to FOLDER/summary.json, or where `--results` says; `benchmarks/results/adaptation.json` was written so.

Source models are trained on patient A, one per seed, with the shipped recipe. Targets: B (another scanner, contrast
medium), M (MR), and simulated shifts of A (`benchmarks/shifts.py`). Settings may be chosen on the family "tuning"
alone; B, M and the family "report" are reported. For each case and objective three predictions are scored: the
source's, the last iterate's (what the objective does when left alone) and the final one (best iterate, after the
guard).

One patient each, labeled by another model: a demonstration of domain shift, not a clinical benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from samda.adaptation.engine import Adaptation
from samda.adaptation.objectives import OBJECTIVES
from samda.data import build_preprocessing
from samda.examples import Examples, fetch_examples
from samda.io import write_json
from samda.metrics import confusion_matrix
from samda.models.folder import load_model
from samda.networks.segmenter import SamSegmenter
from samda.provenance import now, sha256_of, versions
from samda.task import Task

from .shifts import Shift, shifts

SLABS = ((60, 86), (86, 112))  # slices of A that hold organs, in two halves: slabs miss whole organs
METHODS = tuple(OBJECTIVES)
# the same budget for every objective of the literature: steps and rate of the table's caption
LITERATURE = {"steps": 8, "lr": 1e-3}
Data = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A scan to adapt to, and how to make it."""

    name: str
    family: str  # "real", "tuning" or "report"
    mild: bool
    modality: str
    make: Callable[[], Data]  # {"image": (1, X, Y, Z), "label": (1, X, Y, Z)}, preprocessed


def targets(examples: Examples) -> list[Target]:
    """B, M, and two slabs of A under every shift."""

    def real(name: str) -> Callable[[], Data]:
        example = examples[name]
        return lambda: build_preprocessing(example.task, labels=True)(dict(example.case))

    found = [Target(name, "real", False, examples[name].task.modality, real(name)) for name in ("B", "M")]
    for number, shift in enumerate(shifts(examples["A"].task.classes)):
        slabs = SLABS if shift.family != "report" else SLABS[number % 2 :][:1]
        for slab in slabs:
            name = f"{shift.name}/{slab[0]}"
            found.append(
                Target(name, shift.family, shift.mild, "CT", lambda s=shift, z=slab: simulated(examples, s, z))
            )
    return found


def simulated(examples: Examples, shift: Shift, slab: tuple[int, int]) -> Data:
    """A slab of patient A under a shift."""
    example = examples["A"]
    data = build_preprocessing(example.task, labels=True)(dict(example.case))
    image, label = (data[key].as_tensor()[..., slab[0] : slab[1]].contiguous() for key in ("image", "label"))
    spacing = np.linalg.norm(np.asarray(data["image"].affine)[:3, :3], axis=0)
    low, high = example.task.window
    changed, label = shift(image, label, spacing, high - low)
    return {"image": MetaTensor(changed, affine=data["image"].affine), "label": label, "id": shift.name}


class Memo:
    """An encoder that remembers: source models share their base, and objectives their views."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.encode, self.known = encode, {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        keys = [sha256_of(image.numpy()) for image in images]
        missing = [i for i, key in enumerate(keys) if key not in self.known]
        if missing:
            for i, embedding in zip(missing, self.encode(images[missing]), strict=True):
                self.known[keys[i]] = embedding
        return torch.stack([self.known[key] for key in keys])


def source_model(folder: Path, seed: int, examples: Examples, epochs: int, tissue: float) -> Path:
    """The model folder of a seed, trained if it is not there; `tissue` weighs the random tissue contrasts."""
    model = folder / "models" / f"seed{seed}"
    if not (model / "adapter.json").exists():
        from samda.cli.demo import RECIPE
        from samda.training import train

        overrides = RECIPE | {"seed": seed, "epochs": epochs, "train::augmentation::tissue": tissue}
        train(
            examples.folder / "abdomen_ct.json", model, examples["A"].task, "sam_da", "vit_t", overrides, overwrite=True
        )
    return model


def dice(prediction: np.ndarray, label: np.ndarray, task: Task) -> dict[str, float]:
    """Dice of each class that the label holds."""
    counts = confusion_matrix(prediction, label, task.num_classes)
    shown = [(k, name) for k, name in enumerate(task.classes) if k and counts[k].any()]
    return {name: float(2 * counts[k, k] / (counts[k].sum() + counts[:, k].sum())) for k, name in shown}


def run_case(
    network: SamSegmenter,
    task: Task,
    record: dict,
    target: Target,
    data: Data,
    methods: Sequence[str],
    folder: Path,
    seed: int,
) -> Iterator[Path]:
    """Every objective on one case with one source model; the case is prepared once."""
    prepared = None
    label = np.asarray(data["label"])[0]
    for method in methods:
        path = folder / "runs" / f"{target.name.replace('/', '_')}-seed{seed}-{method}.json"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {} if method in ("default", "none") else LITERATURE
        engine = Adaptation(network, task, record, method=method, modality=target.modality, **settings)
        if prepared is None:
            prepared = engine.prepare_data(data, target.name)
        begin = time.perf_counter()
        outcome = engine.decide(prepared)
        run = outcome.run
        final = outcome.adapted if outcome.accepted and outcome.adapted is not None else prepared.source
        last = engine.predict(prepared, run.last) if run is not None and engine.settings.steps else prepared.source
        predictions = {"source": prepared.source, "last": last, "final": final}
        scores = {what: dice(p.labels, label, task) for what, p in predictions.items()}
        row = {
            "case": target.name,
            "family": target.family,
            "mild": target.mild,
            "seed": seed,
            "method": method,
            "dice": scores,
            "mean": {what: statistics.fmean(score.values()) for what, score in scores.items()},
            "decision": dataclasses.asdict(outcome.decision),
            "error": outcome.error,
            "quality": {
                "source": outcome.source.to_dict(engine.guard.absent),
                "adapted": None if outcome.evidence is None else outcome.evidence.to_dict(engine.guard.absent),
            },
            "curves": None
            if run is None
            else {k: getattr(run, k) for k in ("loss", "agreement", "entropy", "displacement", "best_step")},
            "config": engine.config,
            "seconds": round(time.perf_counter() - begin, 2),
            "time": now(),
            "versions": versions(),
        }
        write_json(path, row)
        yield path


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """All results that are there."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def table(rows: list[dict[str, Any]]) -> str:
    """One line per objective: mean Dice over the seeds without and with the guard, and the worst loss of a seed."""
    columns = [("B", lambda r: r["case"] == "B"), ("M", lambda r: r["case"] == "M")]
    for family in ("report", "tuning"):
        for mild in (True, False):
            chosen = [r for r in rows if r["family"] == family and r["mild"] == mild]
            if chosen:
                name = f"{family} {'mild' if mild else 'strong'}"
                columns.append((name, lambda r, f=family, m=mild: r["family"] == f and r["mild"] == m))
    lines = ["", "objective      " + "".join(f"{name:>34}" for name, _ in columns)]
    lines.append(" " * 15 + "   source   alone guarded  worst bad" * len(columns))
    for method in METHODS:
        cells = [_cell([r for r in rows if r["method"] == method and chosen(r)]) for _, chosen in columns]
        if any(cell.strip(" -") for cell in cells):
            lines.append(f"{method:<15}" + "".join(f"{cell:>34}" for cell in cells))
    lines += [
        "",
        "source: plain prediction; alone: last iterate, no guard; guarded: best iterate after the guard. Mean over the",
        "seeds of the mean Dice over organs present. worst: smallest gain of a case, guarded; bad: cases that lost",
        "more than 0.02.",
        f"Objectives of the literature: {LITERATURE['steps']} steps, rate {LITERATURE['lr']}; default: its own.",
    ]
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "-"
    means = [statistics.fmean(r["mean"][what] for r in rows) for what in ("source", "last", "final")]
    gains = [r["mean"]["final"] - r["mean"]["source"] for r in rows]
    bad = sum(gain < -0.02 for gain in gains)
    return f"{means[0]:.3f}   {means[1]:.3f}   {means[2]:.3f} {min(gains):+.3f} {bad:3d}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--cases", nargs="+", help="names or families: B, M, real, tuning, report; default all")
    parser.add_argument("--epochs", type=int, default=150, help="of the source models")
    parser.add_argument("--plain", action="store_true", help="train the source models without random tissue contrasts")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default FOLDER/summary.json")
    parser.add_argument("--table", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if not args.table:
        examples = fetch_examples()
        models = {
            seed: source_model(args.output, seed, examples, args.epochs, float(not args.plain)) for seed in args.seeds
        }
        chosen = [t for t in targets(examples) if not args.cases or {t.name, t.family} & set(args.cases)]
        for target in chosen:
            data, memo = target.make(), None
            for seed, model in models.items():
                network, task, record = load_model(model)
                memo = memo or Memo(network.encode)
                network.encode = memo
                for path in run_case(network, task, record, target, data, args.methods, args.output, seed):
                    row = json.loads(path.read_text())
                    print(f"{path.stem}: {row['mean']} {row['decision']['reason']}", file=sys.stderr, flush=True)
    rows = read_runs(args.output)
    text = table(rows)
    print(text)
    about = {"time": now(), "versions": versions(), "settings": {"literature": LITERATURE}}
    write_json(args.results or args.output / "summary.json", about | {"runs": [_short(r) for r in rows]})


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """One run as it is kept: what was scored, and what was decided."""
    kept = {key: row[key] for key in ("case", "family", "mild", "seed", "method", "seconds")}
    means = {what: round(value, 4) for what, value in row["mean"].items()}
    return kept | {"mean_dice": means, "reason": row["decision"]["reason"]}


if __name__ == "__main__":
    main()
