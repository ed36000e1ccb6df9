# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a model at a site, by a few labeled cases of the site.

    REPORT/commission.html   scores, plain against adapted, error of the predicted Dice, outliers with pictures, drift
           commission.json   the same as numbers, with versions and hashes; `samda predict --site-report` reads it
           cases/            label maps and records, as `samda adapt` writes them

The report of a site version is also kept in its folder, and `samda site activate` asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import spearmanr

from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import adapt_folder
from samda.adaptation.page import Scores, mean_dice, score_maps
from samda.data.datalists import Case, read_datalist
from samda.data.folders import join_channels
from samda.data.labels import MapLabelsd, scoring_map
from samda.errors import InputError, SamdaError, log_failed
from samda.expected_dice import CaseQuality
from samda.inference.writer import COMMISSION_VERSION, MOST_SHIFT, label_path
from samda.io import copy_file, plain, write_json
from samda.metrics import DEFINITIONS
from samda.models.versions import COMMISSION, SOURCE, load_version, version_folder
from samda.output import open_output
from samda.provenance import now, path_sha256, versions
from samda.quality import EDGE
from samda.report import legend, page, paint, paragraph, pick_slices, pictures, scan_slices, section, table, write_page
from samda.task import Task

logger = logging.getLogger(__name__)

FEWEST = 5  # labeled cases
SHOWN = 4  # outliers with pictures
HARM = 0.02  # loss of Dice from which a case counts as harmed
SURPRISE = 0.2  # error of the predicted Dice from which a case counts as an outlier
TAIL = 0.05  # share of the site's cases outside its accepted range
BOOTSTRAP = 2000
SCORES = ("dice", "nsd", "hd95_mm")


