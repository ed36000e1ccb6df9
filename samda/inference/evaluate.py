# SPDX-License-Identifier: Apache-2.0
"""Evaluate label maps against labels, per case and class, in mm and ml; output includes the definitions of scores."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from samda.data.datalists import match_cases
from samda.data.dicom_labels import is_dicom_label
from samda.data.formats import PICTURE_SUFFIXES
from samda.data.labels import MapLabelsd, partial_labels, scoring_map
from samda.data.readers import Scan, read_label, refuse_other_grid, turned, uncropped
from samda.errors import InputError, SamdaError, UsageError, is_disk_full, log_failed, reason_of
from samda.inference.folder import CaseEvaluator
from samda.io import csv_text, plain, text_table, write_json, write_text
from samda.metrics import COUNTED, DEFINITIONS, SCORES, ClassScores, score_case, summarize
from samda.output import open_output
from samda.processes import is_main
from samda.progress import bar
from samda.task import Task

FILES = ("metrics.csv", "metrics.json")
COLUMNS = tuple(field.name for field in dataclasses.fields(ClassScores))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a set of cases.

    Attributes:
        classes: names of the foreground classes.
        cases: case -> scores of the foreground classes.
        failed: case -> reason in one line; excluded from means.
        nsd_tolerance_mm: tolerance of the normalized surface distance.
        unsaved: why the scores could not be written, in one line.
    """

    classes: tuple[str, ...]
    cases: dict[str, list[ClassScores]]
    failed: dict[str, str]
    nsd_tolerance_mm: float
    unsaved: str | None = None

    @property
    def exit_code(self) -> int:
        """0 if every case was scored and the scores were written, else 1."""
        return 1 if self.failed or self.unsaved else 0

    def check(self) -> None:
        """Raise InputError if a case was not scored, or the scores were not written."""
        reasons = [] if self.unsaved is None else [self.unsaved]
        if self.failed:
            total = len(self.failed) + len(self.cases)
            reasons.append(f"{len(self.failed)} of {total} cases could not be scored: {', '.join(self.failed)}")
        if reasons:
            raise InputError("; ".join(reasons))

    def summary(self) -> dict[str, Any]:
        """Means and counts, see :func:`samda.metrics.summarize`."""
        return summarize(self.cases.values(), self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; missing values are None."""
        cases = {
            case: {name: dataclasses.asdict(score) for name, score in zip(self.classes, scores, strict=True)}
            for case, scores in self.cases.items()
        }
        values = {
            "definitions": DEFINITIONS,
            "nsd_tolerance_mm": self.nsd_tolerance_mm,
            "summary": self.summary(),
            "cases": cases,
            "failed": self.failed,
        }
        return plain(values)

    def to_csv(self) -> str:
        """One row per case and class; missing values are empty."""
        rows: list[list[Any]] = [["case", "class", *COLUMNS]]
        for case, scores in self.cases.items():
            for name, score in zip(self.classes, scores, strict=True):
                rows.append([case, name, *plain([getattr(score, column) for column in COLUMNS])])
        return csv_text(rows)

    def save(self, folder: str | Path) -> None:
        """Write `metrics.csv` and `metrics.json` into `folder`."""
        with open_output(folder, FILES) as output:
            write_text(output.path / FILES[0], self.to_csv())
            write_json(output.path / FILES[1], self.to_dict())


def evaluate(
    predictions: str | Path,
    labels: str | Path,
    task: Task,
    output: str | Path | None = None,
    nsd_tolerance_mm: float | None = None,
    section: str | None = None,
    on_case: Callable[[str, str], None] | None = None,
) -> Evaluation:
    """Evaluate predictions against labels; pairs that fail are listed and the others are still evaluated.

    Args:
        predictions: folder of label maps of :func:`samda.predict_folder`, or one file.
        labels: folder of label files, one file, or a data set with labels.
        task: classes, and the ids of the label files.
        output: folder for `metrics.csv` and `metrics.json`; None writes nothing.
        nsd_tolerance_mm: None takes the task's.
        section: "training", "validation" or "test" of a data set; None takes the sections with predictions.
        on_case: called with case and "done" or the reason of the failure.

    Raises:
        UsageError: `output` is not writable, or a tolerance below 0.
        InputError: no predictions, no labels, or no pair.
    """
    tolerance = task.nsd_tolerance if nsd_tolerance_mm is None else nsd_tolerance_mm
    if not 0 <= tolerance < math.inf:  # also refuses NaN
        raise UsageError(f"the NSD tolerance must be at least 0 mm, got {tolerance:g}")
    with contextlib.ExitStack() as stack:
        if output is not None:
            try:
                stack.enter_context(open_output(output, FILES))
            except UsageError as error:
                if not is_disk_full(error):
                    raise
        result = _score_pairs(predictions, labels, task, tolerance, section, on_case)
        if output is not None:
            try:
                result.save(output)
            except (OSError, SamdaError) as error:  # the scores took long; they are shown all the same
                result = dataclasses.replace(result, unsaved=f"the scores were not written: {reason_of(error)}")
    return result


def score_cases(evaluator: CaseEvaluator, **settings: Any) -> Evaluation | None:
    """The last step of the bundle's evaluate.json: :func:`evaluate` with these settings, on the main process, whose
    table is printed; InputError where a case was not predicted or scored.
    """
    if not is_main():
        return None
    result = evaluate(**settings)
    print(format_table(result))
    evaluator.check()
    result.check()
    return result


def _score_pairs(
    predictions: str | Path,
    labels: str | Path,
    task: Task,
    tolerance: float,
    section: str | None,
    on_case: Callable[[str, str], None] | None,
) -> Evaluation:
    pairs, dataset_labels = match_cases(predictions, labels, section)
    mapping = scoring_map([case for _, case in pairs.values()], task, dataset_labels)
    result = Evaluation(task.classes[1:], {}, {}, tolerance)
    progress = bar("scoring", len(pairs), "case")
    for name, (prediction, case) in pairs.items():
        outcome = "done"
        try:
            if prediction is None:
                raise InputError(f"missing prediction for label {case['label']}; predict this case")
            result.cases[name] = score_files(prediction, case["label"], task, tolerance, mapping, case)
        except Exception as error:  # any failure of a pair must not stop the others
            result.failed[name] = outcome = log_failed(name, error)
        if on_case:
            on_case(name, outcome)
        progress.update()
    progress.close()
    return result


def score_files(
    prediction: str | Path,
    label: str | Path,
    task: Task,
    nsd_tolerance_mm: float,
    mapping: MapLabelsd | None = None,
    case: Mapping[str, Any] | None = None,
) -> list[ClassScores]:
    """Evaluate a label map of class indices, or a DICOM SEG or RTSTRUCT, against a label file; see
    :func:`samda.metrics.score_case`.

    `mapping` maps ids of the label file to class indices; None takes that of the task. The entry "unlabeled" of `case`
    names classes that the label lacks.
    """
    own = MapLabelsd("label", task)
    mapping = mapping or MapLabelsd("label", task, None, partial_labels([case or {}], task))
    true = read_label(label, wanted=mapping.map.wanted)
    predicted = read_label(prediction, (true.array.shape, true.affine), own.map.wanted)
    if is_dicom_label(Path(prediction)):  # its segments have names
        predicted = Scan(_classes(predicted, prediction, own), predicted.affine)
    predicted = turned(predicted, true.affine)
    pictures = any(str(path).lower().endswith(PICTURE_SUFFIXES) for path in (prediction, label))
    affine = true.affine if pictures else predicted.affine  # 2-D images have no position
    true = uncropped(true, (predicted.array.shape, affine), label)
    refuse_other_grid(predicted.array.shape, affine, (true.array.shape, true.affine), (prediction, label))
    classes = _classes(true, label, mapping, case)
    unlabeled = mapping.partial.lacking(case or {}) if mapping.partial else ()
    spacing_mm = np.linalg.norm(true.affine[:3, :3], axis=0)
    return score_case(predicted.array, classes, spacing_mm, task.num_classes, nsd_tolerance_mm, unlabeled)


def _classes(scan: Scan, path: str | Path, mapping: MapLabelsd, case: Mapping[str, Any] | None = None) -> np.ndarray:
    """The class indices of ids."""
    ids = MetaTensor(torch.from_numpy(np.ascontiguousarray(scan.array)), meta={"filename_or_obj": str(path)})
    return mapping({**(case or {}), "label": ids})["label"].as_tensor().numpy()


# -------------------------------------------------------------------------------------------------------------- output


def format_table(evaluation: Evaluation) -> str:
    """The summary as text: definitions, then one line per class with means and numbers of cases."""
    rules = [f"{key}: {DEFINITIONS[key]}" for key in (*SCORES, *COUNTED, "mean", "pooled_dice")]
    counts = f"cases: {len(evaluation.cases)} scored, {len(evaluation.failed)} failed"
    header = [counts, *rules, f"NSD tolerance: {evaluation.nsd_tolerance_mm:g} mm"]
    summary = evaluation.summary()
    rows = [["class", *(f"{name} (n)" for name in SCORES), "pooled_dice", *COUNTED]]
    for name, entry in [*summary["classes"].items(), ("all", summary["all"])]:
        means = [f"{_number(entry[key]['mean'], key)} ({entry[key]['n']})" for key in SCORES]
        rows.append([name, *means, _number(entry["pooled_dice"], "dice"), *(str(entry[what]) for what in COUNTED)])
    failed = [f"not scored: {case}: {reason}" for case, reason in evaluation.failed.items()]
    return "\n".join([*(f"# {line}" for line in header), *text_table(rows), *failed])


def _number(value: float, key: str) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}" if key == "hd95_mm" else f"{value:.3f}"
