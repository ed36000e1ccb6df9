# SPDX-License-Identifier: Apache-2.0
"""Write the tables and figures of docs/evidence.md and docs/adapters.md from the results in `benchmarks/results`.

The text around them is by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samda.io import replacing, write_text

from ..timing import fill, markdown
from . import growth, tables
from .datasets import ALL, DATASETS, SPLITS
from .methods import METHODS
from .runs import LONG, PARTS, SHORT, missing, planned, read

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {name: DOCS / f"{name}.md" for name in ("evidence", "adapters")}
FIGURES = {name: DOCS / f"evidence_{name}.svg" for name in ("labels", "fields")}
ONE_PATIENT = DOCS.parent / "benchmarks" / "results" / "one_patient.json"
TAPS = ("block", "neck")
COLUMNS = 6  # pictures side by side
MET = {True: "yes", False: "no"}
Row = dict[str, Any]


def write_pages() -> None:
    _draw_labels(trained(), FIGURES["labels"])
    _draw_fields(fields(), FIGURES["fields"])
    for name, page in PAGES.items():
        write_text(page, filled(name, page.read_text(encoding="utf-8")))


def filled(name: str, text: str) -> str:
    return fill(text, blocks(name))


def trained() -> list[Row]:
    """All rows of trainings on the data sets."""
    return [row for name in SPLITS for row in read(name)]


def fields() -> list[Row]:
    """Rows of receptive fields: the networks that nobody trained, then the models of the hippocampus."""
    models = [row["field"] | {"network": row["method"]} for row in read("hippocampus") if "field" in row]
    return [*read("fields"), *models]


def blocks(name: str) -> dict[str, str]:
    rows = {data: read(data) for data in SPLITS}
    ours = {data: [row for row in found if row["method"] in METHODS] for data, found in rows.items()}
    if name == "adapters":
        found = {"cost": tables.cost(ours["hippocampus"])}
        return found | {data: tables.compared(ours[data], data) for data in SPLITS}
    found = {"sources": tables.sources(), "goals": _goals(rows), "done": _done(), "demo": tables.demo(read("demo"))}
    for data in SPLITS:
        found[data] = tables.scores(rows[data], data)
        found[f"{data}_paired"] = tables.compared(rows[data], data)
    soon = read("soon") + tables.pick(rows["hippocampus"], patients=30, budget=SHORT)
    found["soon"] = tables.scores([row for row in soon if row["method"] in ("pyramid", "DynUNet 3-D")], "hippocampus")
    found["adaptation"], found["shifts"] = tables.adaptation(read("adaptation")), tables.shifted(read("shifts"))
    found["trusted"] = tables.trusted(read("shifts"))
    found["growth"] = growth.table(read("growth"))
    found["elsewhere"] = tables.elsewhere(rows["vessels_chase"], "vessels_chase")
    ablations = read("ablations") + tables.pick(rows["hippocampus"], patients=10, budget=SHORT, method="pyramid + SALT")
    found["ablations"] = tables.compared(ablations, "hippocampus", base="pyramid + SALT")
    found["peft"], found["one_patient"] = (
        tables.peft(read("peft")),
        tables.one_patient(json.loads(ONE_PATIENT.read_text("utf-8"))),
    )
    return found | {f"fields_{tap}": tables.fields(fields(), tap) for tap in TAPS}


def _goals(rows: dict[str, list[Row]]) -> str:
    lines = []

    def ahead(data: str, count: int, least: float) -> None:
        """the default head against every network from scratch, paired by patient."""
        for rival in dict.fromkeys(row["method"] for row in rows[data] if row["method"] not in METHODS):
            mine, others = (
                tables.pick(rows[data], method=method, patients=count, budget=SHORT) for method in ("pyramid", rival)
            )
            values = tables.paired(mine, others)
            what = f"{data}, {tables.count_name(count)} patients, {SHORT} s: pyramid - {rival}"
            met = MET[statistics.fmean(values) >= least] if values else tables.NOTHING
            lines.append([what, f">= {least:+.2f}", tables.difference(values), met])

    def at_least(what: str, least: float, values: list[float], reach: Callable = statistics.fmean) -> None:
        cells = [f"{reach(values):.3f}", MET[reach(values) >= least]] if values else [tables.NOTHING] * 2
        lines.append([what, f">= {least:.2f}", *cells])

    for count in DATASETS["hippocampus"].counts:
        ahead("hippocampus", count, 0.02 if count in (10, 30) else 0.0)
    for data in list(SPLITS)[1:]:
        for count in DATASETS[data].counts[:2]:
            ahead(data, count, 0.0)
    best = [
        tables.mean(r) for r in tables.pick(rows["hippocampus"], patients=ALL, budget=LONG) if r["method"] in METHODS
    ]
    at_least(f"hippocampus, all patients, {LONG} s: best of samda", 0.87, best, max)
    vessels = tables.pick(rows["vessels_chase"], patients=ALL, method="pyramid")
    at_least("vessels_chase, all children: pyramid", 0.78, [tables.mean(row) for row in vessels], max)
    plain: dict[str, list[float]] = {}
    for row in tables.pick(read("demo")):
        for what, dice in row["dice"].items():
            plain.setdefault(what, []).append(statistics.fmean(dice.values()))
    for part, least in (("patient A", 0.87), ("patient B", 0.60), ("patient M", 0.40)):
        values = next((v for what, v in plain.items() if part in what and "adapted" not in what), [])
        at_least(f"demo, {part}: mean over the seeds", least, values)
    return markdown(["goal", "wanted", "reached", "met"], lines)


def _done() -> str:
    lines = []
    for part in PARTS:
        wanted, left = len(planned(part)), len(missing(part))
        kinds = Counter(row.get("processor", "not noted") for row in read(part) if "data" in row)
        on = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
        lines.append([part, str(wanted), str(wanted - left), f"{left}, not made yet" if left else "none", on])
    return markdown(["part", "runs planned", "done", "left out", "instructions of the processor: runs"], lines)


def checksum(rows: Any) -> str:
    """Of what a figure shows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _draw_labels(rows: list[Row], path: Path) -> None:
    """Dice over training patients: a panel for each data set, a line for each method."""
    names = [name for name in SPLITS if tables.pick(rows, data=name)] or ["hippocampus"]
    figure = _figure(4.2 * len(names), 4.2)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, data in zip(panels, names, strict=True):
        counts = DATASETS[data].counts
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            parts = [tables.pick(rows, data=data, method=method, patients=n, budget=SHORT) for n in counts]
            points = {at: [tables.mean(row) for row in part] for at, part in enumerate(parts) if part}
            if points:
                means = [statistics.fmean(values) for values in points.values()]
                line = "--" if method not in METHODS else "-"
                axes.plot(list(points), means, line, color=f"C{number % 10}", marker="o", markersize=3, label=method)
        axes.set(title=data, xlabel="training patients", xticks=range(len(counts)))
        axes.set_xticklabels([tables.count_name(n) for n in counts])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=6, frameon=False)
    panels[0].set_ylabel(f"Dice of held-out patients, {SHORT} CPU seconds")
    _save(figure, path, rows)


def _draw_fields(rows: list[Row], path: Path) -> None:
    """Influence of each pixel on the middle, three decades from white to dark: a row of pictures per tap, in bands."""
    import numpy as np

    bands = max(1, math.ceil(len(rows) / COLUMNS))
    figure = _figure(1.8 * COLUMNS, 3.6 * bands)
    grid = figure.subplots(len(TAPS) * bands, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, row in enumerate(rows):
        band, column = divmod(number, COLUMNS)
        for line, tap in enumerate(TAPS):
            axes = grid[len(TAPS) * band + line, column]
            picture = np.array([list(bytes.fromhex(text)) for text in row[tap]["picture"]])
            axes.imshow(picture, cmap="magma_r", vmin=0, vmax=255, interpolation="nearest")
            if line == 0:
                axes.set_title(row["network"], fontsize=7)
    _save(figure, path, rows)


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "samda"  # the same rows give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, rows: list[Row]) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": checksum(rows)})
