# SPDX-License-Identifier: Apache-2.0
"""One HTML page per run: what was decided for the site, which cases to look at first, and what changed in them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import AdaptRun, details_folder
from samda.data.datalists import find_cases
from samda.data.slices import SliceGrid
from samda.data.transforms import build_preprocessing
from samda.errors import SamdaError
from samda.inference.writer import label_path
from samda.io import Image
from samda.report import (
    changed,
    changed_legend,
    curve,
    legend,
    page,
    paint,
    paragraph,
    pick_slices,
    pictures,
    section,
    table,
)
from samda.report import write_page as write_document

if TYPE_CHECKING:
    from samda.adaptation.job import CaseScores


SHOWN = 12  # cases with pictures
WORSE = 0.01  # loss of Dice that counts as worse
CURVES = ("loss", "merit", "agreement", "drift", "entropy", "param_displacement")


def write_page(
    adaptation: Adaptation,
    run: AdaptRun,
    inputs: str | Path,
    section: str | None = None,
    scores: CaseScores | None = None,
    keep_names: bool = False,
) -> Path:
    """Write `report.html` into the folder of a run.

    Args:
        adaptation: what the cases were adapted with.
        run: of these cases.
        inputs: where the scans are, as the run was given.
        section: of a data set, as the run was given.
        scores: Dice before and after, where labels were given.
        keep_names: show the names of the files instead of pseudonyms.
    """
    shown = {case: case if keep_names else record["case_id"] for case, record in run.records.items()}
    order = look_first(run.records)
    images = {case["id"]: case["image"] for case in find_cases(inputs, section)}
    parts = [_summary(adaptation, run), _first(run, order[:SHOWN], shown)]
    if scores:
        parts.append(_scores(scores, shown))
    parts.append(_all_cases(run, shown))
    for case in order[:SHOWN]:
        parts.append(_case(adaptation, run, case, images.get(case), shown[case]))
    record = next(iter(run.records.values()), {})
    about = {"method": adaptation.objective.name, "scope": adaptation.scope, "model version": adaptation.version}
    about |= {"settings": record.get("config_sha256", "")[:12], **record.get("versions", {})}
    return write_document(run.output / "report.html", page("Adaptation to a site", parts, about))


def look_first(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The cases in the order in which a person should look at them.

    What failed, and what showed nothing; then accepted changes, the largest first, for those are in use; then what fell
    back; last what needed no help.
    """
    ranks = {"failed": 0, "accepted": 2, "fallback": 3, "skipped": 4}

    def key(case: str) -> tuple[float, float]:
        record = records[case]
        rank = 1 if record["reason"] == "skipped_empty" else ranks[record["decision"]]
        if record["reason"] == "accepted_unchanged":
            rank = 4
        overlap = [value for value in record["dice_source_adapted"].values() if value is not None]
        return rank, min(overlap, default=1.0)

    return sorted(records, key=key)


def _summary(adaptation: Adaptation, run: AdaptRun) -> str:
    counts = run.counts
    reasons: dict[str, int] = {}
    for record in run.records.values():
        reasons[record["reason"]] = reasons.get(record["reason"], 0) + 1
    shifts = []
    for name in adaptation.task.classes[1:]:
        pairs = [r["volumes_ml"][name] for r in run.records.values() if r["decision"] == "accepted"]
        ratios = [after / before for before, after in pairs if before > 0 and after > 0]
        gained = sum(before == 0 < after for before, after in pairs)
        lost = sum(after == 0 < before for before, after in pairs)
        middle = statistics.median(ratios) if ratios else None
        shifts.append([name, len(pairs), middle, min(ratios, default=None), max(ratios, default=None), gained, lost])
    total = len(run.records)
    pieces = [
        paragraph(", ".join(f"{number} of {total} {what}" for what, number in counts.items())),
        table(["reason", "cases"], sorted(reasons.items(), key=lambda item: -item[1])),
        table(
            ["class", "accepted cases", "median", "least", "largest", "appeared", "vanished"],
            shifts,
            "Volume after adaptation over volume before, accepted cases",
        ),
    ]
    return section("The site", pieces)


def _first(run: AdaptRun, order: list[str], shown: Mapping[str, str]) -> str:
    rows = [[shown[c], run.records[c]["reason"], _why(run.records[c])] for c in order]
    return section("Cases to look at first", [table(["case", "reason", "why"], rows)])


