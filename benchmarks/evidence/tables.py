# SPDX-License-Identifier: Apache-2.0
"""Tables from stored rows: means over patients, spread over seeds, and differences paired by patient.

A run gives each held-out patient one number, the mean over the classes. A cell is the mean over patients and seeds,
with the standard deviation of the seeds' means. Two methods are compared patient by patient: first the mean over the
seeds that both have, then the difference, its mean over the patients and Student's 95 % interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from ..timing import markdown
from .datasets import ALL, DATASETS, SPLITS
from .methods import ABLATIONS, METHODS, RIVALS
from .runs import BASELINE, SCORES, SHORT

Row = dict[str, Any]
HARM = 0.02  # loss of Dice from which a case counts as harmed
LOW = 0.6  # Dice below which a prediction should be found out
NOTHING = "-"


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that ran, with these values."""
    return [r for r in rows if "not_run" not in r and all(r.get(key) == value for key, value in wanted.items())]


def patients(row: Row, score: str = "dice", data: str | None = None) -> dict[str, float]:
    """Patient -> mean over the classes that have a value; of the data set itself or of another that was tested."""
    found = {}
    for patient, classes in row["test"][data or row["data"]].items():
        values = [c[SCORES.index(score)] for c in classes.values() if c[SCORES.index(score)] is not None]
        if values:
            found[patient] = statistics.fmean(values)
    return found


