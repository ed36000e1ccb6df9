# SPDX-License-Identifier: Apache-2.0
"""Split cases into training and validation: by patient, or by blocks of slices for a single patient."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import nibabel as nib
import numpy as np

from samda.data.datalists import Case
from samda.data.readers import read_geometry
from samda.errors import UsageError
from samda.task import Task

MOST_VALIDATION = 8  # patients


@dataclasses.dataclass(frozen=True)
class Split:
    """Two lists of cases and a description of the split.

    A case that is used in part has "slices": a list of (first, end) ranges along the slice axis of the task, RAS.
    """

    training: list[Case]
    validation: list[Case]
    note: str
    late: list[Case] = dataclasses.field(default_factory=list)  # of the validation cases, those that train in the end

    @property
    def apart(self) -> bool:
        """Is no patient on both sides? Otherwise the validation says too little to choose by."""
        return not {patient_of(case) for case in self.training} & {patient_of(case) for case in self.validation}


def split(cases: Sequence[Case], task: Task, fraction: float = 0.2, fold: int | None = None, seed: int = 0) -> Split:
    """Split the labeled cases of one section into training and validation.

    * `fold` and cases that state a fold: those of this fold validate (MONAI's convention).
    * `fold` and cases that state none: patients, shuffled by `seed`, are dealt into round(1 / fraction) folds.
    * No fold: patients are shuffled by `seed`, and `fraction` of them validate, at least one and at most eight: that
      tells good parameters from bad, and the others teach more.
    * One patient: each scan is cut into 2 * round(1 / fraction) blocks of slices, two of which, half a scan apart,
      validate (`fold` or `seed` says which). Slices at the edge of a block resemble their neighbors, so the validation
      is kinder than one on another patient; the note says so.

    The patient of a case is its entry "patient", else its "id"; no patient is in both sets.
    """
    if not cases:
        raise UsageError("there are no labeled cases to split; list some under training")
    if not 0 < fraction <= 0.5:
        raise UsageError(f"the validation fraction must be above 0 and at most 0.5, got {fraction}")
    patients = list(dict.fromkeys(patient_of(case) for case in cases))
    stated = {case["fold"] for case in cases if "fold" in case}
    if fold is not None and stated:
        return _by_stated_fold(cases, fold, stated)
    folds = round(1 / fraction)
    if fold is not None and not 0 <= fold < folds:
        raise UsageError(f"fold {fold} does not exist: a fraction of {fraction} makes folds 0 to {folds - 1}")
    if len(patients) == 1:
        return _by_slices(cases, task, folds, random.Random(seed).randrange(folds) if fold is None else fold)
    random.Random(seed).shuffle(patients)
    if fold is None:
        chosen = patients[: min(max(1, round(fraction * len(patients))), MOST_VALIDATION)]
    else:
        folds = min(folds, len(patients))
        if fold >= folds:
            raise UsageError(f"fold {fold} does not exist: {len(patients)} patients make folds 0 to {folds - 1}")
        chosen = patients[fold::folds]
    note = f"by patient: {len(chosen)} of {len(patients)} patients validate"
    return _by_patient(cases, set(chosen), note)


def patient_of(case: Case) -> str:
    """The entry "patient" of a case, else its id."""
    patient = case.get("patient")
    return str(case["id"] if patient is None or patient == "" else patient)


def _by_patient(cases: Sequence[Case], chosen: set[str], note: str) -> Split:
    validation = [case for case in cases if patient_of(case) in chosen]
    return Split([case for case in cases if patient_of(case) not in chosen], validation, note)


def _by_stated_fold(cases: Sequence[Case], fold: int, stated: set[int]) -> Split:
    if fold not in stated:
        raise UsageError(f"no case has fold {fold}; choose from {', '.join(map(str, sorted(stated)))}")
    chosen = {patient_of(case) for case in cases if case.get("fold") == fold}
    torn = [case["id"] for case in cases if patient_of(case) in chosen and case.get("fold") != fold]
    if torn:
        raise UsageError(f"case {torn[0]!r} is in another fold than the same patient's other scans; correct the folds")
    result = _by_patient(cases, chosen, f"by the datalist's fold {fold}: {len(chosen)} patients validate")
    if not result.training:
        raise UsageError(f"all cases are in fold {fold}, so none is left to train on; choose another fold")
    return result


def _by_slices(cases: Sequence[Case], task: Task, folds: int, fold: int) -> Split:
    training, validation = [], []
    for case in cases:
        ranges = case.get("slices") or [(0, _slice_count(case["image"], task))]
        own = [i for first, end in ranges for i in range(first, end)]
        edges = [round(len(own) * i / (2 * folds)) for i in range(2 * folds + 1)]
        held: list[int] = []
        rest: list[int] = []
        for number, (first, end) in enumerate(itertools.pairwise(edges)):
            (held if number % folds == fold else rest).extend(own[first:end])
        training.append(case | {"slices": _ranges(rest)})
        validation.append(case | {"slices": _ranges(held)})
    number = sum(end - first for case in validation for first, end in case["slices"])
    if number == 0:
        few = "1 slice leaves" if len(own) == 1 else f"{len(own)} slices leave"
        raise UsageError(f"{few} none for validation; add a patient")
    note = (
        f"one patient only: {number} {task.axis} slices in contiguous blocks validate, the rest of the scan trains; "
        "expect lower scores on other patients"
    )
    return Split(training, validation, note)


def _slice_count(path: str, task: Task) -> int:
    """Number of slices along the axis of the task in RAS, from the header."""
    shape, affine = read_geometry(path)
    axes = nib.io_orientation(affine)[:, 0]
    return shape[int(np.flatnonzero(axes == task.slice_axis)[0])]


def _ranges(slices: Sequence[int]) -> list[tuple[int, int]]:
    """Slices as ranges (first, end) of successive ones."""
    ranges: list[tuple[int, int]] = []
    for i in slices:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return ranges
