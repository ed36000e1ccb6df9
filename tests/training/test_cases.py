# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_scans import TASK

from samda.data.datalists import DataList, read_datalist
from samda.errors import InputError, UsageError
from samda.io import packaged
from samda.task import Task
from samda.training import build_task, label_gaps, labeled_cases, training_cases


def test_a_task_comes_as_object_values_or_file(tmp_path: Path) -> None:
    task = Task.from_dict(TASK)
    (tmp_path / "task.yaml").write_text(json.dumps({"task": TASK}))
    assert build_task("abdomen_ct") == Task.from_file(packaged("configs", "tasks", "abdomen_ct.yaml"))
    with pytest.raises(UsageError, match=r"^there is no task file 'abdomen_tc'; did you mean 'abdomen_ct'\?$"):
        build_task("abdomen_tc")
    assert build_task(task) == build_task(TASK) == build_task(tmp_path / "task.yaml") == task


def test_size_and_spacing_can_be_given_apart() -> None:
    task = build_task(TASK, image_size=128, spacing=2.5)
    assert (task.image_size, task.spacing, task.classes) == (128, 2.5, tuple(TASK["classes"]))
    with pytest.raises(UsageError, match="image_size must be a multiple of 16 from 16 to 4096, got 100"):
        build_task(TASK, image_size=100)


def test_without_a_task_the_data_set_names_the_classes(caplog: pytest.LogCaptureFixture) -> None:
    task = build_task(None, {"background": (0,), "spleen": (7,), "liver": (2, 3)})
    assert task.classes == ("background", "liver", "spleen")
    assert "no task given: 3 classes of the data set, modality CT" in caplog.text
    with pytest.raises(UsageError, match="this data set does not name its classes; give a task file"):
        build_task(None)


def test_the_data_sets_own_validation_cases_are_taken_unless_a_fold_is_asked_for(datalist: Path) -> None:
    data, task = read_datalist(datalist), Task.from_dict(TASK)
    own = training_cases(data, task)
    assert [case["id"] for case in own.training + own.validation] == ["a", "b", "c"]
    folded = training_cases(data, task, fold=0, fraction=0.5)
    assert sorted(case["id"] for case in folded.training + folded.validation) == ["a", "b"]
    assert len(folded.validation) == 1


def test_only_patients_that_samda_chose_join(datalist: Path, task: Task) -> None:
    data = read_datalist(datalist)
    assert training_cases(data, task, join=True).late == []  # the data set names its validation cases
    assert training_cases(data, task, fold=0, join=True).late == []
    data = dataclasses.replace(data, cases=data.cases | {"validation": []})
    split = training_cases(data, task, join=True)
    assert split.late == split.validation != []
    assert training_cases(data, task).late == []


def test_labels_of_held_out_slices_are_open_along_other_axes(datalist: Path, task: Task) -> None:
    cases = read_datalist(datalist)
    part = [case | {"slices": [(0, 4)]} for case in cases.cases["training"]]
    every = dataclasses.replace(task, axes="all")
    assert label_gaps(cases, task, training=part) is None
    config = json.loads(packaged("bundles", "sam_segmentation", "configs", "train.json").read_text("utf-8"))
    assert config["label_gaps"]["training"] == "$[*@cases.training, *@cases.late]", "those that train later on, too"
    assert label_gaps(cases, every, training=cases.cases["training"]) is None
    gaps = label_gaps(cases, every, training=part)
    assert gaps is not None and gaps.possible()[254].all() and gaps.sets == gaps.everywhere == ()


def test_a_data_set_without_labels_is_one_line() -> None:
    data = DataList({"training": [], "validation": [], "test": [{"id": "x", "image": "x.nii"}]}, None, "scans")
    with pytest.raises(InputError, match=r"no labeled training case \(1 without a label\)"):
        training_cases(data, Task())
    with pytest.raises(InputError, match=r"no label in section 'test'; labels per section: training \(0\)"):
        labeled_cases(data, "test")
    with pytest.raises(UsageError, match="section 'tests' is unknown; did you mean 'test'"):
        labeled_cases(data, "tests")


def test_labeled_cases_leave_out_those_without_a_label() -> None:
    cases: list[dict[str, Any]] = [{"id": "a", "image": "a", "label": "l"}, {"id": "b", "image": "b"}]
    data = DataList({"training": [], "validation": cases, "test": []}, None, "datalist")
    assert [case["id"] for case in labeled_cases(data, "validation")] == ["a"]