def mean(row: Row, score: str = "dice", data: str | None = None) -> float:
    """Over the patients of a run."""
    return statistics.fmean(patients(row, score, data).values())


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation, "0.512 ± 0.031"; fewer than three values are counted, "0.512 (1)"."""
    if not values:
        return NOTHING
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}{f' ({len(values)})' if len(values) < 3 else ''}"


def paired(mine: list[Row], others: list[Row]) -> list[float]:
    """Differences of Dice patient by patient, each the mean over the seeds that both have."""
    theirs = {row["seed"]: patients(row) for row in others}
    found: dict[str, list[float]] = {}
    for row in mine:
        for patient, dice in patients(row).items():
            if patient in theirs.get(row["seed"], {}):
                found.setdefault(patient, []).append(dice - theirs[row["seed"]][patient])
    return [statistics.fmean(found[patient]) for patient in sorted(found)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean; unbounded with fewer than two values."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def difference(values: Sequence[float]) -> str:
    """Mean and interval, "+0.020 (+0.010 to +0.030)", bold where the interval leaves out zero."""
    if len(values) < 2:
        return NOTHING
    low, high = interval(values)
    text = f"{statistics.fmean(values):+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def count_name(count: int) -> str:
    return "all" if count == ALL else str(count)


def _methods_of(rows: list[Row]) -> list[str]:
    return [name for name in (*METHODS, *RIVALS, *ABLATIONS) if any(row.get("method") == name for row in rows)]


def _columns(rows: list[Row], data: str) -> list[tuple[int, int]]:
    """Training patients and budget of each column that has a row."""
    columns = [(n, budget) for budget in sorted({row["budget"] for row in rows}) for n in DATASETS[data].counts]
    return [(n, budget) for n, budget in columns if pick(rows, patients=n, budget=budget)]


def _head(first: str, columns: list[tuple[int, int]], *more: str) -> list[str]:
    return [first, *(f"{count_name(n)}, {budget} s" for n, budget in columns), *more]


def scores(rows: list[Row], data: str) -> str:
    """Dice of each method over training patients, in each budget; NSD and HD95 with the most patients."""
    columns = _columns(rows, data)
    if not columns:
        return f"not measured; `python -m benchmarks.evidence --data FOLDER --parts {data}`"
    unit, lines = "mm" if DATASETS[data].dimensions == 3 else "px", []
    for method in _methods_of(rows):
        found = [pick(rows, method=method, patients=n, budget=budget) for n, budget in columns]
        cells = [spread([mean(row) for row in part]) for part in found]
        last = next((part for part in reversed(found) if part), [])
        for score, digits in (("nsd", 3), ("hd95_mm", 1)):
            values = [mean(row, score) for row in last]
            cells.append(f"{statistics.fmean(values):.{digits}f}" if values else NOTHING)
        reasons = [row["not_run"] for row in rows if row.get("method") == method and "not_run" in row]
        name = method if last or not reasons else f"{method}, not run: {reasons[0]}"
        lines.append([name, *cells])
    return markdown(_head("Dice", columns, "NSD, last", f"HD95 ({unit}), last"), lines)


def compared(rows: list[Row], data: str, base: str = BASELINE) -> str:
    """What each method has over `base`, paired by patient, per number of training patients."""
    columns, lines = _columns(rows, data), []
    for method in _methods_of(rows):
        cells = []
        for n, budget in columns:
            mine, others = (pick(rows, method=name, patients=n, budget=budget) for name in (method, base))
            cells.append(difference(paired(mine, others)))
        if method != base and any(cell != NOTHING for cell in cells):
            lines.append([f"{method} - {base}", *cells])
    return markdown(_head("difference of Dice", columns), lines) if lines else "not measured"


def elsewhere(rows: list[Row], data: str) -> str:
    """Dice of the same models on another data set."""
    other, columns, lines = DATASETS[data].elsewhere, _columns(rows, data), []
    for method in _methods_of(rows):
        parts = [pick(rows, method=method, patients=n, budget=budget) for n, budget in columns]
        lines.append([method, *(spread([mean(row, data=other) for row in part]) for part in parts)])
    return markdown(_head(f"Dice on {other}", columns), lines) if lines else "not measured"


def cost(rows: list[Row]) -> str:
    """Trained parameters of each method, and the CPU seconds that its training took."""
    lines = []
    for method in _methods_of(rows):
        mine = pick(rows, method=method, budget=SHORT)
        if mine:
            own = mine[0].get("without_head")
            seconds = statistics.median(row["cpu_seconds"] for row in mine)
            cells = [f"{mine[0]['parameters']:,}", NOTHING if own is None else f"{own:,}", f"{seconds:.0f}"]
            lines.append([method, *cells])
    head = ["", "trained parameters", "of them adapters", f"CPU seconds, budget {SHORT} (median)"]
    return markdown(head, lines) if lines else "not measured"


def demo(rows: list[Row]) -> str:
    """Mean Dice over the organs that a scan shows, for each seed of `samda demo`."""
    rows = pick(rows)
    if not rows:
        return "not measured; `python -m benchmarks.evidence --parts demo`"
    lines = []
    for what in rows[0]["dice"]:
        values = [statistics.fmean(row["dice"][what].values()) for row in rows]
        lines.append([what, *(f"{value:.3f}" for value in values), spread(values)])
    lines.append(["seconds", *(str(row["seconds"]) for row in rows), ""])
    return markdown(["Dice", *(f"seed {row['seed']}" for row in rows), "mean"], lines)


def adaptation(rows: list[Row]) -> str:
    """Mean Dice over the source models: plain, the last iterate, and what the guard lets pass."""
    rows = pick(rows)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        cells = []
        for case in cases:
            dice = [row["dice"] for row in pick(rows, objective=objective, case=case)]
            cells += [spread([one[key] for one in dice]) for key in ("source", "last", "final")]
            cells.append(f"{min(one['final'] - one['source'] for one in dice):+.3f}" if dice else NOTHING)
        lines.append([f"`{objective}`", *cells])
    head = [f"{case}, {what}" for case in cases for what in ("plain", "alone", "guarded", "smallest gain")]
    return markdown(["objective", *head], lines) if lines else "not measured"


def shifted(rows: list[Row]) -> str:
    """What the default does at other sites: gains over the cases of all source models."""
    rows, lines = pick(rows), []
    keys = dict.fromkeys((row["source"], row["target"], row["shift"], row["severity"] >= 3) for row in rows)
    for source, target, shift, strong in keys:
        same = [r for r in pick(rows, source=source, target=target, shift=shift) if (r["severity"] >= 3) == strong]
        cases = [case for row in same for case in row["cases"].values()]
        gains = [case["final"] - case["source"] for case in cases]
        means = [f"{statistics.fmean(case[key] for case in cases):.3f}" for key in ("source", "final")]
        harmed = sum(gain < -HARM for gain in gains) / len(gains)
        accepted = sum(case["reason"] == "accepted" for case in cases) / len(cases)
        cost = sum(case["seconds"] for case in cases) / sum(case["predict"] for case in cases)
        where = target if shift == "none" else f"{target}, {shift} {'3 to 5' if strong else '1 and 2'}"
        shares = [f"{100 * share:.0f} %" for share in (harmed, accepted)]
        lines.append(
            [source, where, str(len(cases)), *means, shares[0], f"{min(gains):+.3f}", shares[1], f"{cost:.1f}"]
        )
    head = ["source", "target", "cases", "plain", "adapted", "harmed", "smallest gain", "accepted", "time / predict"]
    return markdown(head, lines, texts=2) if lines else "not measured"


def trusted(rows: list[Row]) -> str:
    """How good the predicted Dice of classes is: error, ranks, the low ones found, and the interval's coverage."""
    rows, lines = pick(rows), []
    for source, target, corrupted in dict.fromkeys((row["source"], row["target"], row["severity"] > 0) for row in rows):
        same = [row for row in pick(rows, source=source, target=target) if (row["severity"] > 0) == corrupted]
        found = [one for row in same for case in row["cases"].values() for one in case["expected"].values()]
        if not found:
            continue
        true, expected, low, high = (list(column) for column in zip(*found, strict=True))
        error = statistics.fmean(abs(a - b) for a, b in zip(true, expected, strict=True))
        covered = sum(a <= t <= b for t, a, b in zip(true, low, high, strict=True)) / len(true)
        ranks = stats.spearmanr(true, expected)[0] if len(set(true)) > 1 and len(set(expected)) > 1 else math.nan
        bad = [e for t, e in zip(true, expected, strict=True) if t < LOW]
        good = [e for t, e in zip(true, expected, strict=True) if t >= LOW]
        area = NOTHING
        if bad and good:
            area = f"{stats.mannwhitneyu(good, bad)[0] / (len(good) * len(bad)):.3f}"
        cells = [str(len(true)), f"{statistics.fmean(true):.3f}", f"{error:.3f}", f"{ranks:.3f}", area]
        lines.append([source, f"{target}{', corrupted' if corrupted else ''}", *cells, f"{100 * covered:.0f} %"])
    area = f"AUROC, Dice < {LOW}"
    head = ["source", "target", "classes of cases", "Dice", "error", "rank correlation", area, "covered"]
    return markdown(head, lines, texts=2) if lines else "not measured"


