# SPDX-License-Identifier: Apache-2.0
"""Figures of docs/evidence.md as SVG; each carries the checksum of the rows it was drawn from."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samda.io import replacing

from .methods import ENCODER, FROZEN
from .parts import CHEST, COUNTS, ENCODER_COUNTS, ENCODER_SEEDS, SEEDS
from .tables import labels_name, pick

__all__ = ["checksum", "draw_fields", "draw_labels"]

Row = dict[str, Any]
COLUMNS = 9  # pictures side by side


def checksum(rows: Any) -> str:
    """Of what a figure shows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def draw_labels(rows: list[Row], path: Path) -> None:
    """Dice over labeled slices: a line per method, with the band of one standard deviation where lines are few."""
    figure = _figure(14, 4.4)
    panels = figure.subplots(1, 3, sharey=True)
    _panel(panels[0], rows, "abdomen", FROZEN, COUNTS, SEEDS, "patient A, encoder left alone")
    _panel(panels[1], rows, "abdomen", ("head", *ENCODER), ENCODER_COUNTS, ENCODER_SEEDS, "patient A, encoder trained")
    _panel(panels[2], rows, "chest", (*FROZEN, *CHEST), ENCODER_COUNTS, ENCODER_SEEDS, "chest CT")
    panels[0].set_ylabel("Dice, slices of blocks never trained on")
    _save(figure, path, rows)


def _panel(
    axes: Any, rows: list[Row], task: str, methods: Sequence[str], counts: Sequence[int], seeds: int, title: str
) -> None:
    """Lines over the counts and seeds that all these methods have."""
    for number, method in enumerate(methods):
        points = {
            at: [row["dice"] for row in pick(rows, task=task, method=method, labels=n) if row["seed"] < seeds]
            for at, n in enumerate(COUNTS)
            if n in counts
        }
        points = {at: values for at, values in points.items() if values}
        if not points:
            continue
        places, means = list(points), [statistics.fmean(values) for values in points.values()]
        style = {"color": "black", "linestyle": "--"} if method == "head" else {"color": f"C{number % 10}"}
        if number > 10:
            style["linestyle"] = ":"
        axes.plot(places, means, marker="o", markersize=3, label=method, **style)
        if len(methods) <= 4:
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(title=title, xlabel="labeled slices", xticks=range(len(COUNTS)))
    axes.set_xticklabels([labels_name(n) for n in COUNTS])
    axes.set_xlim(-0.3, len(COUNTS) - 0.7)
    if axes.lines:
        axes.legend(fontsize=7, frameon=False, ncols=1 if len(methods) <= 4 else 2)
    axes.grid(alpha=0.3)


def draw_fields(rows: list[Row], path: Path) -> None:
    """Influence of each pixel on the middle, three decades from white to dark: a row of pictures per tap, in bands."""
    import numpy as np

    taps = ("block", "neck")
    bands = max(1, math.ceil(len(rows) / COLUMNS))
    figure = _figure(1.35 * COLUMNS, 3.0 * bands)
    grid = figure.subplots(len(taps) * bands, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, row in enumerate(rows):
        band, column = divmod(number, COLUMNS)
        for line, tap in enumerate(taps):
            axes = grid[len(taps) * band + line, column]
            picture = np.array([list(bytes.fromhex(text)) for text in row[tap]["picture"]])
            axes.imshow(picture, cmap="magma_r", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(tap)
        name = "frozen SAM" if row["network"] == "head" else row["network"]
        grid[len(taps) * band, column].set_title(name, fontsize=7)
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
