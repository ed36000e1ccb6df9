# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/evidence.md from stored rows: means, spreads, and differences of pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from .methods import ABLATIONS, FROZEN, METHODS
from .parts import COUNTS, ENCODER_COUNTS, ENCODER_SEEDS, RATED, RATES

__all__ = [
    "ablation",
    "adaptation",
    "cost",
    "encoder",
    "few_labels",
    "fields",
    "findings",
    "markdown",
    "peft",
    "rates",
    "rivals",
    "spread",
]

Row = dict[str, Any]
NOTHING = "-"
ORDERED = sorted(ENCODER_COUNTS, key=lambda n: n or math.inf)  # all of them last


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation, "0.512 ± 0.031"; fewer than three values are counted, "0.512 (1)"."""
    if not values:
        return NOTHING
    mean = format(statistics.fmean(values), f"{sign}.3f")
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean}{deviation}{f' ({len(values)})' if len(values) < 3 else ''}"


def difference(values: Sequence[float]) -> str:
    """Mean and standard deviation of paired differences, bold where the 95 % interval of the mean leaves out zero."""
    text = spread(values, "+")
    return f"**{text}**" if told_apart(values) else text


def told_apart(values: Sequence[float]) -> bool:
    """Does Student's 95 % interval of the mean, mean ± t s / sqrt(n), leave out zero? Never with fewer than three."""
    if len(values) < 3:
        return False
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return abs(statistics.fmean(values)) > half


def labels_name(count: int) -> str:
    """Words for a number of labeled slices."""
    return "all" if count == 0 else str(count)


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def few_labels(rows: list[Row], task: str) -> str:
    """Dice of the methods that leave the encoder alone, over labeled slices."""
    lines = []
    for method in FROZEN:
        cells = [spread([r["dice"] for r in pick(rows, task=task, method=method, labels=n)]) for n in COUNTS]
        lines.append([f"`{method}`", *cells])
    return markdown(["Dice", *(labels_name(n) for n in COUNTS)], lines)


