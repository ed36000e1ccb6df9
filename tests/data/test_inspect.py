# SPDX-License-Identifier: Apache-2.0
"""Every kind of problem, many at once, each found with its case."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.folders import Problem
from samda.data.inspect import check_data
from samda.data.suggest import check_and_suggest
from samda.task import Task

SHAPE = (12, 14, 6)
AFFINE = np.diag([-20.0, 18.0, 5.0, 1.0])


def volumes(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A CT with air around a body, and its label: 40 voxels of id 1, 24 of id 2."""
    image = np.full(SHAPE, -1000, np.int16)
    image[2:-2, 2:-2] = 40 + np.random.default_rng(seed).integers(-9, 9, (8, 10, 6))
    label = np.zeros(SHAPE, np.uint8)
    label[3:5, 3:8, 1:5] = 1
    label[6:8, 3:6, 1:5] = 2
    return image, label


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An nnU-Net folder of four sound cases, a to d."""
    for seed, name in enumerate("abcd"):
        image, label = volumes(seed)
        save(tmp_path / f"imagesTr/{name}_0000.nii.gz", image)
        save(tmp_path / f"labelsTr/{name}.nii.gz", label)
    labels = {"background": 0, "liver": 1, "spleen": 2}
    content = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def problems(path: Path, task: Task | None = None) -> list[Problem]:
    found = check_data(path, task).sorted_problems()
    assert all("\n" not in problem.text for problem in found)
    return found


def test_a_sound_data_set_is_described(place: Path) -> None:
    report = check_data(place)
    assert report.problems == []
    assert report.label_table() == [
        {"id": 0, "name": "background", "voxels": 4 * (12 * 14 * 6 - 64), "cases": 4},
        {"id": 1, "name": "liver", "voxels": 160, "cases": 4},
        {"id": 2, "name": "spleen", "voxels": 96, "cases": 4},
    ]
    facts = report.cases[0]
    image, label = volumes(0)
    assert (facts.id, facts.section, facts.shape, facts.orientation) == ("a", "training", SHAPE, "LAS")
    assert facts.spacing_mm == (20.0, 18.0, 5.0) and facts.channels == 1
    assert (facts.smallest, facts.largest) == (-1000, image.max())
    assert facts.quantiles[0] == pytest.approx(np.quantile(image, (0.01, 0.25, 0.5, 0.75, 0.99)))
    assert facts.extent_mm == (8 * 20, 10 * 18, 6 * 5)  # the body without its air
    for k in (1, 2):
        assert sorted(facts.foreground[facts.foreground_ids == k, 0]) == sorted(image[label == k])
    values = json.loads(json.dumps(report.to_dict()))
    assert values["sections"] == {"training": 4, "validation": 0, "test": 0} and values["layout"] == "nnunet"


def change(place: Path, what: str, name: str = "b") -> None:
    """Spoil a case."""
    image_path, label_path = place / f"imagesTr/{name}_0000.nii.gz", place / f"labelsTr/{name}.nii.gz"
    image, label = volumes(1)
    moved = AFFINE.copy()
    moved[0, 3] = 3.0
    with_nan = image.astype(np.float32)
    with_nan[5, 5, 3] = np.nan
    half = label.astype(np.float32)
    half[3, 3, 1] = 0.5
    odd = label.copy()
    odd[8, 8, 2:4] = 7
    changes: dict[str, Any] = {
        "truncated": lambda: image_path.write_bytes(image_path.read_bytes()[:200]),
        "label truncated": lambda: label_path.write_bytes(b"x"),
        "image gone": lambda: image_path.unlink(),
        "label gone": lambda: label_path.unlink(),
        "label cut": lambda: save(label_path, label[1:]),
        "label moved": lambda: save(label_path, label, moved),
        "unknown id": lambda: save(label_path, odd),
        "fractions": lambda: save(label_path, half),
        "label NaN": lambda: save(label_path, np.where(half == 0.5, np.nan, half)),
        "an image as label": lambda: save(label_path, np.arange(label.size, dtype=np.int16).reshape(SHAPE)),
        "empty label": lambda: save(label_path, 0 * label),
        "NaN": lambda: save(image_path, with_nan),
        "constant": lambda: save(image_path, 0 * image + 3),
        "4D": lambda: save(image_path, np.stack([image] * 3, axis=-1)),
        "meters": lambda: save(image_path, image, AFFINE / 1000),
        "micrometers": lambda: save(image_path, image, AFFINE * 1000),
        "no HU": lambda: save(image_path, image + 1000),
        "beyond the window": lambda: save(image_path, image + 5000),
    }
    changes[what]()


@pytest.mark.parametrize(
    ("what", "kind", "stops", "words"),
    [
        ("truncated", "unreadable", True, "b_0000.nii.gz cannot be read as a scan"),
        ("label truncated", "unreadable", True, "labelsTr/b.nii.gz cannot be read as a scan"),
        ("image gone", "no image", False, "labelsTr/b.nii.gz matches no file in imagesTr"),
        ("label gone", "missing", True, "there is no file"),
        ("label cut", "grid", True, "has 11 x 14 x 6 voxels but its image 12 x 14 x 6"),
        ("label moved", "grid", True, "3.00 mm from its image"),
        ("unknown id", "label ids", False, "that the data set does not name: 7 (2 voxels); they become background"),
        ("fractions", "unreadable", True, "contains 1 fractions, not class ids"),
        ("label NaN", "unreadable", True, "contains 1 NaN or infinite values, not class ids"),
        ("an image as label", "unreadable", True, "contains 1008 different values from 0 to 1007; give a label map"),
        ("empty label", "empty label", False, "contains only background"),
        ("NaN", "NaN", True, "contains 1 NaN or infinite values; replace them"),
        ("constant", "constant", True, "is constant (3 everywhere); check the file"),
        ("4D", "channels", True, "has 3 channels, 3 other cases 1; leave it out"),
        ("meters", "spacing", True, "voxels of 0.02 x 0.018 x 0.005 mm and a longest side of 0.252 mm"),
        ("micrometers", "spacing", True, "convert it to mm"),
    ],
)
def test_each_problem_is_one_line_with_its_case(place: Path, what: str, kind: str, stops: bool, words: str) -> None:
    change(place, what)
    found = problems(place)
    match = [p for p in found if p.kind == kind and words in p.text]
    assert len(match) == 1, found
    assert match[0].stops is stops
    assert match[0].case == ("" if kind == "no image" else "b")
    others = [p for p in found if p is not match[0]]
    assert all(p.kind == "grid" and p.case == "b" for p in others), others  # a moved image has left its label


def test_all_cases_are_looked_at_and_what_stops_comes_first(place: Path) -> None:
    change(place, "empty label", "a")
    change(place, "truncated", "b")
    change(place, "unknown id", "c")
    change(place, "NaN", "d")
    assert [(p.case, p.kind) for p in problems(place)] == [
        ("b", "unreadable"),
        ("d", "NaN"),
        ("a", "empty label"),
        ("c", "label ids"),
    ]


def test_a_task_says_what_counts(place: Path) -> None:
    change(place, "unknown id")
    task = Task(classes=("background", "liver"), labels={"liver": (1,)})
    assert problems(place, task) == []  # other ids become background
    named = problems(place, Task(classes=("background", "liver", "spleen")))  # the ids are those of the data set
    assert [(p.kind, p.case, p.stops) for p in named] == [("label ids", "b", True)]
    assert [p.kind for p in problems(place, Task(classes=("background", "liver"), labels={"liver": (3,)}))] == [
        "label ids",  # the data set gives liver another id
        "no foreground",
    ]
    two = Task(classes=("background", "liver"), labels={"liver": (1,)}, in_channels=2)
    assert [p.case for p in problems(place, two)] == ["a", "b", "c", "d"]
    change(place, "beyond the window", "c")
    change(place, "no HU", "d")
    found = problems(place, task)
    assert [(p.case, p.kind, p.stops) for p in found] == [("c", "intensity", True), ("d", "intensity", False)]
    assert "which the window -160 to 240 HU" in found[0].text


@pytest.mark.parametrize("spacing", [0.002, 1500.0])
def test_pixels_of_another_unit(place: Path, spacing: float) -> None:
    found = problems(place, Task(classes=("background", "liver"), labels={"liver": (1,)}, spacing=spacing))
    assert [(p.kind, p.case, p.stops) for p in found] == [("spacing", name, True) for name in "abcd"]
    words = f"a_0000.nii.gz: pixels of {spacing:g} mm (spacing of the task) do not fit voxels of 18 mm; check that both"
    assert words in found[0].text


def test_classes_that_nothing_shows(place: Path) -> None:
    content = json.loads((place / "dataset.json").read_text("utf-8"))
    content["labels"] |= {"tumor": 3, "both": [1, 2]}
    (place / "dataset.json").write_text(json.dumps(content))
    found = problems(place)
    assert [(p.kind, p.stops) for p in found] == [("label ids", False), ("absent class", False)]
    assert "1 (liver and both), 2 (spleen and both)" in found[0].text
    assert "no label contains tumor" in found[1].text
    for name in "abcd":
        change(place, "empty label", name)
    assert "no label contains any class" in problems(place)[0].text


def listed(place: Path, **sections: list[dict[str, Any]]) -> Path:
    """A datalist of the fixture's files; entries name the case under "of"."""
    for entries in sections.values():
        for entry in entries:
            name = entry.pop("of")
            entry |= {"image": f"imagesTr/{name}_0000.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
    path = place / "list.json"
    path.write_text(json.dumps(sections))
    return path


def test_patients_and_files_on_two_sides(place: Path) -> None:
    training = [{"of": "a", "patient": "p", "fold": 0}, {"of": "b", "patient": "p", "fold": 1}, {"of": "c", "id": "x"}]
    path = listed(place, training=training, validation=[{"of": "d", "patient": "p"}], test=[{"of": "c", "id": "y"}])
    found = problems(path)
    assert [(p.kind, p.stops) for p in found] == [("patient", False), ("patient", False), ("same image", False)]
    assert "patient 'p' is in 2 sections (a_0000 in training, d_0000 in validation)" in found[0].text
    assert "patient 'p' is in 2 folds (a_0000 in 0, b_0000 in 1), which --fold refuses" in found[1].text
    assert "is the image of 2 cases (x, y)" in found[2].text


def test_ranges_that_leave_the_scan(place: Path) -> None:
    ends = {"a": SHAPE[2], "b": max(SHAPE), "d": SHAPE[2] + 1}
    path = listed(place, training=[{"of": name, "slices": [[0, end]]} for name, end in ends.items()])
    task = Task(classes=("background", "liver", "spleen"), labels={"liver": 1, "spleen": 2}, axis="coronal")
    found = [problem for problem in problems(path, task) if problem.kind == "slices"]
    assert found == [], "14 slices along this axis"
    task = dataclasses.replace(task, axis="axial")
    found = [problem for problem in problems(path, task) if problem.kind == "slices"]
    assert [(p.case, p.stops) for p in found] == [("b_0000", True), ("d_0000", True)]
    assert f"slices 0 to {SHAPE[2] + 1} are not within its {SHAPE[2]} slices" in found[1].text
    report, suggestion = check_and_suggest(path)
    assert suggestion is not None and suggestion.task.axis == "axial"
    assert [p.case for p in report.problems if p.kind == "slices"] == ["b_0000", "d_0000"]


def test_a_patient_may_be_called_0(place: Path) -> None:
    training = [{"of": "a", "patient": 0}, {"of": "b", "patient": 0}, {"of": "c", "patient": 1}, {"of": "d", "id": 0}]
    path = listed(place, training=training, validation=[{"of": "d", "patient": 0, "id": "y"}])
    assert "patient '0' is in 2 sections (a_0000 in training, y in validation)" in problems(path)[0].text


def test_validation_needs_foreground(place: Path) -> None:
    change(place, "empty label", "c")
    found = problems(listed(place, training=[{"of": "a"}], validation=[{"of": "c"}]))
    assert [(p.kind, p.stops) for p in found] == [("no foreground", True), ("empty label", False)]
    assert "no label of the validation cases (c_0000)" in found[0].text
    found = problems(listed(place, training=[{"of": "a"}, {"of": "c"}]))  # seed 0 validates c
    assert [p.kind for p in found] == ["no foreground", "empty label"]


def test_broken_test_cases_do_not_stop_a_training(place: Path) -> None:
    change(place, "NaN", "c")
    found = problems(listed(place, training=[{"of": "a"}, {"of": "b"}], test=[{"of": "c"}]))
    assert [(p.kind, p.case, p.stops) for p in found] == [("NaN", "c_0000", False)]


def test_scans_without_labels_cannot_be_trained_with(place: Path) -> None:
    found = problems(place / "imagesTr")
    assert [(p.kind, p.stops) for p in found] == [("no label", True)]
    assert "(4 without label)" in found[0].text


def test_single_slices_and_lost_geometry(place: Path) -> None:
    image, label = volumes()
    save(place / "imagesTr/e_0000.nii.gz", image[:, :, 3:4])
    save(place / "labelsTr/e.nii.gz", label[:, :, 3:4])
    for name, array in (("imagesTr/f_0000", image), ("labelsTr/f", label)):
        save(place / f"{name}.nii.gz", array, np.diag([-1, -1, 1, 1.0]))
    found = problems(place)
    assert [(p.kind, p.case, p.stops) for p in found] == [("one slice", "e", False), ("spacing", "f", False)]
    assert "voxels of 1 x 1 x 1 mm at the origin" in found[1].text


def test_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("a", (9, 12, 3)), ("b", (9, 12, 3)), ("gray", (9, 12))):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture = sitk.GetImageFromArray(rng.integers(0, 255, shape, dtype=np.uint8), isVector=len(shape) == 3)
        sitk.WriteImage(picture, str(tmp_path / "images" / f"{name}.png"))
        mask = sitk.GetImageFromArray((255 * (np.indices((9, 12))[0] > 4)).astype(np.uint8))
        sitk.WriteImage(mask, str(tmp_path / "masks" / f"{name}{'.jpg' if name == 'b' else '.png'}"))
    report = check_data(tmp_path)
    assert report.data.layout == "masks"
    assert [(p.kind, p.case) for p in report.sorted_problems()] == [("unreadable", "b"), ("channels", "gray")]
    assert "JPEG" in report.sorted_problems()[0].text
    assert "save it in color" in report.sorted_problems()[1].text
    assert report.cases[0].extent_mm == (12, 9, 1) and report.cases[0].picture
    assert report.cases[0].offsets == {255: 0.0}  # the mask spans the width
    mask = np.zeros((9, 12), np.uint8)
    mask[2:4, 7:9] = 255  # columns 7 and 8: their middle lies at 8 of 12
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(tmp_path / "masks" / "a.png"))
    assert abs(check_data(tmp_path).cases[0].offsets[255]) == pytest.approx(8 / 12 - 0.5, abs=1e-4)


