# SPDX-License-Identifier: Apache-2.0
"""Train on one scan, predict and adapt to others, and write a report.

Downloads the base weights (vit_t) and three abdominal scans, trains on six organs of patient A, predicts held-out
slices of A, patient B (another scanner, contrast medium) and patient M (MR), and adapts to B and M without labels.
There is one patient of each kind and all labels are predictions of another model: a demonstration, not a benchmark.

  samda demo            writes the folder demo
  samda demo -o here
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samda.cli.options import add_shared, pick_device, positive, say
from samda.errors import UsageError

if TYPE_CHECKING:
    from samda.examples import Example
    from samda.inference.evaluate import Evaluation
    from samda.task import Task

BLOCK = 5  # slices; the part of patient A with organs is split into blocks of this length
TEST_BLOCKS, VALIDATION_BLOCKS = (2, 7), (4,)  # all others are training blocks
RECIPE = {"views": 6, "val_interval": 5, "patience": 0}  # otherwise the defaults of train.json
TISSUE_SHARE = 0.7  # B and M come from other scanners, M of another modality
SHOWN = 3  # slices shown per case


@dataclasses.dataclass
class Part:
    """Scans that are predicted and scored together; with a `case`, the model is also adapted to it."""

    what: str
    dataset: Path
    task: Task
    case: str = ""
    score: Evaluation = dataclasses.field(init=False)
    adapted: Evaluation = dataclasses.field(init=False)
    reason: str = ""  # of the guard's decision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `samda demo`."""
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="default demo")
    parser.add_argument("--epochs", type=positive, default=100, metavar="N", help="number of epochs; default 100")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed; default 0")
    add_shared(parser, "--quiet", "--device")


def run(args: argparse.Namespace) -> None:
    """Lock the folder of the demo and run it."""
    from samda.output import open_output

    with open_output(new_folder(args.output)) as output:
        _run(args, output.path)


def _run(args: argparse.Namespace, output: Path) -> None:
    start = time.perf_counter()
    device = pick_device(args.device)
    say("[1/6] weights and scans")
    from samda.adaptation.job import run_adaptation
    from samda.examples import fetch_examples
    from samda.inference.evaluate import evaluate, format_table
    from samda.inference.folder import predict_folder
    from samda.inference.predict import Predictor
    from samda.models.folder import load_model
    from samda.networks.weights import fetch_weights
    from samda.training import train

    fetch_weights("vit_t")
    examples = fetch_examples()
    task = examples["A"].task
    parts = [
        Part("held-out slices of patient A", hold_out(examples["A"], output / "data"), task),
        Part("patient B, another scanner", examples.folder / "abdomen_ct.json", examples["B"].task, "B"),
        Part("patient M, an MR scan", examples.folder / "abdomen_mr.json", examples["M"].task, "M"),
    ]

    say(f"[2/6] training on {device}")
    # short runs use as many views as epochs and validate at the end
    overrides = {"epochs": args.epochs} | {key: min(value, args.epochs) for key, value in RECIPE.items()}
    overrides |= {"seed": args.seed, "train::augmentation::tissue_share": TISSUE_SHARE}
    trained = train(parts[0].dataset, output / "model", task, "ssf", "vit_t", overrides, overwrite=True, device=device)

    say("[3/6] prediction")
    network, task, _ = load_model(output / "model")
    for part in parts:
        predict_folder(Predictor(network, part.task, device, progress=True), part.dataset, output / "predictions")

    say("[4/6] adaptation, without labels")
    for part in parts:
        if part.case:
            folder = output / "adapted" / part.case
            folder.parent.mkdir(exist_ok=True)
            settings = {"modality": part.task.modality}
            done = run_adaptation(
                output / "model", part.dataset, folder, settings, section="test", overwrite=True, device=device
            )
            part.reason = done["cases"][part.case]["reason"]

    say("[5/6] scores")
    for part in parts:
        part.score = evaluate(output / "predictions", part.dataset, part.task, section="test")
        if part.case:
            folder = output / "adapted" / part.case
            part.adapted = evaluate(folder, part.dataset, part.task, section="test")
    seconds = time.perf_counter() - start
    write_metrics(output / "metrics.json", parts, trained, seconds)
    say("[6/6] report")
    write_report(output, parts, trained)
    scores = {part.what: part.score for part in parts}
    scores |= {f"{part.what}, adapted ({part.reason})": part.adapted for part in parts if part.case}
    for what, score in scores.items():
        rows = [line for line in format_table(score).splitlines() if not line.startswith("#")]  # without the rules
        print("\n".join([f"\n{what}", *rows]))
    print(f"\nlook at {output / 'report.html'}; model in {output / 'model'}, label maps in {output / 'predictions'}")
    print(f"total time {time.perf_counter() - start:.0f} s")


def new_folder(folder: Path) -> Path:
    """The folder of the demo, created if missing; a folder with other files is refused."""
    from samda.output import OutputFolder, check_output_folder

    if folder.is_dir() and any(folder.iterdir()) and not OutputFolder(folder).manifest.is_file():
        raise UsageError(f"{folder} contains other files; choose an empty folder with -o")
    return check_output_folder(folder)


