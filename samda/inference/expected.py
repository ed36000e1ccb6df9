# SPDX-License-Identifier: Apache-2.0
"""`predictions.csv`: the predicted Dice of each case and class, what to look at first on top."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.datalists import Case
from samda.errors import InputError, UsageError
from samda.expected_dice import TRUSTED, CaseQuality
from samda.inference.writer import label_path
from samda.io import csv_text, parse_json, regular_file, write_text

TABLE = "predictions.csv"
QUALITY = "quality"  # key of `<case>.json`
HEAD = ("case", "class", "dice", "low", "high", "flags")


def write_table(
    folder: str | Path,
    cases: Sequence[Case],
    quality: Mapping[str, CaseQuality],
    site: Mapping[str, Any] | None = None,
) -> dict[str, CaseQuality]:
    """Write `predictions.csv`; returns what it holds, in its order.

    Cases of an earlier run, or of another process, are read from their `<case>.json`. `site` is a report of
    `samda commission`: its recalibration is applied.
    """
    found = dict(quality)
    for case in cases:
        if case["id"] not in found:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UsageError):
                path = label_path(folder, case["id"], case["image"]).with_name(f"{case['id']}.json")
                found[case["id"]] = CaseQuality.from_dict(parse_json(path.read_bytes())[QUALITY])
    shift = 0.0 if site is None else site["recalibration"]["shift"]
    found = {case: one.shifted(shift) for case, one in found.items()} if shift else found
    rows = []
    order = look_first(found)
    for name in order:
        for label, one in sorted(found[name].dice.items(), key=lambda item: item[1].dice):
            numbers = [round(value, 3) for value in (one.dice, one.low, one.high)]
            rows.append([name, label, *numbers, "; ".join(flags(found[name], label, site))])
    write_text(Path(folder) / TABLE, csv_text([HEAD, *rows]))
    return {name: found[name] for name in order}


def look_first(quality: Mapping[str, CaseQuality]) -> list[str]:
    """The cases, the lowest mean predicted Dice first."""
    return sorted(quality, key=lambda case: (quality[case].mean, case))


def flags(quality: CaseQuality, name: str, site: Mapping[str, Any] | None = None) -> list[str]:
    """What to say of a class of a case in a few words; `site` is a report of `samda commission`."""
    one, found = quality.dice[name], []
    if not one.predicted:
        found.append("not predicted")
    elif one.dice < TRUSTED:
        found.append(f"below {TRUSTED:g}")
    if site is not None:
        accepted = site["accepted"]["classes"].get(name)
        if one.predicted and accepted is not None and one.dice < accepted:
            found.append(f"below the site's accepted {accepted:.3f}")
        farthest = site["accepted"]["distance"]
        if farthest is not None and quality.distance is not None and quality.distance > farthest:
            found.append("unlike the site's scans")
    return found


def read_site_report(path: str | Path) -> dict[str, Any]:
    """The JSON report of `samda commission`; InputError if the file is none."""
    try:
        report = parse_json(regular_file(path).read_bytes())
        accepted = report["accepted"]
        numbers = [*accepted["classes"].values(), accepted["distance"], report["recalibration"]["shift"]]
        if "commission_version" not in report or not all(isinstance(n, int | float | None) for n in numbers):
            raise ValueError("numbers are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no report of samda commission ({error}); give its JSON file") from error
    return report