def encoder(rows: list[Row], task: str, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Dice of all methods, and the gain over the head alone, seed by seed, where both are there."""
    head = ["method"]
    for n in ORDERED:
        head += [f"Dice, {labels_name(n)} slices", f"over `head`, {labels_name(n)}"]
    lines = []
    for method in methods:
        cells: list[str] = []
        for n in ORDERED:
            mine = [r for r in pick(rows, task=task, method=method, labels=n) if r["seed"] < ENCODER_SEEDS]
            cells += [spread([r["dice"] for r in mine]), difference(gains(mine, pick(rows, method="head")))]
        if any(cell != NOTHING for cell in cells):
            lines.append([f"`{method}`", *cells])
    return markdown(head, lines)


def gains(mine: list[Row], others: list[Row]) -> list[float]:
    """What the rows of a method have over those of another of the same task, slices and seed."""
    found = []
    for row in mine:
        same = pick(others, **{key: row[key] for key in ("task", "labels", "seed")})
        found += [row["dice"] - other["dice"] for other in same]
    return found


def cost(rows: list[Row], task: str, compared: list[Row]) -> str:
    """Parameters, seconds and megabytes of each method; the head is known from the rivals."""
    lines, head = [], NOTHING
    for rival in (row for row in compared if "parameters" in row and row["rival"] in METHODS):
        for twin in pick(rows, task=task, method=rival["rival"])[:1]:
            head = f"{rival['parameters'] - twin['parameters']:,}"
    for method in METHODS:
        mine = pick(rows, task=task, method=method)
        if mine:
            seconds = statistics.median(r["seconds"] for r in mine)
            lines.append([f"`{method}`", f"{mine[0]['parameters']:,}", f"{seconds:.0f}", f"{mine[0]['megabytes']:.2f}"])
    table = markdown(["method", "trained parameters, without head", "CPU seconds (median)", "MB"], lines)
    return f"{table}\n\nThe head has {head} parameters more, with every method."


def rates(rows: list[Row]) -> str:
    """Dice of each method at each rate, on the slices that serve this choice only."""
    lines = []
    for method in RATED:
        scale = 0.1 if method == "full" else 1.0
        found = [pick(rows, method=method, rate=rate * scale) for rate in RATES]
        cells = [f"{r[0]['dice']:.3f}" if r else NOTHING for r in found]
        lines.append([f"`{method}`" + (", a tenth of these" if method == "full" else ""), *cells])
    return markdown(["learning rate", *(f"{rate:g}" for rate in RATES)], lines)


def ablation(name: str, rows: list[Row], main: list[Row]) -> str:
    """One dial: Dice on eight slices, and the difference to the first row seed by seed."""
    found = {row: ablated(name, row, rows, main) for row in ABLATIONS[name]}
    first = next(iter(found.values()))
    lines = []
    for row, mine in found.items():
        count = f"{mine[0]['parameters']:,}" if mine else NOTHING
        against = "" if mine is first else difference(gains(mine, first))
        lines.append([row, count, spread([r["dice"] for r in mine]), against])
    return markdown(["", "parameters", "Dice", "against the first row"], lines)


def ablated(name: str, row: str, rows: list[Row], main: list[Row]) -> list[Row]:
    """The runs of a row of an ablation; one that the main table has is found there."""
    method = ABLATIONS[name][row]
    twin = next((key for key, value in METHODS.items() if value is method), None)
    mine = pick(main, task="abdomen", method=twin, labels=8) if twin else pick(rows, ablation=name, row=row)
    return [r for r in mine if r["seed"] < ENCODER_SEEDS]


def fields(rows: list[Row], tap: str) -> str:
    """Share of the image's area that holds 20, 50 and 99 % of the influence, on three scales."""
    scales, shares = ("mass", "normalized", "log"), ("0.2", "0.5", "0.99")
    head = [f"`{tap}`", *(f"{scale}, {round(100 * float(share))} %" for scale in scales for share in shares)]
    lines = []
    for row in rows:
        areas = [row[tap]["areas"][scale][share] for scale in scales for share in shares]
        name = "frozen SAM" if row["network"] == "head" else row["network"]
        lines.append([name, *(NOTHING if area is None else f"{100 * area:.1f} %" for area in areas)])
    return markdown(head, lines)


def rivals(rows: list[Row]) -> str:
    """Dice of everybody for the same slices and CPU seconds."""
    counts = [8, 0]
    lines = []
    for budget, name in dict.fromkeys((row["budget"], row["rival"]) for row in rows if row["rival"] != "peft"):
        mine = pick(rows, rival=name, budget=budget)
        done = [row for row in mine if "dice" in row]
        parts = [pick(done, labels=n) for n in counts]
        steps = [str(round(statistics.median(row["steps"] for row in part))) if part else NOTHING for part in parts]
        words = f"{done[0]['parameters']:,}" if done else f"not run: {mine[0]['reason']}"
        dice = [spread([row["dice"] for row in part]) for part in parts]
        lines.append([f"`{name}`", str(budget), words, " / ".join(steps), *dice])
    return markdown(
        ["", "CPU seconds", "trained parameters", "steps, 8 / all", "Dice, 8 slices", "Dice, all slices"], lines
    )


def peft(rows: list[Row]) -> str:
    """HF peft's LoRA and ours, from the same random A and B: the largest differences."""
    found = pick(rows, rival="peft")
    if not found:
        return "not measured"
    row = found[0]
    if row["status"] != "run":
        return f"not run: {row['reason']}"
    lines = [
        ["logits before the first step", f"{row['outputs']:.1e}"],
        [f"loss, over {row['steps']} steps", f"{row['losses']:.1e}"],
        ["A and B after the last step", f"{row['weights']:.1e} (they moved by {row['changed']:.1e})"],
        ["logits after the last step", f"{row['logits']:.1e}"],
        ["seconds of a step, peft / samda", f"{row['peft']['step_seconds']:.2f} / {row['samda']['step_seconds']:.2f}"],
    ]
    return markdown([f"{row['layers']} linear layers, {row['parameters']:,} parameters", "largest difference"], lines)


def adaptation(runs: list[Row]) -> str:
    """Mean Dice on B and M over the source models: plain, the last iterate, and what the guard lets pass."""
    cases = ("B", "M")
    head = ["objective", "seeds"]
    for case in cases:
        head += [f"{case} plain", f"{case} alone", f"{case} guarded", "smallest gain"]
    lines = []
    for method in dict.fromkeys(run["method"] for run in runs):
        seeds = len({run["seed"] for run in pick(runs, method=method)})
        cells = [f"`{method}`", str(seeds)]
        for case in cases:
            scores = [run["mean_dice"] for run in pick(runs, method=method, case=case)]
            cells += [f"{statistics.fmean(s[key] for s in scores):.3f}" for key in ("source", "last", "final")]
            cells.append(f"{min(s['final'] - s['source'] for s in scores):+.3f}")
        lines.append(cells)
    return markdown(head, lines)


def findings(rows: list[Row]) -> str:
    """What the papers claim, and what each claim compares, pair by pair."""
    claims = [
        ("SALT beats LoRA", "salt", "lora"),
        ("SALT beats S-SAM", "salt", "s_sam"),
        ("LKA beats a plain bottleneck of its width (8)", "lka", "bottleneck"),
        ("DKA beats a plain bottleneck of its width (16)", "dka", "bottleneck_16"),
        ("DKA beats its large kernel alone", "dka", "dka_51"),
        ("DKA beats its small kernel alone", "dka", "dka_5"),
        ("plain adapters fall below the head when labels are few", "head_fresh", "bottleneck"),
        ("", "head_fresh", "lora"),
        ("kernels save them", "dka", "head_fresh"),
        ("SAM-DA rivals full fine-tuning", "sam_da_fresh", "full"),
        ("SAM-DA beats the whole decoder", "sam_da", "decoder"),
        ("adapters of encoder and decoder add up", "salt+sam_da", "salt"),
        ("", "salt+sam_da", "sam_da_fresh"),
        ("fresh views, not what the method adds", "head_fresh", "head"),
        ("", "sam_da_fresh", "sam_da"),
    ]
    lines = []
    for claim, better, worse in claims:
        mine, others = (pick(rows, task="abdomen", method=name) for name in (better, worse))
        found = [gains(pick(mine, labels=n), others) for n in ORDERED]
        every = [d for differences in found for d in differences]
        won = f"{sum(d > 0 for d in every)} of {len(every)}"
        lines.append([claim, f"`{better}` - `{worse}`", *(difference(d) for d in found), won])
    names = [f"{labels_name(n)} slices" for n in ORDERED]
    return markdown(["claim", "difference", *names, "pairs above zero"], lines)
