# SPDX-License-Identifier: Apache-2.0
"""Audit record: one JSON object per case, without pixel data and names.

The schema is `record.schema.json` in this folder. A record identifies input, model and settings by sha256, so that
adapting the same files again gives the same label map (`labels_sha256`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from samda.adaptation.case import PreparedCase, Segmentation
from samda.adaptation.guard import Decision, Evidence
from samda.adaptation.loop import Trajectory
from samda.errors import InputError, SamdaError, one_line
from samda.io import parse_json, write_text
from samda.provenance import canonical_json, now, pseudonym, sha256_of, versions

RECORD_VERSION = 1
CURVES = ("loss", "agreement", "entropy", "merit", "drift", "param_displacement")
EMPTY: dict[str, Any] = {  # fields of a case that was not predicted
    "seconds": {},
    "seed": None,
    "slices": [],
    "views": [],
    "intensity": {},
    "steps_run": 0,
    "best_step": 0,
    **{curve: [] for curve in CURVES},
    "volumes_ml": {},
    "dice_source_adapted": {},
    "quality": {"source": None, "adapted": None},
    "labels_sha256": None,
    "output_files": {},
}


@dataclasses.dataclass
class Outcome:
    """What the guard decided about a case, and on what evidence."""

    source: Evidence
    decision: Decision | None = None  # None until the guard has decided
    run: Trajectory | None = None
    adapted: Segmentation | None = None
    evidence: Evidence | None = None  # of `adapted`
    error: str | None = None

    @property
    def accepted(self) -> bool:
        """Does the adapted prediction replace that of the source model?"""
        return self.adapted is not None and self.decision is not None and self.decision.decision == "accepted"


def case_record(
    about: Mapping[str, Any], case: PreparedCase, outcome: Outcome, absent: float, classes: Sequence[str]
) -> dict[str, Any]:
    """The record of a case.

    Args:
        about: model and settings, see :meth:`samda.adaptation.engine.Adaptation.describe`.
        case: the case.
        outcome: of its adaptation.
        absent: plausibility that counts for an absent class.
        classes: names of the classes, background first.
    """
    run, source, decision = outcome.run, outcome.source, outcome.decision
    assert decision is not None
    kept = outcome.evidence or source
    curves: dict[str, list[float]] = {"agreement": [source.agreement], "entropy": [source.entropy]}
    if run is not None:
        curves = {curve: getattr(run, curve.removeprefix("param_")) for curve in CURVES}
    return {
        **_frame(about, case.input_sha256, case.name, case.started),
        **{curve: _plain(values) for curve, values in curves.items()},
        "seconds": {stage: round(seconds, 3) for stage, seconds in case.seconds.items()},
        "seed": case.seed,
        "slices": case.slices,
        "views": [view.describe() for view in case.views],
        "intensity": case.intensity,
        "steps_run": len(run.loss) - 1 if run else 0,
        "best_step": run.best_step if run else 0,
        "volumes_ml": {c: [round(e.volumes_ml[c], 3) for e in (source, kept)] for c in source.volumes_ml},
        "dice_source_adapted": _dice(case.source, outcome.adapted, classes),
        "quality": {
            "source": source.to_dict(absent),
            "adapted": None if outcome.evidence is None else outcome.evidence.to_dict(absent),
        },
        **dataclasses.asdict(decision),
        "error": outcome.error,
    }


def failed_record(
    about: Mapping[str, Any], input_sha256: str | None, name: str, error: Exception, started: str
) -> dict[str, Any]:
    """The record of a scan without a prediction; the pseudonym is of `name` where the hash is unknown."""
    unusable = isinstance(error, SamdaError)
    return _frame(about, input_sha256, name, started) | {
        "decision": "failed",
        "reason": "failed_input" if unusable else "failed_error",
        "explanation": "the scan cannot be used" if unusable else "an unexpected error",
        "error": f"{type(error).__name__}: {one_line(error)}",
    }


def _frame(about: Mapping[str, Any], input_sha256: str | None, name: str, started: str) -> dict[str, Any]:
    """The fields about input, model and settings; the others are empty."""
    return {
        **EMPTY,
        "record_version": RECORD_VERSION,
        "time_start": started,
        "time_end": now(),
        "case_id": pseudonym(input_sha256 or sha256_of(name)),
        "input_sha256": input_sha256,
        "versions": versions(),
        **about,
    }


def _plain(values: Sequence[float]) -> list[float | None]:
    """Seven digits; None for NaN."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def _dice(source: Segmentation, adapted: Segmentation | None, classes: Sequence[str]) -> dict[str, float | None]:
    """Dice of source and adapted prediction per class; None if neither has it, {} without adapted prediction."""
    if adapted is None:
        return {}
    n, joint = len(classes), np.zeros((len(classes),) * 2, int)
    for a, b in zip(source.labels, adapted.labels, strict=True):  # by plane: scans are large
        joint += np.bincount(a.ravel() * np.int64(n) + b.ravel(), minlength=n * n).reshape(n, n)
    totals = joint.sum(0) + joint.sum(1)
    same = zip(classes[1:], 2 * joint.diagonal()[1:], totals[1:], strict=True)
    return {name: round(float(both / total), 6) if total else None for name, both, total in same}


def schema() -> dict[str, Any]:
    """The JSON schema of a record (draft 2020-12)."""
    return json.loads(Path(__file__).with_name("record.schema.json").read_text(encoding="utf-8"))


@functools.cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(schema())


def validate_record(record: Mapping[str, Any]) -> None:
    """Check a record against the schema; InputError names the field."""
    error = jsonschema.exceptions.best_match(_validator().iter_errors(dict(record)))
    if error is not None:
        place = ".".join(str(part) for part in error.absolute_path) or "the record"
        raise InputError(f"record of case {record.get('case_id')!r}: {place}: {error.message}") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record of a case; InputError if the file is not one."""
    try:
        value = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable record ({error}); delete its folder and run again") from error
    if not isinstance(value, dict) or "record_version" not in value:
        raise InputError(f"{path}: not a record of samda adapt; delete its folder and run again")
    try:
        validate_record(value)
    except InputError as error:
        raise InputError(f"{path}: {error}; delete its folder and run again") from error
    return value


def write_lines(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per record."""
    write_text(path, "".join(canonical_json(record) + "\n" for record in records))