def test_masks_of_two_scales_are_no_two_classes(tmp_path: Path) -> None:
    for seed, (name, own) in enumerate((("a", 1), ("b", 255), ("c", 1))):
        image, label = volumes(seed)
        save(tmp_path / f"images/{name}.nii.gz", image)
        save(tmp_path / f"masks/{name}.nii.gz", (label > 0).astype(np.uint8) * np.uint8(own))
    report, suggestion = check_and_suggest(tmp_path)
    assert [(p.kind, p.case) for p in report.stops] == [("label ids", "b")] and suggestion is None
    task = Task(classes=("background", "organ"), labels={"organ": 1})
    (stop,) = check_data(tmp_path, task).stops
    assert (stop.kind, stop.case) == ("label ids", "b") and "mask of 0 and 255" in stop.text


def test_one_label_of_several_images_and_an_image_as_label_stop_a_training(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for file, array in zip((f"{name}.nii.gz", f"{name}_label.nii.gz"), volumes(), strict=True):
            save(tmp_path / file, array)
    entries = [("a", "a_label"), ("b", "a_label"), ("b", "b")]
    training = [{"id": str(k), "image": f"{i}.nii.gz", "label": f"{j}.nii.gz"} for k, (i, j) in enumerate(entries)]
    (tmp_path / "data.json").write_text(json.dumps({"training": training}))
    found = {problem.kind: problem.text for problem in check_data(tmp_path / "data.json").stops}
    assert "a_label.nii.gz is the label of 2 cases (0, 1) of other images" in found["same label"]
    assert "b.nii.gz is image and label of one case" in found["same file"]


def test_segments_with_other_names_for_an_id_stop_a_training(tmp_path: Path) -> None:
    for name, segments in (("a", ("liver", "spleen")), ("b", ("spleen", "liver"))):
        image = sitk.GetImageFromArray(np.arange(3, dtype=np.uint8).repeat(9).reshape(3, 3, 3))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nrrd"))
        for k, segment in enumerate(segments):
            image.SetMetaData(f"Segment{k}_Name", segment)
            image.SetMetaData(f"Segment{k}_LabelValue", str(k + 1))
        sitk.WriteImage(image, str(tmp_path / f"{name}.seg.nrrd"))
    training = [{"image": f"{name}.nrrd", "label": f"{name}.seg.nrrd"} for name in "ab"]
    (tmp_path / "data.json").write_text(json.dumps({"training": training[:1]}))
    _, suggestion = check_and_suggest(tmp_path / "data.json")
    assert suggestion is not None and suggestion.task.classes == ("background", "liver", "spleen")
    (tmp_path / "data.json").write_text(json.dumps({"training": training}))
    text = next(p.text for p in check_data(tmp_path / "data.json").stops if p.kind == "label ids")
    assert "b.seg.nrrd names id 1 'spleen'" in text and "a.seg.nrrd 'liver'" in text
