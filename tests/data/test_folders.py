# SPDX-License-Identifier: Apache-2.0
"""Images with masks, and DICOM series with label volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.datalists import is_labeled, read_datalist
from samda.data.layouts import Problem
from samda.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"scan")


def series(folder: Path) -> None:
    folder.mkdir(parents=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 6, 5), np.int16)), str(folder / "1.dcm"))


def pairs(path: Path) -> dict[str, tuple[str, str]]:
    """id -> image and label below `path`."""
    cases = read_datalist(path).cases["training"]
    return {c["id"]: tuple(str(Path(c[k]).relative_to(path)) for k in ("image", "label")) for c in cases}


def problems(path: Path) -> list[Problem]:
    found: list[Problem] = []
    read_datalist(path, found.append)
    return found


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_datalist(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("masks", ["masks", "labels"])
def test_pictures_and_masks(tmp_path, masks):
    touch(tmp_path, "images/a.jpg", "images/b.png", "images/c.tif", "images/notes.txt", "images/.hidden.png")
    touch(tmp_path, f"{masks}/a.png", f"{masks}/b_mask.png", f"{masks}/c_segmentation.png")
    assert pairs(tmp_path) == {
        "a": ("images/a.jpg", f"{masks}/a.png"),
        "b": ("images/b.png", f"{masks}/b_mask.png"),
        "c": ("images/c.tif", f"{masks}/c_segmentation.png"),
    }
    data = read_datalist(tmp_path)
    assert data.layout == "masks" and data.labels is None and is_labeled(tmp_path)
    assert data.cases["test"] == data.cases["validation"] == []


def test_volumes_and_series_with_labels(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nrrd", "labels/p1.2.nii.gz")
    series(tmp_path / "images" / "p1.2")
    assert pairs(tmp_path) == {"a": ("images/a.nii.gz", "labels/a.nrrd"), "p1.2": ("images/p1.2", "labels/p1.2.nii.gz")}


def test_masks_that_do_not_fit_are_told_apart(tmp_path):
    touch(tmp_path, *(f"images/{n}" for n in ("a.png", "b.png", "c.png", "d.png", "d.jpg")))
    touch(tmp_path, *(f"masks/{n}" for n in ("a.png", "b.png", "b_mask.png", "d.png", "e.png")))
    found = problems(tmp_path)
    assert [(p.kind, p.case, p.stops) for p in found] == [
        ("label", "b", True),
        ("missing", "c", True),
        ("no image", "", False),
        ("id", "d", True),
    ]
    assert "c.png has no label masks/c.*; add it, or move the image" in found[1].text
    assert "e.png belongs to no file in images" in found[2].text
    assert "d.jpg and" in found[3].text and "rename or move all but one" in found[3].text
    assert "could all be the label of" in refusal(tmp_path)


def test_both_masks_and_labels_or_no_pair_at_all(tmp_path):
    touch(tmp_path, "images/a.png", "masks/b.png")
    assert "has no label masks/a.*" in refusal(tmp_path)
    with pytest.raises(InputError, match=r"no file in .* has the name of one in"):
        problems(tmp_path)
    touch(tmp_path, "labels/a.png")
    assert "holds labels, masks" in refusal(tmp_path)


def test_series_with_labels_in_three_places(tmp_path):
    for name in ("p1", "p2", "p3", "p4"):
        series(tmp_path / name / ("CT/1" if name == "p4" else ""))
    touch(tmp_path, "p1/anything.nii.gz", "p2.nrrd", "labels/p3.mha", "p4/ct.nii.gz", "p4/ct_seg.nii.gz")
    assert pairs(tmp_path) == {
        "p1": ("p1", "p1/anything.nii.gz"),
        "p2": ("p2", "p2.nrrd"),
        "p3": ("p3", "labels/p3.mha"),
        "p4": ("p4/CT/1", "p4/ct_seg.nii.gz"),
    }
    assert read_datalist(tmp_path).layout == "dicom" and is_labeled(tmp_path)
    (case,) = read_datalist(tmp_path / "p1").cases["training"]
    assert case == {"id": "p1", "image": str(tmp_path / "p1"), "label": str(tmp_path / "p1/anything.nii.gz")}


def test_series_that_do_not_fit_are_told_apart(tmp_path):
    for name in ("p1", "p2", "p3", "p4/T1", "p4/T2"):
        series(tmp_path / name)
    touch(tmp_path, "p1/label.nii.gz", "labels/p2.nii.gz", "p2.nii.gz", "p9.nii.gz")
    found = problems(tmp_path)
    assert [(p.kind, p.case, p.stops) for p in found] == [
        ("label", "p2", True),
        ("missing", "p3", True),
        ("series", "p4", True),
        ("no image", "", False),
    ]
    assert "p3 has no label; put p3.nii.gz (.nrrd, .mha) beside it or into" in found[1].text
    assert "holds 2 series (T1, T2)" in found[2].text
    assert "p9.nii.gz belongs to no DICOM folder" in found[3].text


def test_series_without_any_label_are_scans(tmp_path):
    for name in ("p1", "p2"):
        series(tmp_path / name)
    touch(tmp_path, "other.nii.gz")
    assert [case["id"] for case in read_datalist(tmp_path).cases["test"]] == ["other", "p1", "p2"]
    assert not is_labeled(tmp_path)


def test_a_folder_of_nothing_known_says_what_could_be_done(tmp_path):
    touch(tmp_path, "p1/ct.nii.gz", "p1/seg.nii.gz")
    assert "list images and labels in a CSV or JSON" in refusal(tmp_path)
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    assert "add its dataset.json" in refusal(tmp_path)
