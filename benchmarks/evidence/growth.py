# SPDX-License-Identifier: Apache-2.0
"""Growth: a trained model gets a class, a site or more patients, against trainings that had all of it from the start.

Each run trains a parent, its child (`samda train --from`) and what the child is compared with, and predicts the same
held-out cases with all of them, by the commands that a user has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.io import write_json
from samda.task import Task

from ..timing import markdown
from .datasets import ALL, DATASETS, split, write_list
from .methods import samda_predict, samda_train

BUDGET = 120  # CPU seconds of a training
STEPS = 150  # of the trainings that are counted in steps
HELD_OUT = 10  # volumes, of the test patients in their order
PICTURES = 2
PATIENTS = 40
FEW = 3  # labeled pictures of the new site
LEARNED = "aorta"

Row = dict[str, Any]


def growths() -> list[Row]:
    return [{"growth": name, "budget": BUDGET, "steps": STEPS, "seed": 0} for name in GROWTHS]


def grow(run: Row, root: Path | None, folder: Path) -> Row:
    """{"scores": model -> class -> mean Dice of the held-out cases, ...} of a run."""
    return GROWTHS[run["growth"]](root, folder)


def new_class(root: Path | None, folder: Path) -> Row:
    """Hippocampus, 40 patients: a model of Anterior learns Posterior from labels of Posterior alone."""
    training, test = _hippocampus(root, PATIENTS)
    both, names = _task("hippocampus", training, test, folder), DATASETS["hippocampus"].classes
    first, second = names[1:]
    listing = write_list("hippocampus", training, test, folder / "data.json")
    anterior = _write_task(folder / "first.yaml", both | {"classes": list(names[:2]), "labels": {first: [1]}})
    child = _write_task(folder / "child.yaml", {"classes": list(names), "labels": {first: [], second: [2]}})
    joint = _write_task(folder / "both.yaml", both)
    _train(listing, folder / "parent", anterior)
    _train(listing, folder / "child", child, "--from", folder / "parent")
    _train(listing, folder / "joint", joint)
    return _scores(folder, listing, joint)


def more_patients(root: Path | None, folder: Path) -> Row:
    """Hippocampus: a model of 10 patients goes on with 40 for half the steps, against 40 at once."""
    training, test = _hippocampus(root, PATIENTS)
    few = [case for case in training if case["patient"] in {c["patient"] for c in training[:10]}]
    task = _write_task(folder / "task.yaml", _task("hippocampus", training, test, folder))
    small = write_list("hippocampus", few, test, folder / "few.json")
    listing = write_list("hippocampus", training, test, folder / "data.json")
    _train(small, folder / "parent", task, "--steps", STEPS)
    _train(listing, folder / "child", None, "--from", folder / "parent", "--steps", STEPS // 2)
    _train(listing, folder / "joint", task, "--steps", STEPS)
    return _scores(folder, listing, task)


def new_site(root: Path | None, folder: Path) -> Row:
    """Vessels: the model of CHASE goes on with 3 pictures of LES-AV, against itself and against these 3 alone; at both
    sites.
    """
    assert root is not None
    training, test = split("vessels_chase", root, ALL, 0)
    source = write_list("vessels_chase", training, test, folder / "chase.json")
    _, pictures = split("vessels_lesav", root, ALL, 0)
    few, test = pictures[:FEW], pictures[FEW : FEW + PICTURES]
    listing = write_list("vessels_lesav", few, test, folder / "lesav.json")
    task = _write_task(folder / "task.yaml", _task("vessels_chase", training, [], folder))
    _train(source, folder / "parent", task)
    _train(listing, folder / "child", None, "--from", folder / "parent")
    _train(listing, folder / "alone", task)
    row = _scores(folder, listing, task, "alone")
    for model, scores in _scores(folder, source, task, "alone")["scores"].items():
        row["scores"][model] |= {f"{name}, old site": value for name, value in scores.items()}
    return row


def exact_class(root: Path | None, folder: Path) -> Row:
    """Slices of patient A: a model of five organs learns the aorta with `--keep-classes exact`, against all six."""
    import nibabel as nib
    import numpy as np
    import torch

    from samda.cli.demo import hold_out
    from samda.examples import fetch_examples
    from samda.models.folder import load_model

    example = fetch_examples()["A"]
    hold_out(example, folder / "data")
    listing = folder / "data" / "dataset.json"
    ids = {name: list(values) for name, values in (example.task.labels or {}).items()}
    organs = [name for name in ids if name != LEARNED]
    six = example.task.to_dict() | {"classes": ["background", *organs, LEARNED], "labels": ids}
    five = six | {"classes": six["classes"][:-1], "labels": {name: ids[name] for name in organs}}
    joint, parent = _write_task(folder / "six.yaml", six), _write_task(folder / "five.yaml", five)
    labels = {name: [] for name in organs} | {LEARNED: ids[LEARNED]}
    child = _write_task(folder / "child.yaml", {"classes": six["classes"], "labels": labels})
    _train(listing, folder / "parent", parent)
    _train(listing, folder / "child", child, "--from", folder / "parent", "--keep-classes", "exact")
    _train(listing, folder / "joint", joint)
    row = _scores(folder, listing, joint)
    networks = [load_model(folder / name)[0] for name in ("parent", "child")]
    images = torch.rand(4, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = (network(images) for network in networks)
    row["logits_equal"] = torch.equal(old, new[:, : old.shape[1]])
    differing = 0
    for path in (folder / "predictions" / listing.stem / "parent").glob("*.nii.gz"):
        before, after = (
            np.asarray(nib.load(path.parents[1] / name / path.name).dataobj) for name in ("parent", "child")
        )
        differing += int(((before != after) & (after != len(six["classes"]) - 1)).sum())
    return row | {"voxels_changed": differing}


GROWTHS = {
    "a new class": new_class,
    "a new class, exact": exact_class,
    "more patients": more_patients,
    "a new site": new_site,
}


def table(rows: Sequence[Row]) -> str:
    """A line for each class of each run that is there; "not measured" for the others."""
    lines = []
    for run in growths():
        row = next((row for row in rows if row["growth"] == run["growth"] and "scores" in row), None)
        if row is None:
            lines.append([run["growth"], *["not measured"] * 3, "-"])
            continue
        models = list(row["scores"])  # parent, child, and what it is compared with
        for name in row["scores"][models[1]]:
            values = [row["scores"][model].get(name) for model in models]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            both = values[1] is not None and values[2] is not None
            lines.append([f"{run['growth']}: {name}", *cells, f"{values[1] - values[2]:+.3f}" if both else "-"])
    return markdown(["growth: class", "parent", "child", "compared with", "difference"], lines)


def _hippocampus(root: Path | None, count: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    assert root is not None
    training, test = split("hippocampus", root, ALL, 0)
    return training[:count], test[:HELD_OUT]


def _task(name: str, training: list[Any], test: list[Any], folder: Path) -> dict[str, Any]:
    """The task that `samda check` suggests for these cases."""
    from samda.data.suggest import check_and_suggest

    _, suggestion = check_and_suggest(write_list(name, training, test, folder / "checked.json"))
    assert suggestion is not None
    return suggestion.task.to_dict()


def _write_task(path: Path, values: Mapping[str, Any]) -> Path:
    write_json(path, values)  # JSON is YAML
    return path


def _train(listing: Path, model: Path, task: Path | None, *further: Any) -> None:
    until = [] if "--steps" in further else ["--minutes", BUDGET / 60]
    samda_train("-d", listing, "-o", model, *([] if task is None else ["--task", task]), *further, *until)


def _scores(folder: Path, listing: Path, task: Path, compared: str = "joint") -> Row:
    """{"scores": model -> class -> mean Dice of the test cases} for the classes that a model has."""
    from samda.adapters.adapter_file import read_adapters
    from samda.inference.evaluate import evaluate

    scores = {}
    for name in ("parent", "child", compared):
        target = folder / "predictions" / listing.stem / name
        samda_predict(folder / name, listing, target)
        classes = evaluate(target, listing, Task.from_file(task), section="test").summary()["classes"]
        dice = {known: classes[known]["dice"] for known in read_adapters(folder / name).task["classes"][1:]}
        scores[name] = {known: round(entry["mean"], 4) for known, entry in dice.items() if entry["n"]}
    return {"scores": scores}