def fields(rows: list[Row], tap: str) -> str:
    """Share of the image's area that holds 20, 50 and 99 % of the influence, on three scales."""
    scales, shares = ("mass", "normalized", "log"), ("0.2", "0.5", "0.99")
    head = [f"tap `{tap}`", *(f"{scale}, {round(100 * float(share))} %" for scale in scales for share in shares)]
    lines = []
    for row in rows:
        areas = [row[tap]["areas"][scale][share] for scale in scales for share in shares]
        lines.append([row["network"], *(NOTHING if area is None else f"{100 * area:.1f} %" for area in areas)])
    return markdown(head, lines)


def peft(rows: list[Row]) -> str:
    """HF peft's LoRA and ours, from the same random A and B: the largest differences."""
    if not pick(rows):
        return f"not run: {rows[0]['not_run']}" if rows else "not measured"
    row = pick(rows)[0]
    seconds = row["step_seconds"]
    lines = [
        ["logits before the first step", f"{row['outputs']:.1e}"],
        ["loss, over the steps", f"{row['losses']:.1e}"],
        ["A and B after the last step", f"{row['weights']:.1e} (they moved by {row['changed']:.1e})"],
        ["logits after the last step", f"{row['logits']:.1e}"],
        ["seconds of a step, peft / samda", f"{seconds['peft']:.2f} / {seconds['samda']:.2f}"],
    ]
    return markdown([f"{row['layers']} linear layers, {row['parameters']:,} parameters", "largest difference"], lines)


def one_patient(kept: dict[str, Any]) -> str:
    """Mean Dice of the first version's methods, on slices of a patient's abdomen and of a chest CT."""
    columns = [(task, n) for task in ("abdomen", "chest") for n in ("2", "8", "0")]
    head = ["labeled slices", *(f"{task}, {'all' if n == '0' else n}" for task, n in columns)]
    lines = []
    for method in kept["abdomen"]:
        found = [kept[task].get(method, {}).get(n, []) for task, n in columns]
        lines.append([f"`{method}`", *(f"{statistics.fmean(dice):.3f}" if dice else NOTHING for dice in found)])
    return markdown(head, lines)


def sources() -> str:
    """The data sets, who is held out, and where they come from."""
    lines = []
    for name, entry in DATASETS.items():
        held = f"{len(SPLITS[name]['train'])} / {len(SPLITS[name]['test'])}" if name in SPLITS else "0 / all"
        lines.append([f"`{name}`", entry.about, held, ", ".join(entry.classes[1:]), entry.source])
    head = ["folder", "what", "patients: may train / held out", "classes", "source and license"]
    return markdown(head, lines, texts=len(head))