def hold_out(scan: Example, folder: Path) -> Path:
    """Write a datalist, `folder`/dataset.json, of one scan: training, validation and test slices.

    The test slices are written as separate scans, so that no other step reads them.
    """
    import nibabel as nib
    import numpy as np

    from samda.io import replacing, write_json

    image, label = (nib.Nifti1Image.from_filename(path) for path in (scan.image, scan.label))
    ids = [i for values in (scan.task.labels or {}).values() for i in values]
    first = int(np.flatnonzero(np.isin(np.asarray(label.dataobj), ids).any(axis=(0, 1)))[0])
    test, choice = (
        [(first + BLOCK * block, first + BLOCK * (block + 1)) for block in chosen]
        for chosen in (TEST_BLOCKS, VALIDATION_BLOCKS)
    )
    kept = {i for start, end in [*test, *choice] for i in range(start, end)}
    rest = ranges(i for i in range(image.shape[2]) if i not in kept)
    folder.mkdir(exist_ok=True)
    blocks = []
    for start, end in test:
        block = {"id": f"A_{start}_{end}"}
        for key, volume in (("image", image), ("label", label)):
            block[key] = f"{block['id']}_{key}.nii.gz"
            with replacing(folder / block[key]) as temporary:
                volume.slicer[:, :, start:end].to_filename(temporary)
        blocks.append(block)
    content = {
        "training": [scan.case | {"slices": rest}],
        "validation": [scan.case | {"id": "A_validation", "slices": choice}],
        "test": blocks,
    }
    write_json(folder / "dataset.json", content)
    return folder / "dataset.json"


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, end) of each run: 2, 3, 4, 7 -> (2, 5), (7, 8)."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    blocks = [[number for _, number in run] for _, run in runs]
    return [(block[0], block[-1] + 1) for block in blocks]


def write_metrics(path: Path, parts: Iterable[Part], trained: Mapping[str, Any], seconds: float) -> None:
    """All scores in one JSON file."""
    from samda.io import write_json

    content = {
        "purpose": "research use only",
        "note": "one patient each; the labels are predictions of another model, not expert annotations",
        "seconds": round(seconds),
        "training": {key: value for key, value in trained.items() if key != "model"},
        "scores": {part.what: part.score.to_dict() for part in parts},
        "adapted": {part.what: {"reason": part.reason} | part.adapted.to_dict() for part in parts if part.case},
    }
    write_json(path, content)


def write_report(output: Path, parts: Iterable[Part], trained: Mapping[str, Any]) -> None:
    """`report.html`: scores, pictures and training curve."""
    from samda import report
    from samda.data.datalists import find_cases
    from samda.inference.writer import label_path

    sections = [report.section("Summary", [report.paragraph(text) for text in introduction(trained)])]
    head = ["organ", "Dice", "HD95 (mm)", "NSD", "blocks or scans"]
    for part in parts:
        pieces = [report.table(head, score_rows(part.score))]
        folders = {"prediction": output / "predictions"}
        if part.case:
            folders["adapted"] = output / "adapted" / part.case
            caption = f"After adaptation ({part.reason}); curves and record in adapted/{part.case}/report.html"
            pieces.append(report.table(head, score_rows(part.adapted), caption))
        pieces.append(report.legend(part.task.classes))
        for case in find_cases(part.dataset, "test"):
            maps = {name: label_path(folder, case["id"], case["image"]) for name, folder in folders.items()}
            pieces += case_pictures(case, maps, part.task)
        sections.append(report.section(part.what[0].upper() + part.what[1:], pieces))
    history = json.loads((output / "model" / "history.json").read_text(encoding="utf-8"))["epochs"]
    caption = "Dice on the validation slices of patient A."
    sections.append(report.section("Training", [report.curve(history, ["loss", "mean_dice"], caption=caption)]))
    report.write_page(output / "report.html", report.page("samda demo: six organs in abdominal CT", sections))


def introduction(trained: Mapping[str, Any]) -> list[str]:
    """Text above the scores."""
    counts = trained["parameters"]
    return [
        "SAM (vit_t) with the class head pyramid and scaled and shifted levels (SSF): "
        f"{counts['trainable']:,} trained parameters on a frozen base of {counts['base']:,}. "
        f"{trained['epochs']} epochs, of which epoch {trained['best_epoch']} was the best.",
        "The model was trained on patient A without the slices shown. Patient B was scanned on another scanner with "
        "contrast medium, patient M with MR. They are not part of the training data, and the adaptation does not use "
        "their labels; its guard keeps the prediction of the source model where it finds no gain.",
        "There is one patient of each kind, and the labels are predictions of another model, not expert annotations. "
        "The held-out slices are adjacent to training slices. This is a demonstration, not a benchmark.",
    ]


def score_rows(score: Evaluation) -> list[list[Any]]:
    """Dice of each organ over all slices, mean distances, number of blocks or scans; and their mean."""
    summary = score.summary()
    groups = [*summary["classes"].items(), ("mean", summary["all"])]
    distances = ("hd95_mm", "nsd")
    return [
        [
            name,
            entry["pooled_dice"],
            *(entry[key]["mean"] for key in distances),
            entry["dice"]["n"] if entry is not summary["all"] else None,
        ]
        for name, entry in groups
    ]


def case_pictures(case: Mapping[str, Any], maps: Mapping[str, Path], task: Task) -> list[str]:
    """Image, label and label maps of some slices."""
    from samda import report
    from samda.data.labels import MapLabelsd

    mapping = MapLabelsd("label", task)
    images, labels = report.scan_slices(case["image"], {"label": case["label"], **maps}, task, mapping)
    pieces = []
    for i in report.pick_slices(labels["label"], SHOWN if labels["label"].any() else 1):
        columns = {"image": report.paint(images[i])}
        columns |= {name: report.paint(images[i], values[i]) for name, values in labels.items()}
        pieces.append(report.pictures(columns, f"{case['id']}, slice {i}"))
    return pieces
