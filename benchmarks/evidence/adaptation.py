# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation: every objective, the same protocol, several source models, labels for scoring alone.

Source models are trained on all of patient A, one per seed, with the recipe of `samda demo`, and kept in the cache
folder. Targets: B (another scanner, contrast medium), M (MR), and simulated shifts of A (`shifts.py`). Settings may be
chosen on the family "tuning" alone; B, M and the family "report" are reported. Three predictions are scored: the
source's, the last iterate's (what the objective does when left alone) and the final one (best iterate, after the
guard).

One patient each, labeled by another model: a demonstration of domain shift, not a clinical benchmark.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from monai.data import MetaTensor

from samda import Task, fetch_examples, load_model, train
from samda.adaptation import OBJECTIVES, Adaptation
from samda.cli.demo import RECIPE
from samda.data import build_preprocessing
from samda.io import cache_dir
from samda.metrics import confusion_matrix

from .shifts import shifts

SLABS = ((60, 86), (86, 112))  # slices of A that hold organs, in two halves: slabs miss whole organs
SEEDS = 5
LITERATURE = {"steps": 8, "lr": 1e-3}  # the same budget for every objective of the literature
PLAIN = ("default", "none")  # with their own settings

Run = dict[str, Any]


def real_targets() -> list[Run]:
    """Every objective on B and M, from every source model."""
    return [
        {"case": case, "objective": objective, "seed": seed}
        for objective in OBJECTIVES
        for case in ("B", "M")
        for seed in range(SEEDS)  # innermost, so that processes side by side train different source models
    ]


def simulated_targets() -> list[Run]:
    """The default on slabs of A under every shift, from one source model."""
    runs = []
    for number, shift in enumerate(shifts(())):
        for first, _ in SLABS if shift.family != "report" else SLABS[number % 2 :][:1]:
            runs.append({"case": f"{shift.name}/{first}", "objective": "default", "seed": 0, "family": shift.family})
    return runs


def adapt(case: str, objective: str, seed: int) -> dict[str, Any]:
    """Adapt the source model of a seed to a case.

    Returns:
        {"dice": {"source", "last", "final"} -> mean over the organs that the scan shows, "reason": of the guard}
    """
    examples = fetch_examples()
    example = examples[case if case in examples else "A"]
    data: dict[str, Any] = build_preprocessing(example.task, labels=True)(dict(example.case))
    if case not in examples:
        data = _shifted(case, data, example.task)
    network, task, record = load_model(source_model(seed))
    settings = {} if objective in PLAIN else LITERATURE
    engine = Adaptation(network, task, record, method=objective, modality=example.task.modality, **settings)
    prepared = engine.prepare_data(data, case)
    outcome = engine.decide(prepared)
    run = outcome.run
    final = outcome.adapted if outcome.accepted and outcome.adapted is not None else prepared.source
    last = engine.predict(prepared, run.last) if run is not None and engine.settings.steps else prepared.source
    label = np.asarray(data["label"])[0]
    maps = {"source": prepared.source, "last": last, "final": final}
    scores = {name: _mean_dice(prediction.labels, label, task) for name, prediction in maps.items()}
    return {"dice": scores, "reason": outcome.decision.reason}


def source_model(seed: int) -> Path:
    """The model folder of a seed, trained if it is not there."""
    folder, examples = cache_dir() / "evidence" / "adaptation", fetch_examples()
    folder.mkdir(parents=True, exist_ok=True)
    model, recipe = folder / f"seed{seed}", RECIPE | {"seed": seed}
    with FileLock(f"{model}.lock"):
        if not (model / "adapter.json").exists():
            train(
                examples.folder / "abdomen_ct.json", model, examples["A"].task, "sam_da", None, recipe, overwrite=True
            )
    return model


def _shifted(case: str, data: dict[str, Any], task: Task) -> dict[str, Any]:
    """A slab of patient A under a shift."""
    name, first = case.split("/")
    shift = next(shift for shift in shifts(task.classes) if shift.name == name)
    slab = slice(*next(slab for slab in SLABS if slab[0] == int(first)))
    image, label = (data[key].as_tensor()[..., slab].contiguous() for key in ("image", "label"))
    spacing = np.linalg.norm(np.asarray(data["image"].affine)[:3, :3], axis=0)
    changed, label = shift(image, label, spacing, task.window[1] - task.window[0])
    return {"image": MetaTensor(changed, affine=data["image"].affine), "label": label, "id": name}


def _mean_dice(prediction: np.ndarray, label: np.ndarray, task: Task) -> float:
    """Over the classes that the label holds."""
    counts = confusion_matrix(prediction, label.astype(np.int64), task.num_classes)
    shown = [k for k in range(1, task.num_classes) if counts[k].any()]
    return round(statistics.fmean(2 * counts[k, k] / (counts[k].sum() + counts[:, k].sum()) for k in shown), 4)
