# SPDX-License-Identifier: Apache-2.0
"""DICOM labels become label maps on the grid of their series, found by their references."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from samda.data.datalists import read_datalist
from samda.data.dicom_labels import is_dicom_label
from samda.data.inspect import check_data
from samda.data.readers import read_label, read_scan
from samda.data.suggest import suggest_task
from samda.data.transforms import build_preprocessing
from samda.errors import InputError
from samda.inference.dicom_out import write_dicom
from samda.inference.evaluate import evaluate
from samda.inference.writer import write_labels
from samda.task import Task, name_id
from tests.inference.test_dicom_out import CLASSES, PLANES, SHAPE, TASK, blobs, series_order, write_series

KINDS = ["dicom-seg", "dicom-seg-labelmap", "rtstruct"]
NAMES = np.array([0, *(name_id(name) for name in CLASSES[1:])])


def labeled(folder: Path, kind: str, plane: str = "axial", place: str = "label.dcm") -> np.ndarray:
    """A series in folder/ct with its label in folder/place; returns its class indices on samda's grid."""
    values = np.random.default_rng(0).integers(-500, 500, SHAPE).astype(np.int16)
    write_series(folder / "ct", plane, values)
    labels = blobs()[:, :, series_order(plane)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dicom(kind, folder / place, labels, TASK, folder / "ct")
    return labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", list(PLANES))
def test_labels_come_back_on_the_grid_of_their_series(tmp_path, kind, plane):
    labels = labeled(tmp_path, kind, plane)
    scan = read_label(tmp_path / "label.dcm", tmp_path / "ct")
    np.testing.assert_array_equal(scan.array, NAMES[labels])
    np.testing.assert_allclose(scan.affine, read_scan(tmp_path / "ct").affine, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["case/seg.dcm", "labels/whatever", "case/ct/0b.dcm"])
def test_labels_are_found_by_their_references(tmp_path, kind, place):
    labels = labeled(tmp_path / "case", kind)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "case" / "label.dcm", tmp_path / place)
    data = read_datalist(tmp_path)
    assert [case["label"] for case in data.cases["training"]] == [str(tmp_path / place)]
    assert data.labels == {name: (name_id(name),) for name in CLASSES[1:4]}
    task = Task(classes=("background", "Kidney Left", "liver"), spacing=2.0, image_size=32, window=(-500, 500))
    ready = build_preprocessing(task, True, data.labels)(data.cases["training"][0])
    counts = np.bincount(ready["label"].as_tensor().numpy().ravel().astype(int))
    assert list(counts[1:]) == [(labels == 2).sum(), (labels == 1).sum()]


def test_everything_in_one_folder(tmp_path):
    """Two series and their labels, of which each refers to its own."""
    maps = {}
    for name, kind in (("a", "dicom-seg"), ("b", "rtstruct")):
        maps[name] = labeled(tmp_path / name, kind)
        (tmp_path / "all").mkdir(exist_ok=True)
        for path in (tmp_path / name).rglob("*.dcm"):
            text = path.read_bytes()
            if name == "b":  # another series, whose UIDs have the same length
                text = text.replace(b"1.2.3", b"1.2.4")
            (tmp_path / "all" / f"{name}_{path.name}").write_bytes(text)
    cases = read_datalist(tmp_path / "all").cases["training"]
    found = {Path(case["image"]).name: Path(case["label"]).name for case in cases}
    assert found == {"1.2.3": "a_label.dcm", "1.2.4": "b_label.dcm"}
    for case in cases:
        np.testing.assert_array_equal(read_label(case["label"], case["image"]).array, NAMES[maps["a"]])
        np.testing.assert_array_equal(read_label(case["label"]).array, NAMES[maps["a"]])


