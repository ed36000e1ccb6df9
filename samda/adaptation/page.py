# SPDX-License-Identifier: Apache-2.0
"""One HTML page per run: decisions, cases to look at first, and the changes in them."""

from __future__ import annotations

import collections
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import AdaptRun, details_folder
from samda.adaptation.record import CURVES
from samda.data.datalists import Case, match_cases
from samda.data.labels import MapLabelsd, scoring_map
from samda.errors import InputError, SamdaError
from samda.expected_dice import TRUSTED, CaseQuality
from samda.inference.evaluate import score_files
from samda.inference.writer import label_path
from samda.io import Image
from samda.metrics import ClassScores
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
    scan_slices,
    section,
    table,
)
from samda.report import write_page as write_document
from samda.task import Task

logger = logging.getLogger(__name__)

SHOWN = 12  # cases with pictures
WORSE = 0.01  # loss of Dice that counts as worse
Scores = dict[str, dict[str, list[ClassScores]]]  # case -> "plain" or "adapted" -> scores of the foreground classes


def score_maps(
    output: Path, case: Mapping[str, Any], final: Path, record: Mapping[str, Any], task: Task, mapping: MapLabelsd
) -> dict[str, list[ClassScores]]:
    """Scores of the plain and the final map of a case with "id", "label" and perhaps "unlabeled"; InputError where it
    has none.
    """
    source = record["output_files"].get("source")
    if source is None:
        raise InputError(record["error"] or "no prediction")
    paths = {"plain": details_folder(output, case["id"]) / source, "adapted": final}
    tolerance = task.nsd_tolerance
    return {which: score_files(path, case["label"], task, tolerance, mapping, case) for which, path in paths.items()}


def mean_dice(scores: Sequence[ClassScores]) -> float:
    """Mean over the classes in prediction or label; NaN if there is none."""
    known = [one.dice for one in scores if not math.isnan(one.dice)]
    return sum(known) / len(known) if known else math.nan


def score_run(run: AdaptRun, labels: str | Path, task: Task) -> Scores:
    """Scores of every case with a label; InputError where no case has one."""
    pairs, dataset_labels = match_cases(run.output, labels)
    mapping = scoring_map([case for _, case in pairs.values()], task, dataset_labels)
    scores: Scores = {}
    for name, (final, case) in pairs.items():
        record = run.records.get(name)
        if final is None or record is None or "source" not in record["output_files"]:
            continue
        try:
            scores[name] = score_maps(run.output, case, final, record, task, mapping)
        except SamdaError as error:  # an invalid label must not prevent the report of a finished run
            logger.error("case %s was not scored: %s", name, error)
    return scores


def write_page(
    adaptation: Adaptation,
    run: AdaptRun,
    cases: Sequence[Case],
    scores: Scores | None = None,
    keep_names: bool = False,
) -> Path:
    """Write `report.html` into the folder of a run; with the names of its `cases`, or their pseudonyms."""
    shown = {case: case if keep_names else record["case_id"] for case, record in run.records.items()}
    order = look_first(run.records)[:SHOWN]
    images = {case["id"]: case["image"] for case in cases}
    first = [[shown[case], run.records[case]["reason"], _why(run.records[case])] for case in order]
    parts = [
        _summary(adaptation, run),
        section("Cases to review first", [table(["case", "reason", "explanation"], first)]),
        *([_scores(scores, shown)] if scores else []),
        _all_cases(run, shown),
        *(_case(adaptation, run, case, images.get(case), shown[case]) for case in order),
    ]
    record = next(iter(run.records.values()), {})
    settings = adaptation.settings
    about = {"method": settings.method, "scope": settings.scope, "model version": adaptation.version}
    about |= {"settings": record.get("config_sha256", "")[:12], **record.get("versions", {})}
    return write_document(run.output / "report.html", page("Adaptation to a site", parts, about))


