# SPDX-License-Identifier: Apache-2.0
"""What is measured: the runs of each part, each a dict of what tells it from others, and how one of them is done.

Results are kept in a JSON file a part, a line a row; a row belongs to the planned run whose entries it repeats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from samda import evaluate, load_model
from samda.data import find_cases
from samda.inference import body_slices
from samda.io import cache_dir, write_text
from samda.task import Task

from . import fields, peft_lora
from .adaptation import adapt, measure_site, real_targets, site_targets
from .apart import run_there
from .datasets import ALL, DATASETS, SPLITS, split, write_list
from .growth import grow, growths
from .methods import ABLATIONS, ENCODER, METHODS, rivals_of, train_and_predict

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
SHORT, LONG = 300, 1800  # CPU seconds
BUDGETS = (45, 90, 180)  # CPU seconds, how soon a model is of use; beside `SHORT`
SEEDS, DEMO_SEEDS = 3, 5
BASELINE = "pyramid"  # what adapters are compared with
SCORES = ("dice", "nsd", "hd95_mm")

Run = dict[str, Any]


def planned(part: str) -> list[Run]:
    """The runs of a part, the most telling ones first, each with the fingerprint of its settings.

    Raises:
        KeyError: there is no such part.
    """
    runs = PARTS[part]()
    for run in runs:
        run["setup"] = _setup(run)
    return runs


def _setup(run: Run) -> str:
    """Changes with what was set for a run, so that rows of another protocol are not taken for this one's."""
    name = run.get("method", "")
    settings = [
        DATASETS.get(run.get("data", "")),
        (METHODS | ABLATIONS).get(name, name),
        fields.NETWORKS.get(run.get("network")),
    ]
    if run.get("data") in SPLITS:
        settings.append(SPLITS[run["data"]])
    text = json.dumps(settings, default=dataclasses.asdict, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _trainings(data: str) -> list[Run]:
    """The head and its rivals at every count, then with more time; other heads and adapters; then further seeds."""
    entry, runs = DATASETS[data], []
    key = (BASELINE, *rivals_of(entry.dimensions))
    others = tuple(name for name in METHODS if name not in (*key, *ENCODER))
    some = [n for n in entry.counts if n in (10, 30)] or [ALL]  # patients for adapters of the encoder
    long = [n for n in entry.counts if n in (30, ALL)]

    def add(methods: tuple[str, ...], counts: Sequence[int], seeds: Sequence[int] = (0,), budget: int = SHORT) -> None:
        runs.extend(_training(data, n, name, seed, budget) for seed in seeds for n in counts for name in methods)

    add(key, entry.counts)
    add(key, long, budget=LONG)
    add(others, entry.counts)
    add(ENCODER, some)
    add((*key, *others), entry.counts, range(1, SEEDS))
    if data == "hippocampus":
        add(ENCODER, some, range(1, SEEDS))
    return runs


def _training(data: str, count: int, method: str, seed: int, budget: int) -> Run:
    return {"data": data, "patients": count, "method": method, "seed": seed, "budget": budget}


def _ablations() -> list[Run]:
    return [_training("hippocampus", 10, name, seed, SHORT) for seed in range(SEEDS) for name in ABLATIONS]


def _soon() -> list[Run]:
    return [_training("hippocampus", 30, name, 0, n) for n in BUDGETS for name in (BASELINE, "DynUNet 3-D")]


PARTS: dict[str, Callable[[], list[Run]]] = {
    **{name: lambda name=name: _trainings(name) for name in DATASETS if name in SPLITS},
    "demo": lambda: [{"demo": "A, B, M", "seed": seed} for seed in range(DEMO_SEEDS)],
    "soon": _soon,
    "ablations": _ablations,
    "adaptation": real_targets,
    "shifts": site_targets,
    "fields": lambda: [{"network": name} for name in fields.NETWORKS],
    "growth": growths,
    "peft": lambda: [{"compared": "LoRA of peft and of samda"}],
}


def stored(part: str) -> list[Run]:
    """All rows that are kept, those of other settings included."""
    file = RESULTS / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def read(part: str) -> list[Run]:
    """The rows of the planned runs that are there, in the order of the plan."""
    rows = stored(part)
    return [row for run in planned(part) for row in rows if run.items() <= row.items()]


def missing(part: str) -> list[Run]:
    """The planned runs without a row; one that could not run is tried again."""
    rows = [row for row in stored(part) if "not_run" not in row]
    return [run for run in planned(part) if not any(run.items() <= row.items() for row in rows)]


def store(part: str, row: Run) -> None:
    """Add a row to what is kept now, perhaps by another command, in place of an older one of the same run."""
    keys = {key for run in planned(part)[:1] for key in run} - {"setup"}
    lock = cache_dir() / "evidence" / f"{part}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        kept = [other for other in stored(part) if any(other.get(key) != row.get(key) for key in keys)]
        lines = ",\n".join(json.dumps(one, sort_keys=False) for one in [*kept, row])
        write_text(RESULTS / f"{part}.json", f"[\n{lines}\n]\n")


def measure(run: Run, root: Path | None) -> Run:
    """The run with its results; in a process whose calculations take one core.

    Args:
        run: of :func:`planned`.
        root: folder of the data sets.

    Raises:
        NotRun: a program cannot run here.
        FileNotFoundError: `root` lacks the data set, or is None.
    """
    torch.set_num_threads(1)
    if root is None and ("data" in run or "target" in run):
        name = run.get("data") or run["source"]
        raise FileNotFoundError(f"{name} needs --data FOLDER; docs/evidence.md names the sources")
    if "target" in run:
        return run | measure_site(run, root)
    if "objective" in run:
        return run | adapt(run["case"], run["objective"], run["seed"])
    if "network" in run:
        return run | fields.measure_network(run["network"])
    if "compared" in run:
        return run | peft_lora.compare()
    with tempfile.TemporaryDirectory(prefix="samda-evidence-") as name:
        folder = Path(name)
        if "growth" in run:
            return run | grow(run, root, folder)
        if "demo" in run:
            return run | _measure_demo(run["seed"], folder / "demo")
        row = _measure_training(run, root, folder)
        return run | row | {"processor": torch.backends.cpu.get_cpu_capability()}


def _measure_training(run: Run, root: Path, folder: Path) -> Run:
    data, lists = run["data"], []
    for name in filter(None, (data, DATASETS[data].elsewhere)):
        training, test = split(name, root, run["patients"], run["seed"])
        lists.append(write_list(name, training, test, folder / f"{name}.json"))
    entry = DATASETS[data]
    row = train_and_predict(run["method"], lists, folder, run["budget"], run["seed"], entry.classes)
    row["test"] = {}
    for file in lists:
        task = Task(name=file.stem, classes=entry.classes)
        found = evaluate(folder / "predictions" / file.stem, file, task, None, DATASETS[file.stem].tolerance, "test")
        if found.failed:
            raise RuntimeError(
                f"{file.stem}: {len(found.failed)} cases without scores: {next(iter(found.failed.values()))}"
            )
        patient = {case["id"]: case["patient"] for case in json.loads(file.read_text(encoding="utf-8"))["test"]}
        row["test"][file.stem] = by_patient(found.cases, patient, entry.classes[1:])
    if run["method"] in ENCODER and (data, run["patients"], run["seed"]) == ("hippocampus", 10, 0):
        row["field"] = _field_of(folder / "model", lists[0])
    return row


def by_patient(cases: Mapping[str, Any], patient: Mapping[str, str], classes: tuple[str, ...]) -> dict[str, Any]:
    """Patient -> class -> [Dice, NSD, HD95], the mean over the patient's cases that have a value, else None."""
    rows: dict[str, Any] = {}
    for name in sorted(set(patient.values())):
        mine = [scores for case, scores in cases.items() if patient[case] == name]
        rows[name] = {}
        for k, label in enumerate(classes):
            values = [[getattr(scores[k], score) for scores in mine] for score in SCORES]
            known = [[v for v in column if not math.isnan(v)] for column in values]
            rows[name][label] = [round(statistics.fmean(column), 4) if column else None for column in known]
    return rows


def _field_of(model: Path, data: Path) -> dict[str, Any]:
    network, task, _ = load_model(model)
    return fields.measure(network, body_slices(find_cases(data), task, fields.IMAGES))


def _measure_demo(seed: int, folder: Path) -> Run:
    """`samda demo`: Dice of each organ that the scan shows, over all its slices together, plain and adapted."""
    run_there([sys.executable, "-m", "samda", "demo", "-o", folder, "--seed", seed, "--quiet"], timeout=None)
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    dice = {}
    for part, suffix in (("scores", ""), ("adapted", ", adapted")):
        for what, score in content[part].items():
            shown = {name for case in score["cases"].values() for name, s in case.items() if s["label_ml"] > 0}
            classes = score["summary"]["classes"]
            dice[what + suffix] = {n: round(e["pooled_dice"], 4) for n, e in classes.items() if n in shown}
    return {"seconds": content["seconds"], "dice": dice}