def test_check_and_evaluate_read_them(tmp_path):
    labels = labeled(tmp_path / "data" / "c1", "dicom-seg")
    report = check_data(tmp_path / "data")
    assert not report.stops
    assert {row["name"]: row["voxels"] for row in report.label_table() if row["id"]} == {
        name: int((labels == k).sum()) for k, name in enumerate(CLASSES[1:4], 1)
    }
    suggested = suggest_task(report)
    assert suggested is not None and "labels: {" in suggested.to_yaml() and "liver: liver" in suggested.to_yaml()
    assert Task.from_dict(yaml.safe_load(suggested.to_yaml())) == suggested.task
    series = tmp_path / "data" / "c1" / "ct"
    task = Task(classes=("background", "kidney_left", "liver"), labels={"kidney_left": [7], "liver": ["Liver"]})
    wanted = np.select([labels == 2, labels == 1], [1, 2]).astype(np.uint8)
    write_labels(tmp_path / "out" / "c1.nii.gz", wanted, task.classes, series, read_scan(series).affine)
    result = evaluate(tmp_path / "out", tmp_path / "data", task)
    assert not result.failed and [scores.dice for scores in result.cases["c1"]] == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", ["axial", "tilted", "coronal"])
def test_they_are_scored_as_predictions(tmp_path, kind, plane):
    """The label is a NIfTI with other axes than the series, which need not be there."""
    labels = labeled(tmp_path, kind, plane, "out/c1.dcm")
    image = nib.Nifti1Image(np.where(labels == 3, 2, labels), read_scan(tmp_path / "ct").affine)
    image = nib.as_closest_canonical(image) if kind != "rtstruct" else image.as_reoriented([[0, -1], [1, 1], [2, 1]])
    (tmp_path / "true").mkdir()
    nib.save(image, tmp_path / "true" / "c1.nii.gz")
    shutil.rmtree(tmp_path / "ct")
    task = Task(classes=("background", "liver", "kidney_left", "gadget"))
    result = evaluate(tmp_path / "out", tmp_path / "true", task)
    liver, kidney, gadget = (score.dice for score in result.cases["c1"])
    third = (labels == 3).sum()
    assert (liver, gadget) == (1.0, 0.0)
    assert kidney == pytest.approx(2 * (labels == 2).sum() / (2 * (labels == 2).sum() + third))


def fractional(path: Path, series: Path, values: np.ndarray, kind: str = "FRACTIONAL") -> Path:
    """A SEG of two segments, (slices, rows, columns, 2), by highdicom."""
    images = sorted((pydicom.dcmread(file) for file in series.iterdir()), key=lambda file: file.InstanceNumber)
    algorithm = highdicom.AlgorithmIdentificationSequence("x", codes.DCM.ArtificialIntelligence, "1")
    for image in images:
        image.PatientBirthDate = image.PatientSex = image.AccessionNumber = image.StudyID = ""
        image.StudyDate = image.StudyTime = None
    segments = [
        highdicom.seg.SegmentDescription(k, name, codes.SCT.Organ, codes.SCT.Liver, "AUTOMATIC", algorithm)
        for k, name in enumerate(("liver", "Kidney left"), 1)
    ]
    seg = highdicom.seg.Segmentation(
        images, values, kind, segments, generate_uid(), 1, generate_uid(), 1, "x", "x", "1", "1",
        fractional_type="PROBABILITY",
    )  # fmt: skip
    seg.save_as(path)
    return path


def test_fractions_count_from_one_half(tmp_path):
    series = write_series(tmp_path / "ct")
    values = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0], 2))
    values[2, 3:9, 4:8, 0], values[2, 3:9, 8:10, 0], values[3, 1:4, 1:5, 1] = 0.8, 0.3, 0.6
    found = read_label(fractional(tmp_path / "s.dcm", series, values), series).array
    expected = np.where(values[..., 0] > 0.5, NAMES[1], 0) + np.where(values[..., 1] > 0.5, NAMES[2], 0)
    np.testing.assert_array_equal(found, expected.transpose(2, 1, 0))


def test_overlaps_are_refused_with_their_names(tmp_path):
    series = write_series(tmp_path / "ct", values=np.arange(-900, np.prod(SHAPE) - 900, dtype=np.int16).reshape(SHAPE))
    values = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0], 2), np.uint8)
    values[2, 3:9, 4:8, 0], values[2, 7:12, 4:8, 1] = 1, 1
    path = fractional(tmp_path / "s.dcm", series, values, "BINARY")
    with pytest.raises(InputError, match=r"s\.dcm.*'Kidney left' and 'liver' overlap by 8 voxels in slice 3"):
        read_label(path, series)
    for name, overlapping in (("liver", values[2, ..., 0]), ("kidney left", values[2, ..., 1])):  # the task has one
        task = Task(classes=("background", name), spacing=2.0, image_size=32, window=(-500, 500))
        label = build_preprocessing(task, True)({"image": str(series), "label": str(path)})["label"]
        np.testing.assert_array_equal(label[0].as_tensor()[:, :, 2], np.flip(overlapping.T, (0, 1)))


