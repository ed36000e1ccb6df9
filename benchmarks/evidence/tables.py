# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/evidence.md from stored rows: means, spreads, and differences of pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .methods import ABLATIONS, ENCODER, FROZEN, METHODS
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


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of two and more, standard deviation: "0.512 ± 0.031"; of a single one "0.512 (1)"."""
    if not values:
        return NOTHING
    mean = format(statistics.fmean(values), f"{sign}.3f")
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean} (1)"


def labels_name(count: int) -> str:
    """Words for a number of labelled slices."""
    return "all" if count == 0 else str(count)


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def few_labels(rows: list[Row], task: str) -> str:
    """Dice of the methods that leave the encoder alone, over labelled slices."""
    lines = []
    for method in FROZEN:
        cells = [spread([r["dice"] for r in pick(rows, task=task, method=method, labels=n)]) for n in COUNTS]
        lines.append([f"`{method}`", *cells])
    return markdown(["Dice", *(labels_name(n) for n in COUNTS)], lines)


def encoder(rows: list[Row], task: str, methods: Sequence[str] = FROZEN + ENCODER) -> str:
    """Dice of all methods, and the gain over the head alone, seed by seed, where both are there."""
    counts = sorted(ENCODER_COUNTS, key=lambda n: n or 10**6)
    head = ["method"]
    for n in counts:
        head += [f"Dice, {labels_name(n)} slices", f"over `head`, {labels_name(n)}"]
    lines = []
    for method in methods:
        cells: list[str] = []
        for n in counts:
            mine = [r for r in pick(rows, task=task, method=method, labels=n) if r["seed"] < ENCODER_SEEDS]
            cells += [spread([r["dice"] for r in mine]), spread([g for _, g in gains(mine, rows)], "+")]
        if any(cell != NOTHING for cell in cells):
            lines.append([f"`{method}`", *cells])
    return markdown(head, lines)


def gains(mine: list[Row], rows: list[Row], base: str = "head") -> list[tuple[Row, float]]:
    """Rows of a method, each with what it has over `base` of the same task, slices and seed."""
    found = []
    for row in mine:
        rival = pick(rows, method=base, **{key: row[key] for key in ("task", "labels", "seed")})
        if rival:
            found.append((row, row["dice"] - rival[0]["dice"]))
    return found


def cost(rows: list[Row], task: str) -> str:
    """Parameters, seconds and megabytes of each method."""
    lines = []
    for method in METHODS:
        mine = pick(rows, task=task, method=method)
        if mine:
            seconds = statistics.median(r["seconds"] for r in mine)
            lines.append([f"`{method}`", f"{mine[0]['parameters']:,}", f"{seconds:.0f}", f"{mine[0]['megabytes']:.2f}"])
    return markdown(["method", "trained parameters, without head", "CPU seconds (median)", "MB"], lines)


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
    """One dial: Dice on eight slices, the difference to the first row seed by seed, and what to make of it."""
    found: dict[str, dict[int, Row]] = {}
    for row, method in ABLATIONS[name].items():
        twin = next((key for key, value in METHODS.items() if value is method), None)
        mine = pick(main, task="abdomen", method=twin, labels=8) if twin else pick(rows, ablation=name, row=row)
        found[row] = {r["seed"]: r for r in mine if r["seed"] < ENCODER_SEEDS}
    first = next(iter(found.values()))
    lines, means, deviations = [], [], []
    for row, mine in found.items():
        values = [r["dice"] for r in mine.values()]
        differences = [r["dice"] - first[seed]["dice"] for seed, r in mine.items() if seed in first]
        count = f"{next(iter(mine.values()))['parameters']:,}" if mine else NOTHING
        against = spread(differences, "+") if mine is not first else ""
        lines.append([row, count, str(len(values)), spread(values), against])
        if len(values) > 1:
            means.append(statistics.fmean(values))
            deviations.append(statistics.stdev(values))
    table = markdown(["", "parameters", "seeds", "Dice", "against the first row"], lines)
    if len(means) < 2:
        return table
    width, noise = max(means) - min(means), statistics.median(deviations)
    verdict = "below" if width < noise else "above"
    return f"{table}\n\nThe means span {width:.3f}; the median spread over seeds is {noise:.3f}: {verdict} the spread."


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


def adaptation(results: dict[str, Any]) -> str:
    """Mean Dice on B and M over the source models: plain, the last iterate, and what the guard lets pass."""
    cases = ("B", "M")
    runs = [run for run in results.get("runs", []) if run["case"] in cases]
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
    """What the papers claim, and how often it held here, pair by pair."""
    claims: list[tuple[str, str, str, Callable[[int], bool]]] = [
        ("SALT beats LoRA", "salt", "lora", lambda n: True),
        ("SALT beats S-SAM", "salt", "s_sam", lambda n: True),
        ("DKA beats a plain bottleneck", "dka", "bottleneck", lambda n: True),
        ("DKA beats its small kernel alone", "dka", "dka_5", lambda n: True),
        ("LKA beats a plain bottleneck", "lka", "bottleneck", lambda n: True),
        ("a plain bottleneck falls below the head alone when labels are few", "head", "bottleneck", lambda n: n == 2),
        ("LoRA falls below the head alone when labels are few", "head", "lora", lambda n: n == 2),
        ("DKA does not, when labels are few", "dka", "head", lambda n: n == 2),
        ("SAM-DA rivals full fine-tuning", "sam_da", "full", lambda n: True),
        ("SAM-DA beats the whole decoder", "sam_da", "decoder", lambda n: True),
    ]
    lines = []
    for claim, better, worse, counts in claims:
        mine = [row for row in pick(rows, task="abdomen", method=better) if counts(row["labels"])]
        pairs = gains(mine, rows, base=worse)
        won = sum(gain > 0 for _, gain in pairs)
        differences = [gain for _, gain in pairs]
        lines.append([claim, f"`{better}` - `{worse}`", f"{won} of {len(pairs)}", spread(differences, "+")])
    return markdown(["claim", "difference", "pairs in which it holds", "mean difference"], lines)
