# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation: B and M of the demo with every objective, and held-out patients of data sets at another site.

Labels serve for scoring alone. Source models are kept in the cache folder.

Part "adaptation": source models trained on all of patient A, one per seed, with the recipe of `samda demo`; targets are
B (another scanner, contrast medium) and M (MR). Three predictions are scored: the source's, the last iterate's (what
the objective does when left alone) and the final one (kept iterate, after the guard). One patient each, labeled by
another model: a demonstration of domain shift.

Part "shifts": source models trained by `samda train` for two minutes of CPU time on the patients of `splits.json` that
may train; targets are another data set, or the held-out patients under a corruption, with the default alone. The rows
also have the predicted Dice of each class of the plain map, with its interval. A corruption, in five severities, does
to the intensities of a preprocessed volume (C, X, Y, Z) in [0, 1] what another scanner, coil or protocol does; its grid
and so the labels stay. The corruptions share no code with the views of the adaptation or the augmentations of the
training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from monai.data import MetaTensor
from scipy import ndimage

from samda import Task, fetch_examples, load_model, train
from samda.adaptation import OBJECTIVES, Adaptation
from samda.adaptation.case import Segmentation
from samda.cli.demo import RECIPE
from samda.data import build_preprocessing
from samda.io import cache_dir
from samda.metrics import confusion_matrix

from .datasets import ALL, split, write_list
from .methods import samda_train

SEEDS = 5
LITERATURE = {"steps": 8, "lr": 1e-3}  # the same budget for every objective of the literature
PLAIN = ("default", "none")  # with their own settings
SITES = {  # source -> targets: another data set, or "" for its own held-out patients under shifts
    "vessels_chase": "vessels_lesav",
    "hippocampus": "",
    "lungs_montgomery": "",
    "heart_sunnybrook": "",
}
SITE_SEEDS = 3
SITE_MINUTES = 2  # of CPU time that a source model trains
MOST = 20  # cases of a target
SEVERITIES = (1, 2, 3, 4, 5)
AIR = 0.03  # intensity below which an inversion changes nothing

Run = dict[str, Any]
Array = np.ndarray


def real_targets() -> list[Run]:
    """Every objective on B and M, from every source model."""
    return [
        {"case": case, "objective": objective, "seed": seed}
        for objective in OBJECTIVES
        for case in ("B", "M")
        for seed in range(SEEDS)  # innermost, so that processes side by side train different source models
    ]


def site_targets() -> list[Run]:
    """Every source with its target or, as it is and under every shift, with its own held-out patients."""
    shifts = [(name, severity) for name in SHIFTS for severity in SEVERITIES]
    return [
        {"source": source, "target": target or source, "shift": shift, "severity": severity, "seed": seed}
        for seed in range(SITE_SEEDS)
        for source, target in SITES.items()
        for shift, severity in [("none", 0), *([] if target else shifts)]
    ]