def test_labels_of_another_series_are_refused(tmp_path):
    labeled(tmp_path / "a", "rtstruct")
    other = write_series(tmp_path / "far" / "away" / "other", SeriesInstanceUID="9.9")
    with pytest.raises(InputError, match=r"label\.dcm refers to another series"):
        read_label(tmp_path / "a" / "label.dcm", other)
    shutil.move(tmp_path / "a" / "label.dcm", tmp_path / "far" / "away" / "label.dcm")
    with pytest.raises(InputError, match=r"label\.dcm.*is not beside it"):
        read_label(tmp_path / "far" / "away" / "label.dcm")


def test_contours_off_the_slices_are_refused(tmp_path):
    labeled(tmp_path, "rtstruct")
    file = pydicom.dcmread(tmp_path / "label.dcm")
    contour = file.ROIContourSequence[0].ContourSequence[0]
    points = np.reshape(contour.ContourData, (-1, 3)).astype(float) + np.array([0, 0, 1])
    contour.ContourData = [f"{value:.3f}" for value in points.ravel()]
    file.save_as(tmp_path / "label.dcm")
    with pytest.raises(InputError, match=r"'liver' lies 1\.00 mm off"):
        read_label(tmp_path / "label.dcm", tmp_path / "ct")


def test_a_label_beside_its_series_does_not_stop_a_prediction(tmp_path):
    labeled(tmp_path, "dicom-seg", place="ct/0b.dcm")
    assert read_scan(tmp_path / "ct").array.shape == SHAPE
    with pytest.raises(InputError, match=r"0b\.dcm is a DICOM segmentation"):
        read_scan(tmp_path / "ct" / "0b.dcm")


@pytest.mark.parametrize("vr", [b"U9", b"UM"])
def test_a_damaged_file_in_place_of_a_label_fails_alone(tmp_path, vr):
    labels = labeled(tmp_path, "dicom-seg")
    content = (tmp_path / "label.dcm").read_bytes()
    place = content.index(b"\x08\x00\x16\x00UI", 200) + 4
    (tmp_path / "bad.dcm").write_bytes(content[:place] + vr + content[place + 2 :])
    assert not is_dicom_label(tmp_path / "bad.dcm")
    (tmp_path / "list.csv").write_text("id,image,label\na,ct,label.dcm\nb,ct,bad.dcm\n")
    report = check_data(tmp_path / "list.csv")
    found = [problem for problem in report.problems if problem.case == "b" and problem.stops]
    assert found and str(tmp_path / "bad.dcm") in found[0].line()
    assert max(len(problem.line()) for problem in report.problems) < 600 + 3 * len(str(tmp_path))
    np.testing.assert_array_equal(read_label(tmp_path / "label.dcm", tmp_path / "ct").array, NAMES[labels])


def test_references_that_cannot_be_read_do_not_stop_other_cases(tmp_path, caplog):
    for name in ("a", "b"):
        labeled(tmp_path / name, "dicom-seg")
    for path in (tmp_path / "b").rglob("*.dcm"):  # another series, whose UIDs have the same length
        path.write_bytes(path.read_bytes().replace(b"1.2.3", b"1.2.4"))
    path = tmp_path / "b" / "label.dcm"
    content = path.read_bytes()
    place = content.index(b"\x08\x00\x15\x11SQ")  # ReferencedSeriesSequence
    uid = content.index(b"\x20\x00\x0e\x00UI", place) + 4
    path.write_bytes(content[:uid] + b"UM" + content[uid + 2 :])
    assert [case["id"] for case in read_datalist(tmp_path, report=lambda problem: None).cases["training"]] == ["a"]
    assert str(path) in caplog.text
