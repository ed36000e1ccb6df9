# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import pytest

from samda.errors import UsageError
from samda.io import packaged
from samda.task import Task


def test_values_survive_json():
    task = Task(classes=["background", "liver"], labels={"liver": [5, 7]}, window=[-100, 300], modality="CT")
    assert task.labels == {"liver": (5, 7)}
    assert task.window == (-100.0, 300.0)
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clases": ["background", "a"]}, "unknown key 'clases'; did you mean 'classes'"),
        ({"classes": ["background"]}, "got ['background']"),
        ({"classes": ["background", "a", "a"]}, "all different"),
        ({"classes": ["background", "liver"], "labels": {"livr": 1}}, "did you mean 'liver'"),
        ({"classes": ["background", "a", "b"], "labels": {"a": 1}}, "no ids for b"),
        ({"classes": ["background", "a", "b"], "labels": {"a": 1, "b": [2, 1]}}, "id 1 to both 'a' and 'b'"),
        ({"classes": "liver"}, "classes must be a list of names, background first; got 'liver'"),
        ({"classes": None}, "classes must be a list of names, background first; got None"),
        ({"classes": ["liver", "tumor"]}, "the first class must be 'background', got 'liver'"),
        ({"labels": {"foreground": "1"}}, "labels of 'foreground' must be a number, got '1'"),
        ({"labels": {"foreground": 1.5}}, "labels of 'foreground' must be a whole number, got 1.5"),
        ({"labels": {"foreground": [True]}}, "labels of 'foreground' must be a number, got True"),
        ({"labels": [1]}, "labels must be class names with their ids, got [1]"),
        ({"axis": "axail"}, "got 'axail'"),
        ({"modality": "PET"}, "CT, MR, image"),
        ({"axes": "three"}, "axes must be one of one, all, got 'three'"),
        ({"axes": "all", "modality": "image"}, "a picture has one axis; set axes to one"),
        ({"image_size": 250}, "multiple of 16 from 16 to 4096, got 250"),
        ({"axis": 3}, "axis must be one of axial, coronal, sagittal, got 3"),
        ({"labels": {3: 1}}, "labels names the unknown class '3'; choose from background, foreground"),
        ({"image_size": [64]}, "image_size must be a number, got [64]"),
        ({"spacing": {"a": 1}}, "spacing must be a number, got {'a': 1}"),
        ({"image_size": "256"}, "image_size must be a number, got '256'"),
        ({"spacing": 0}, "spacing must be positive (mm), got 0.0"),
        ({"spacing": math.nan}, "spacing must be positive (mm), got nan"),
        ({"spacing": math.inf}, "spacing must be positive (mm), got inf"),
        ({"spacing": None}, "spacing must be a number, got None"),
        ({"image_size": math.inf}, "image_size must be a whole number, got inf"),
        ({"nsd_tolerance": -1}, "nsd_tolerance must be positive"),
        ({"nsd_tolerance": math.nan}, "nsd_tolerance must be positive"),
        ({"window": [-math.inf, 240]}, "low < high"),
        ({"in_channels": 4}, "1, 2, 3, got 4"),
        ({"window": [240, -160]}, "low < high"),
        ({"window": [1, 2, 3]}, "low, high"),
        ({"window": 5}, "window must be (low, high), got 5"),
        ({"window": ["a", 5]}, "window must be (low, high), got ['a', 5]"),
        ({"percentiles": [1, 101]}, "got (1.0, 101.0)"),
        ({"classes": ["background", "a\nb"]}, "without control characters, got 'a\\nb'"),
        ({"classes": ["background", "a\ud800"]}, "without control characters, got 'a\\ud800'"),
        ({"name": "\x1b[2J"}, "without control characters, got '\\x1b[2J'"),
        ({"name": ["a"]}, "got ['a']"),
        ({"spacing": 10**400}, "spacing must be a number that fits a float, got 1000"),
        ({"window": [0, 10**400]}, "window must be (low, high), got [0, 1000"),
        ({"labels": {"foreground": 10**400}}, "labels of 'foreground' must be a number that fits"),
        ({"axis": ["axial"]}, "got ['axial']"),
        ({"modality": {}}, "got {}"),
    ],
)
def test_wrong_values_are_refused_in_one_line(values, message):
    with pytest.raises(UsageError) as caught:
        Task.from_dict(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_classes_may_be_numbers():
    task = Task.from_dict({"classes": ["background", 3], "labels": {3: 1}, "keep_largest": [3]})
    assert task == Task(classes=("background", "3"), labels={"3": (1,)}, keep_largest=("3",))


def test_file_with_and_without_the_key_task(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x\nspacing: 2e0\n")
    (tmp_path / "b.json").write_text('{"task": {"name": "x", "spacing": 2.0}}')
    assert Task.from_file(tmp_path / "a.yaml") == Task.from_file(tmp_path / "b.json") == Task(name="x", spacing=2.0)


ALIASES = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(9))
BOMBS = [
    ("[" * 5000, "nested too deeply"),
    ("classes: " + "{a: " * 3000, "nested too deeply"),
    (ALIASES, "more than 100000 values"),
    ("classes: &a [background, *a]", "contains itself"),
    ("spacing: !!int x", "does not fit its tag"),
    ("spacing: !!timestamp x", "does not fit its tag"),
    ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
]


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b", "mapping"), ("a: [", "a.yaml"), (None, "task file"), *BOMBS]
)
def test_wrong_files_are_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        Task.from_file(tmp_path / "a.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shipped_tasks():
    files = sorted(packaged("configs", "tasks").rglob("*.yaml"))
    assert [file.stem for file in files] == ["abdomen_ct", "abdomen_mr", "chest_ct", "pictures"]
    for file in files:
        assert Task.from_file(file).name == file.stem
        assert f"samda train -d DATASET -o MODEL --task configs/tasks/{file.name}" in file.read_text("utf-8")
        assert file.read_text("utf-8").startswith("#")
    ct, mr = (Task.from_file(packaged("configs", "tasks", f"abdomen_{m}.yaml")) for m in ("ct", "mr"))
    assert ct.classes == mr.classes
    assert ct.labels["aorta"] == (52,)
    assert mr.labels["aorta"] == (23,)