def _why(record: Mapping[str, Any]) -> str:
    return record["error"] or record["explanation"]


def _scores(scores: CaseScores, shown: Mapping[str, str]) -> str:
    rows, means = [], []
    for case, score in scores.items():
        values = [[v for v in column if not math.isnan(v)] for column in zip(*score.values(), strict=True)]
        before, after = (sum(v) / len(v) if v else math.nan for v in values)
        means.append((before, after))
        rows.append([shown[case], before, after, after - before])
    known = [(b, a) for b, a in means if not math.isnan(b - a)]
    worse = sum(a < b - WORSE for b, a in known)
    average = [sum(column) / len(known) for column in zip(*known, strict=True)] if known else [math.nan] * 2
    text = f"{worse} of {len(known)} cases lost more than {WORSE} of mean Dice. Labels decided nothing."
    rows.append(["mean", *average, average[1] - average[0]])
    return section("Dice with the given labels", [paragraph(text), table(["case", "before", "after", "gain"], rows)])


def _all_cases(run: AdaptRun, shown: Mapping[str, str]) -> str:
    rows = []
    for case, record in run.records.items():
        quality = record["quality"]
        score = [None if quality[k] is None else quality[k]["score"] for k in ("source", "adapted")]
        agreed = record["agreement"]
        pair = [agreed[0], agreed[record["best_step"]]] if agreed else [None, None]
        seconds = sum(record["seconds"].values()) or None
        rows.append([shown[case], record["decision"], record["reason"], *score, *pair, record["best_step"], seconds])
    head = ["case", "decision", "reason", "plausibility", "adapted", "agreement", "adapted", "step kept", "seconds"]
    return section("All cases", [table(head, rows)])


def _case(adaptation: Adaptation, run: AdaptRun, case: str, image: Image | None, name: str) -> str:
    record = run.records[case]
    pieces = [paragraph(f"{record['decision']}: {record['reason']}. {_why(record)}")]
    if record["volumes_ml"]:
        rows = [[k, *pair, record["dice_source_adapted"].get(k)] for k, pair in record["volumes_ml"].items()]
        pieces.append(table(["class", "before (ml)", "after (ml)", "Dice between them"], rows))
    if image is not None and record["decision"] != "failed":
        try:
            pieces += _overlays(adaptation, run, case, image)
        except (SamdaError, OSError) as error:  # the scan may have been moved since
            pieces.append(paragraph(f"no pictures: {error}"))
    if len(record["loss"]) > 1:
        keys = [key for key in CURVES if len(record[key]) == len(record["loss"])]
        history = [{"step": i} | {key: record[key][i] for key in keys} for i in range(len(record["loss"]))]
        pieces.append(curve(history, keys, x="step", caption=f"Step {record['best_step']} was kept."))
    return section(name, pieces)


def _overlays(adaptation: Adaptation, run: AdaptRun, case: str, image: Image) -> list[str]:
    """Before, after, changed: three slices, those that changed most among them."""
    details = details_folder(run.output, case)
    final = label_path(run.output, case, image)
    source = details / run.records[case]["output_files"]["source"]
    slices, before = _slices(adaptation, image, source)
    after = _slices(adaptation, image, final)[1] if final.exists() else before
    amount = (before != after).reshape(len(before), -1).sum(1)
    chosen = set(pick_slices(np.maximum(before, after), 3 if not amount.any() else 1))
    chosen |= {int(i) for i in np.argsort(-amount, kind="stable")[:2] if amount[i]}
    pieces = [legend(adaptation.task.classes), changed_legend()]
    for i in sorted(chosen):
        columns = {
            "before": paint(slices[i], before[i]),
            "after": paint(slices[i], after[i]),
            "changed": changed(slices[i], before[i], after[i]),
        }
        pieces.append(pictures(columns, f"slice {i}"))
    return pieces


def _slices(adaptation: Adaptation, image: Image, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Slices (n, C, H, W) of a scan and (n, H, W) of a label map on its grid, as the network sees them."""
    task = adaptation.task
    task = dataclasses.replace(task, labels={name: (k,) for k, name in enumerate(task.classes) if k})
    data = build_preprocessing(task, labels=True)({"image": image, "label": str(labels)})
    grid = SliceGrid.from_volume(data["image"], data["image"].affine, task)
    every = range(grid.num_slices)
    return grid.extract(data["image"], every).numpy(), grid.extract_labels(data["label"], every).numpy()