def look_first(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Cases in the order of review: failed, empty, low predicted Dice (lowest first), changed (largest change first),
    fallbacks, unchanged.
    """
    ranks = {"failed": 0, "accepted": 2, "fallback": 3, "skipped": 4}

    def key(case: str) -> tuple[float, float]:
        record = records[case]
        rank = 1 if record["reason"] == "skipped_empty" else ranks[record["decision"]]
        if record["reason"] == "accepted_unchanged":
            rank = 4
        expected = expected_mean(record, "adapted" if record["decision"] == "accepted" else "source")
        if rank > 1 and expected is not None and expected < TRUSTED:
            return 1.5, expected
        overlap = [value for value in record["dice_source_adapted"].values() if value is not None]
        return rank, min(overlap, default=1.0)

    return sorted(records, key=key)


def expected_mean(record: Mapping[str, Any], which: str) -> float | None:
    """Mean predicted Dice of the source or the adapted map of a record, None where it has none."""
    evidence = record.get("quality", {}).get(which)
    expected = None if evidence is None else evidence.get("expected")
    return None if expected is None else CaseQuality.from_dict(expected).mean


def _summary(adaptation: Adaptation, run: AdaptRun) -> str:
    reasons = collections.Counter(record["reason"] for record in run.records.values())
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
        paragraph(", ".join(f"{number} of {total} {what}" for what, number in run.counts.items())),
        table(["reason", "cases"], reasons.most_common()),
        table(
            ["class", "accepted cases", "median", "least", "largest", "appeared", "vanished"],
            shifts,
            "Ratio of volumes after and before adaptation, accepted cases",
        ),
    ]
    return section("Summary", pieces)


def _why(record: Mapping[str, Any]) -> str:
    return record["error"] or record["explanation"]


def _scores(scores: Scores, shown: Mapping[str, str]) -> str:
    means = {case: (mean_dice(both["plain"]), mean_dice(both["adapted"])) for case, both in scores.items()}
    rows = [[shown[case], before, after, after - before] for case, (before, after) in means.items()]
    known = [(before, after) for before, after in means.values() if not math.isnan(after - before)]
    worse = sum(after < before - WORSE for before, after in known)
    average = [sum(column) / len(known) for column in zip(*known, strict=True)] if known else [math.nan] * 2
    text = (
        f"{worse} of {len(known)} cases lost more than {WORSE} of mean Dice. The labels were not used for any decision."
    )
    rows.append(["mean", *average, average[1] - average[0]])
    return section("Dice with the given labels", [paragraph(text), table(["case", "before", "after", "gain"], rows)])


def _all_cases(run: AdaptRun, shown: Mapping[str, str]) -> str:
    rows = []
    for case, record in run.records.items():
        quality = record["quality"]
        score = [None if quality[k] is None else quality[k]["score"] for k in ("source", "adapted")]
        agreed = record["agreement"]
        pair = [agreed[0], agreed[record["best_step"]]] if agreed else [None, None]
        pair = [*pair, *(expected_mean(record, k) for k in ("source", "adapted"))]
        seconds = sum(record["seconds"].values()) or None
        rows.append([shown[case], record["decision"], record["reason"], *score, *pair, record["best_step"], seconds])
    head = ["case", "decision", "reason", "plausibility", "adapted", "agreement", "adapted"]
    head += ["predicted Dice", "adapted", "step kept", "seconds"]
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
        except (SamdaError, OSError) as error:  # the scan may have been moved
            pieces.append(paragraph(f"no pictures: {error}"))
    if len(record["loss"]) > 1:
        keys = [key for key in CURVES if len(record[key]) == len(record["loss"])]
        history = [{"step": i} | {key: record[key][i] for key in keys} for i in range(len(record["loss"]))]
        pieces.append(curve(history, keys, x="step", caption=f"Step {record['best_step']} was kept."))
    return section(name, pieces)


def _overlays(adaptation: Adaptation, run: AdaptRun, case: str, image: Image) -> list[str]:
    """Before, after and difference of three slices, including those that changed most."""
    source = details_folder(run.output, case) / run.records[case]["output_files"]["source"]
    final = label_path(run.output, case, image)
    maps = {"before": source, "after": final} if final.exists() else {"before": source}
    slices, labels = scan_slices(image, maps, adaptation.task)
    before, after = labels["before"], labels.get("after", labels["before"])
    amount = (before != after).reshape(len(before), -1).sum(1)
    chosen = set(pick_slices(np.maximum(before, after), 3 if not amount.any() else 1))
    chosen |= {int(i) for i in np.argsort(-amount, kind="stable")[:2] if amount[i]}
    pieces = [legend(adaptation.task.classes), changed_legend()]
    for i in sorted(chosen):
        columns = {"before": paint(slices[i], before[i]), "after": paint(slices[i], after[i])}
        columns["changed"] = changed(slices[i], before[i], after[i])
        pieces.append(pictures(columns, f"slice {i}"))
    return pieces