def measure_site(run: Run, root: Path) -> dict[str, Any]:
    """Adapt the source model to every case of the target.

    Returns:
        {"cases": id -> {"source", "final": mean Dice, "expected": of the plain map, "reason", "seconds", "predict":
        seconds of the plain one}}
    """
    training, test = split(run["source"], root, ALL, 0)
    if run["target"] != run["source"]:
        test = split(run["target"], root, ALL, 0)[1]
    folder = cache_dir() / "evidence" / "sites"
    folder.mkdir(parents=True, exist_ok=True)
    file, model = folder / f"{run['source']}.json", folder / f"{run['source']}_{run['seed']}"
    with FileLock(f"{model}.lock"):
        if not (model / "adapter.json").exists():
            write_list(run["source"], training, [], file)
            samda_train("-d", file, "-o", model, "--seed", run["seed"], "--minutes", SITE_MINUTES, "--overwrite")
    network, task, record = load_model(model)
    engine, rows = Adaptation(network, task, record), {}
    preprocessing = build_preprocessing(engine.task, labels=True)
    for case in test[:: -(-len(test) // MOST)]:
        data: dict[str, Any] = preprocessing({key: case[key] for key in ("id", "image", "label")})
        if run["severity"]:
            changed = shifted(data["image"].as_tensor(), run["shift"], run["severity"])
            data["image"] = MetaTensor(changed, affine=data["image"].affine)
        prepared = engine.prepare_data(data, case["id"])
        begin = time.perf_counter()
        outcome = engine.decide(prepared)
        label = np.asarray(data["label"])[0]
        rows[case["id"]] = {
            "source": _mean_dice(prepared.source.labels, label, task),
            "final": _mean_dice(_final(prepared, outcome).labels, label, task),
            "expected": _expected(prepared.source, label, task),
            "reason": outcome.decision.reason if outcome.decision else "",
            "seconds": round(prepared.seconds["predict"] + time.perf_counter() - begin, 2),
            "predict": round(prepared.seconds["predict"], 2),
        }
    return {"cases": rows}


def _expected(prediction: Segmentation, label: np.ndarray, task: Task) -> dict[str, list[float]]:
    """Class of the label -> true Dice, predicted Dice, low, high; empty without a calibration."""
    if prediction.expected is None:
        return {}
    found = {}
    for name, true in _dice(prediction.labels, label, task).items():
        one = prediction.expected.dice[name]
        found[name] = [round(float(value), 4) for value in (true, one.dice, one.low, one.high)]
    return found


def adapt(case: str, objective: str, seed: int) -> dict[str, Any]:
    """Adapt the source model of a seed to a case.

    Returns:
        {"dice": {"source", "last", "final"} -> mean over the organs that the scan shows, "reason": of the guard}
    """
    examples = fetch_examples()
    example = examples[case]
    data: dict[str, Any] = build_preprocessing(example.task, labels=True)(dict(example.case))
    network, task, record = load_model(source_model(seed))
    settings = {} if objective in PLAIN else LITERATURE
    engine = Adaptation(network, task, record, method=objective, modality=example.task.modality, **settings)
    prepared = engine.prepare_data(data, case)
    outcome = engine.decide(prepared)
    run = outcome.run
    last = engine.predict(prepared, run.last) if run is not None and engine.settings.steps else prepared.source
    label = np.asarray(data["label"])[0]
    maps = {"source": prepared.source, "last": last, "final": _final(prepared, outcome)}
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


def _final(prepared: Any, outcome: Any) -> Segmentation:
    """What the guard lets pass."""
    return outcome.adapted if outcome.accepted and outcome.adapted is not None else prepared.source


def _dice(prediction: Array, label: Array, task: Task) -> dict[str, float]:
    """Class -> Dice, of the classes that the label holds."""
    counts = confusion_matrix(prediction, label.astype(np.int64), task.num_classes)
    sizes = counts.sum(0) + counts.sum(1)
    return {name: 2 * counts[k, k] / sizes[k] for k, name in enumerate(task.classes) if k and counts[k].any()}


def _mean_dice(prediction: Array, label: Array, task: Task) -> float:
    return round(statistics.fmean(_dice(prediction, label, task).values()), 4)


def _bias(v: Array, severity: int) -> Array:
    rng = np.random.default_rng(severity)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in v.shape[1:]), indexing="ij")
    field = sum(c * a for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
    field = field + sum(c * (a * a - 1 / 3) for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
    return v * np.exp(0.2 * severity * field)


def _gamma(v: Array, severity: int) -> Array:
    return v ** (1.4, 1.8, 2.3, 2.9, 3.6)[severity - 1]


def _noise(v: Array, severity: int) -> Array:
    sigma = (0.03, 0.06, 0.1, 0.15, 0.2)[severity - 1]
    return v + sigma * np.random.default_rng(severity).standard_normal(v.shape)


def _resolution(v: Array, severity: int) -> Array:
    """Of the plane, as far as it has that many pixels."""
    factor = (1.3, 1.7, 2.2, 2.8, 3.5)[severity - 1]
    scale = [1.0, *(1 / factor if n > 8 else 1.0 for n in v.shape[1:3]), 1.0]
    smooth = ndimage.gaussian_filter(v, [0.0 if s == 1 else factor / 2 for s in scale])
    small = ndimage.zoom(smooth, scale, order=1)
    return ndimage.zoom(small, [n / m for n, m in zip(v.shape, small.shape, strict=True)], order=1)


def _inversion(v: Array, severity: int) -> Array:
    """A mixture of the scan and its negative."""
    weight = 0.2 * severity
    return np.where(v > AIR, (1 - weight) * v + weight * (1 + AIR - v), v)


SHIFTS: dict[str, Callable[[Array, int], Array]] = {
    "bias": _bias,
    "gamma": _gamma,
    "noise": _noise,
    "resolution": _resolution,
    "inversion": _inversion,
}


def shifted(volume: torch.Tensor, name: str, severity: int) -> torch.Tensor:
    """A volume under a shift of :data:`SHIFTS`, clipped to [0, 1]."""
    changed = SHIFTS[name](volume.numpy().astype(float), severity)
    return torch.from_numpy(np.clip(changed, 0, 1).astype(np.float32))
