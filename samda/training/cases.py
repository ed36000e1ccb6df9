# SPDX-License-Identifier: Apache-2.0
"""What a training decides before it reads a scan: the task, and which cases train and which validate."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.datalists import Case, DataList, read_datalist
from samda.data.labels import IGNORE, PartialLabels, partial_labels, relabeled
from samda.data.splits import Split, split
from samda.data.suggest import check_and_suggest
from samda.errors import InputError, UsageError, nearest
from samda.io import shipped_tasks
from samda.task import Task
from samda.training.parent import Parent

logger = logging.getLogger(__name__)


def build_task(
    task: Task | Mapping[str, Any] | str | Path | None,
    labels: Mapping[str, tuple[int, ...]] | Callable[[], Mapping[str, tuple[int, ...]] | None] | None = None,
    image_size: int | None = None,
    spacing: float | None = None,
    dataset: str | Path | None = None,
    parent: Parent | None = None,
) -> Task:
    """The task of a training; `image_size` (pixels) and `spacing` (mm per pixel) replace those of the task.

    Args:
        task: a Task, its values, a YAML or JSON file, or the name of a packaged task. None takes and logs what
            :func:`samda.data.suggest.suggest_task` suggests for the scans of `dataset`.
        labels: class name -> ids as the data set states them, or a function that reads them; used where there is
            neither a task nor a `dataset`, and with a `parent`.
        parent: the model that a training starts from: its task is the default, and that of keys which `task` lacks; but
            its ids are those of another data set, see :func:`samda.data.labels.relabeled`.
    """
    like = None if parent is None else parent.task
    if task is None and like is not None:
        task = like
    elif task is None and dataset is not None:
        task = _task_for(dataset)
    elif task is None:
        task = _task_of(labels() if callable(labels) else labels)
    elif isinstance(task, str | Path):
        ours = shipped_tasks()
        path = ours.get(str(task), Path(task))
        if not path.is_file():
            remedy = "give a YAML or JSON file with the classes" if path.suffix else nearest(str(task), ours)
            raise UsageError(f"there is no task file {str(task)!r}; {remedy}")
        task = Task.from_file(path, like)
    elif not isinstance(task, Task):
        task = Task.from_dict(task, like)
    if like is not None and task.labels is not None and task.labels == like.labels:
        task = relabeled(task, labels() if callable(labels) else labels)
    changes: dict[str, Any] = {"image_size": image_size, "spacing": spacing}
    return dataclasses.replace(task, **{key: value for key, value in changes.items() if value is not None})


def dataset_labels(path: str | Path) -> Mapping[str, tuple[int, ...]] | None:
    """Class name -> ids as the data set at `path` states them; None where it names no classes."""
    return read_datalist(path).labels


def _task_of(labels: Mapping[str, tuple[int, ...]] | None) -> Task:
    if not labels:
        raise UsageError(
            "this data set does not name its classes; give a task file (samda check DATASET -o FILE writes one)"
        )
    names = sorted((name for name in labels if 0 not in labels[name] and name != IGNORE), key=lambda name: labels[name])
    task = Task(classes=("background", *names))
    logger.warning("no task given: %d classes of the data set, modality %s", task.num_classes, task.modality)
    return task


def _task_for(dataset: str | Path) -> Task:
    logger.info("no task given: looking at all cases for one (samda check writes it to a file)")
    report, suggestion = check_and_suggest(dataset)
    if suggestion is None:
        raise InputError(report.sorted_problems()[0].line())
    for line in suggestion.to_yaml().splitlines():
        logger.info("  %s", line)
    return suggestion.task


def training_cases(
    datalist: DataList,
    task: Task,
    fold: int | None = None,
    fraction: float = 0.2,
    seed: int = 0,
    join: bool = False,
) -> Split:
    """Which cases train and which validate: the data set's own sections, or with `fold` or without validation cases
    a split of its training cases by :func:`samda.data.splits.split`. With `join` the patients that samda chose for
    validation will train in the end (`late`), see :class:`samda.training.JoinValidation`.
    """
    training, validation = datalist.cases["training"], datalist.cases["validation"]
    if not training:
        number = len(datalist.cases["test"])
        raise InputError(
            f"the data set has no labeled training case ({number} without a label); list some under training"
        )
    if validation and fold is None:
        result = Split(training, validation, f"by the data set: {len(validation)} cases validate")
    else:
        result = split(training, task, fraction, fold, seed)
        if join and fold is None and result.apart:
            note = f"{result.note}, in the end they train, too"
            result = dataclasses.replace(result, late=result.validation, note=note)
    logger.info("validation %s", result.note)
    if not result.apart:
        logger.info("the patient trains and validates: no parameters are chosen by that, the last average is kept")
    return result


def label_gaps(
    datalist: DataList, task: Task, parent: Parent | None = None, training: Sequence[Case] = ()
) -> PartialLabels | None:
    """What the labels of the data set leave open, None if nothing; see :func:`samda.data.labels.partial_labels`.

    Where scans train but for some of their slices, these are open in slices along other axes, see
    :class:`samda.training.SliceDataset`.
    """
    labeled = [case for cases in datalist.cases.values() for case in cases if "label" in case]
    gaps = partial_labels(labeled, task, datalist.labels, parent.task.classes if parent else ())
    if gaps is not None and gaps.everywhere:
        logger.info("no case labels %s: unknown there, not background", ", ".join(gaps.everywhere))
    if gaps is None and task.axes == "all" and any(case.get("slices") for case in training):
        return PartialLabels(task.classes)
    return gaps


def labeled_cases(datalist: DataList, section: str) -> list[Case]:
    """The cases of a section that have labels; a section without any is refused with the counts of the others."""
    if section not in datalist.cases:
        raise UsageError(f"section {section!r} is unknown; {nearest(str(section), datalist.cases)}")
    counts = {name: sum("label" in case for case in cases) for name, cases in datalist.cases.items()}
    if not counts[section]:
        having = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise InputError(f"the data set has no label in section {section!r}; labels per section: {having}")
    return [case for case in datalist.cases[section] if "label" in case]