def commission(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    version: str | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    keep_names: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_case: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Predict, adapt and score a site's labeled cases and write the report; everything `samda commission` does.

    Args:
        data: a data set; all its labeled cases are used, at least five.
        output: folder of the report.
        version: of the model; None takes the active one.
        weights: base weights; None takes those of the training.
        keep_names: file names instead of pseudonyms.
        settings: of :class:`samda.adaptation.settings.AdaptationSettings`.
        on_case: called with name and record of each case.

    Returns:
        The content of commission.json.

    Raises:
        InputError: fewer than five cases have labels or could be scored.
    """
    network, task, record, version = load_version(model, version, weights)
    adaptation = Adaptation(network, task, record, device=device, version=version, **dict(settings or {}))
    datalist = read_datalist(data)
    cases = [case for section in datalist.cases.values() for case in section if case.get("label")]
    if len(cases) < FEWEST:
        raise InputError(f"{data} has {len(cases)} labeled cases; commissioning needs at least {FEWEST} of the site")
    cases = join_channels(cases, task.in_channels)
    mapping = scoring_map(cases, task, datalist.labels, task.classes)
    output = Path(output)
    with open_output(output, ["commission.html", "commission.json"]):
        run = adapt_folder(adaptation, cases, output / "cases", keep_names=keep_names, on_case=on_case)
        scores, failed = _score(run.output, _once(cases, run.records), run.records, task, mapping)
        if len(scores) < FEWEST:
            raise InputError(f"{len(scores)} of {len(cases)} cases could be scored; at least {FEWEST} are needed")
        names = {name: run.records[name]["case_id"] for name in scores}
        report = {
            "commission_version": COMMISSION_VERSION,
            "time": now(),
            **adaptation.describe(),
            "versions": versions(),
            "definitions": DEFINITIONS,
            "nsd_tolerance_mm": task.nsd_tolerance,
            "cases": {names[c["id"]]: _case(c, run.records, scores, task) for c in cases if c["id"] in names},
            "failed": [run.records[name]["case_id"] for name in failed],
            "scores": {which: summarize(scores, which, task.classes[1:]) for which in ("plain", "adapted")},
            "adaptation": paired(scores) | {"decisions": run.counts},
            **_expected(scores, run.records, task.classes[1:]),
        }
        write_json(output / "commission.json", report)
        shown = {case["id"]: case for case in cases}
        document = _page(plain(report), adaptation, run.output, shown, scores, names, mapping)
        write_page(output / "commission.html", document)
    if version != SOURCE:
        copy_file(output / "commission.json", version_folder(model, version) / COMMISSION)
    return report


def _once(cases: Sequence[Case], records: Mapping[str, Any]) -> list[Case]:
    """The cases without copies of a scan: they would make an interval narrow that is not."""
    found: dict[str, Case] = {}
    for case in cases:
        first = found.setdefault(records[case["id"]]["input_sha256"] or case["id"], case)
        if first is not case:
            logger.warning("case %s is the scan of case %s again and does not count", case["id"], first["id"])
    return list(found.values())


def _score(
    folder: Path, cases: Sequence[Case], records: Mapping[str, Any], task: Task, mapping: MapLabelsd
) -> tuple[Scores, list[str]]:
    scores: Scores = {}
    failed = []
    for case in cases:
        name, final = case["id"], label_path(folder, case["id"], case["image"])
        try:
            scores[name] = score_maps(folder, case, final, records[name], task, mapping)
        except SamdaError as error:  # a case with another grid, say, must not stop the others
            log_failed(name, error)
            failed.append(name)
    return scores, failed


def _case(case: Case, records: Mapping[str, Any], scores: Scores, task: Task) -> dict[str, Any]:
    record, both = records[case["id"]], scores[case["id"]]
    values = {
        which: {n: {key: getattr(one, key) for key in SCORES} for n, one in zip(task.classes[1:], ones, strict=True)}
        for which, ones in both.items()
    }
    expected = (record["quality"]["source"] or {}).get("expected")
    hashes = {"input_sha256": record["input_sha256"], "label_sha256": path_sha256(case["label"])}
    return {**hashes, "decision": record["decision"], "reason": record["reason"], **values, "expected": expected}


def summarize(scores: Scores, which: str, classes: Sequence[str]) -> dict[str, Any]:
    """Mean of each score per class, with the bootstrap 95 % interval over the cases that have a value."""
    return {
        name: {key: bootstrap([getattr(both[which][k], key) for both in scores.values()]) for key in SCORES}
        for k, name in enumerate(classes)
    }


def bootstrap(values: Sequence[float]) -> dict[str, float | int]:
    """Mean, 95 % percentile interval of the mean over resampled cases, and number of the values that are not NaN."""
    known = np.asarray([value for value in values if not np.isnan(value)], float)
    if not len(known):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    drawn = np.random.default_rng(0).choice(known, (BOOTSTRAP, len(known))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": len(known)}


def paired(scores: Scores) -> dict[str, Any]:
    """Gain of the mean Dice by adaptation, case by case."""
    gains = [mean_dice(both["adapted"]) - mean_dice(both["plain"]) for both in scores.values()]
    known = [gain for gain in gains if not np.isnan(gain)]
    return {
        "gain": bootstrap(known),
        "harmed": sum(gain < -HARM for gain in known),
        "worst": round(min(known), 4) if known else None,
    }


def _expected(scores: Scores, records: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Error of the predicted Dice of the plain maps, its recalibration, and the site's accepted range."""
    found = {name: (records[name]["quality"]["source"] or {}).get("expected") for name in scores}
    quality = {name: CaseQuality.from_dict(values) for name, values in found.items() if values is not None}
    triples = []  # predicted Dice with interval, true Dice
    for name, one in quality.items():
        for label, score in zip(classes, scores[name]["plain"], strict=True):
            if one.dice[label].predicted and not np.isnan(score.dice):
                triples.append((one.dice[label], score.dice))
    if not triples:
        accepted: dict[str, Any] = {"classes": dict.fromkeys(classes), "distance": None}
        return {"expected_dice": None, "recalibration": {"shift": 0.0}, "accepted": accepted, "drift": None}
    predicted, true = (np.array(part) for part in zip(*((one.dice, dice) for one, dice in triples), strict=True))
    shift = recalibration(predicted, true)
    after = expit(logit(np.clip(predicted, EDGE, 1 - EDGE)) + shift)
    varied = len(triples) > 2 and np.ptp(predicted) > 0 and np.ptp(true) > 0
    error = {
        "n": len(triples),
        "mean_absolute_error": float(np.abs(predicted - true).mean()),
        "recalibrated": float(np.abs(after - true).mean()),
        "bias": float((predicted - true).mean()),
        "rank_correlation": float(spearmanr(predicted, true)[0]) if varied else None,
        "coverage": float(np.mean([one.low <= dice <= one.high for one, dice in triples])),
    }
    moved = [one.shifted(shift) for one in quality.values()]
    lowest = {}
    for label in classes:
        heights = [one.dice[label].dice for one in moved if one.dice[label].predicted]
        lowest[label] = float(np.quantile(heights, TAIL, method="lower")) if heights else None
    distances = [one.distance for one in moved if one.distance is not None]
    farthest = float(np.quantile(distances, 1 - TAIL, method="higher")) if distances else None
    drift = {"median": float(np.median(distances)), "largest": max(distances)} if distances else None
    return {
        "expected_dice": error,
        "recalibration": {"shift": shift},
        "accepted": {"classes": lowest, "distance": farthest},
        "drift": drift,
    }


def recalibration(predicted: np.ndarray, true: np.ndarray) -> float:
    """Shift s of the logit of the predicted Dice that makes its mean the mean of the true one, at most 4."""
    z = logit(np.clip(predicted, EDGE, 1 - EDGE))

    def excess(s: float) -> float:
        return float(expit(z + s).mean() - true.mean())

    if excess(-MOST_SHIFT) >= 0 or excess(MOST_SHIFT) <= 0:
        return -MOST_SHIFT if excess(-MOST_SHIFT) >= 0 else MOST_SHIFT
    return round(float(brentq(excess, -MOST_SHIFT, MOST_SHIFT)), 4)


# ---------------------------------------------------------------------------------------------------------------- page


def _page(
    report: Mapping[str, Any],
    adaptation: Adaptation,
    folder: Path,
    cases: Mapping[str, Case],
    scores: Scores,
    names: Mapping[str, str],
    mapping: MapLabelsd,
) -> str:
    rows = []
    for which, classes in report["scores"].items():
        for name, entry in classes.items():
            rows.append([f"{name}, {which}", *(_interval(entry[key]) for key in SCORES), entry["dice"]["n"]])
    gain, error = report["adaptation"], report["expected_dice"]
    told = (
        f"{gain['harmed']} of {gain['gain']['n']} cases lost more than {HARM} of mean Dice, the worst {gain['worst']}."
    )
    parts = [
        section(
            "Scores", [table(["class", "Dice", f"NSD ({report['nsd_tolerance_mm']:g} mm)", "HD95 (mm)", "n"], rows)]
        ),
        section("Plain against adapted", [paragraph(f"Gain of mean Dice {_interval(gain['gain'])}. {told}")]),
    ]
    if error is None:
        parts.append(section("Predicted Dice", [paragraph("The model folder has no calibration.")]))
    else:
        shift = f"shift of the logit {report['recalibration']['shift']:+.3f}"
        numbers = [[key.replace("_", " "), value] for key, value in error.items()]
        accepted = [[name, low] for name, low in report["accepted"]["classes"].items()]
        accepted.append(["distance from the training slices, at most", report["accepted"]["distance"]])
        pieces = [table(["predicted Dice at this site", ""], numbers), paragraph(f"Recalibration: {shift}.")]
        parts.append(section("Predicted Dice", [*pieces, table(["accepted from", ""], accepted)]))
    rows = []
    for name, both in scores.items():
        expected = report["cases"][names[name]]["expected"]
        mean = None if expected is None else CaseQuality.from_dict(expected).mean
        distance = None if expected is None else expected["distance"]
        dice = [mean_dice(both[which]) for which in ("plain", "adapted")]
        rows.append([names[name], *dice, mean, distance, report["cases"][names[name]]["reason"]])
    rows.sort(key=lambda row: row[1])
    head = ["case", "Dice", "adapted", "predicted", "distance", "reason"]
    parts.append(section("All cases, the worst first", [table(head, rows)]))
    worst = sorted(scores, key=lambda name: mean_dice(scores[name]["plain"]))[: SHOWN // 2]
    surprising = [row[0] for row in rows if row[3] is not None and abs(row[3] - row[1]) > SURPRISE]
    for name in list(dict.fromkeys([*worst, *(n for n in scores if names[n] in surprising)]))[:SHOWN]:
        parts.append(section(f"Outlier: {names[name]}", _pictures(adaptation, folder, cases[name], mapping)))
    about = {"model version": report["model_version"], "model": report["model_sha256"][:12], **report["versions"]}
    return page("Commissioning of a model at a site", parts, about)


def _pictures(adaptation: Adaptation, folder: Path, case: Case, mapping: MapLabelsd) -> list[str]:
    """Scan, label and final map of two slices."""
    final = label_path(folder, case["id"], case["image"])
    try:
        maps = {"label": case["label"], "prediction": final}
        slices, labels = scan_slices(case["image"], maps, adaptation.task, mapping)
    except (SamdaError, OSError) as error:
        return [paragraph(f"no pictures: {error}")]
    pieces = [legend(adaptation.task.classes)]
    for i in pick_slices(np.maximum(labels["label"], labels["prediction"]), 2):
        columns = {name: paint(slices[i], labels[name][i]) for name in maps}
        pieces.append(pictures({"scan": paint(slices[i]), **columns}, f"slice {i}"))
    return pieces


def _interval(entry: Mapping[str, Any]) -> str:
    if not entry["n"]:
        return "-"
    return f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"
