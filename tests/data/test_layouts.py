# SPDX-License-Identifier: Apache-2.0
"""CSV files of pairs, images with masks, and DICOM series with label volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.datalists import find_pairs, is_labeled, read_datalist
from samda.data.folders import Problem, join_channels
from samda.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"scan")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    touch(tmp_path, *(f"{kind}/{i}.nii.gz" for kind in ("ct", "seg") for i in range(4)))
    return tmp_path


def test_all_columns(place):
    (place / "pairs.csv").write_text(
        "id,image,label,patient,fold,section,age\n"
        "one,ct/0.nii.gz,seg/0.nii.gz,p1,0,train,63\n"
        ',ct/1.nii.gz,"seg/1.nii.gz",p2,1,,\n'
        "\n"
        "three,ct/2.nii.gz,seg/2.nii.gz,,,Validation,5\n"
        f"four,{place / 'ct/3.nii.gz'},,,,,7\n"
    )
    for path in (place, place / "pairs.csv"):  # the only list of pairs in its folder
        data = read_datalist(path)
        assert data.layout == "csv" and data.labels is None and is_labeled(path)
        root = str(place)
        assert data.cases["training"] == [
            {"id": "one", "image": f"{root}/ct/0.nii.gz", "label": f"{root}/seg/0.nii.gz", "patient": "p1", "fold": 0},
            {"id": "1", "image": f"{root}/ct/1.nii.gz", "label": f"{root}/seg/1.nii.gz", "patient": "p2", "fold": 1},
        ]
        assert [case["id"] for case in data.cases["validation"]] == ["three"]
        assert data.cases["test"] == [{"id": "four", "image": f"{root}/ct/3.nii.gz"}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_of_spreadsheets(place, delimiter):
    rows = [["Image", "Label"], ["ct/0.nii.gz", "seg/0.nii.gz"]]
    text = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows)
    (place / "pairs.csv").write_text(text, encoding="utf-8")
    assert [case["id"] for case in read_datalist(place).cases["training"]] == ["0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,lable\nct/0.nii.gz,x", "column 'lable' is unknown; did you mean 'label'?"),
        ("image,label,patinet\nct/0.nii.gz,seg/0.nii.gz,1", "column 'patinet' is unknown; did you mean 'patient'?"),
        ("image,mask\nct/0.nii.gz,seg/0.nii.gz", "has no column 'label' (columns: image, mask)"),
        ("image,label,label\na,b,c", "has column 'label' twice"),
        ("", "pairs.csv is empty; write a line with the columns image,label, and one for each case"),
        ("\n \n", "pairs.csv is empty; write a line"),
        ("image,label\n", "has no valid case"),
        ("image,label\n,seg/0.nii.gz", "line 2 has no 'image'"),
        ("image,label,section\nct/0.nii.gz,seg/0.nii.gz,trainng", "section 'trainng' is unknown; did you mean 'train"),
        ("image,label,section\nct/0.nii.gz,,training", "line 2 has no 'label'"),
        ("image,label,fold\nct/0.nii.gz,seg/0.nii.gz,a", "fold must be a whole number, got 'a'"),
        ("image,label\nct/0.nii.gz,seg/0.nii.gz,x,y", "line 2 has more cells than the header (x, y)"),
        ("image,label\nct/0.nii.gz,seg/9.nii.gz", "seg/9.nii.gz; check the paths"),
        ("image,label\nct/0.nii.gz,seg/0.nii.gz\nct/0.nii.gz,seg/1.nii.gz", "2 cases have the id 'ct_0' ("),
    ],
)
def test_what_is_wrong_is_one_line(place, text, message):
    (place / "pairs.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        read_datalist(place / "pairs.csv")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_report_names_every_wrong_line_also_where_no_sound_one_is_left(place):
    (place / "pairs.csv").write_text("image,label,fold\n,seg/0.nii.gz,0\nct/0.nii.gz,seg/0.nii.gz,x\n")
    problems = []
    data = read_datalist(place / "pairs.csv", problems.append)
    assert not any(data.cases.values())
    assert [problem.text.partition("pairs.csv, ")[2] for problem in problems] == [
        "line 2 has no 'image'; a training case needs one, give its path",
        "line 3: fold must be a whole number, got 'x'",
    ]


def test_other_tables_do_not_make_a_data_set(place):
    (place / "scores.csv").write_text("case,dice\n0,0.9\n")
    touch(place, "a.nii.gz")
    assert read_datalist(place).layout == "scans" and not is_labeled(place)
    for name in ("a.csv", "b.csv"):
        (place / name).write_text("image,label\nct/0.nii.gz,seg/0.nii.gz\n")
    with pytest.raises(InputError, match=r"several lists of pairs \(a.csv, b.csv\); give one of them"):
        read_datalist(place)


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
    assert "e.png matches no file in images" in found[2].text
    assert "d.jpg and" in found[3].text and "rename or move all but one" in found[3].text
    assert "match as label of" in refusal(tmp_path)


def test_both_masks_and_labels_or_no_pair_at_all(tmp_path):
    touch(tmp_path, "images/a.png", "masks/b.png")
    assert "has no label masks/a.*" in refusal(tmp_path)
    with pytest.raises(InputError, match=r"no file in .* has the name of a file in"):
        problems(tmp_path)
    touch(tmp_path, "labels/a.png")
    assert "contains labels, masks" in refusal(tmp_path)


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
    assert "p3 has no label; put p3.nii.gz (.nrrd, .mha) next to it or into" in found[1].text
    assert "contains 2 series (T1, T2)" in found[2].text
    assert "p9.nii.gz matches no DICOM folder" in found[3].text


def test_series_without_any_label_are_scans(tmp_path):
    for name in ("p1", "p2"):
        series(tmp_path / name)
    touch(tmp_path, "other.nii.gz")
    assert [case["id"] for case in read_datalist(tmp_path).cases["test"]] == ["other", "p1", "p2"]
    assert not is_labeled(tmp_path)


def test_a_folder_of_nothing_known_says_what_could_be_done(tmp_path):
    touch(tmp_path, "p1/notes.txt")
    assert "list images and labels in a CSV or JSON" in refusal(tmp_path)
    touch(tmp_path, "imagesTr/a_0000.nii")
    (tmp_path / "imagesTr/a_0000.nii").rename(tmp_path / "imagesTr/a")
    assert "add its dataset.json" in refusal(tmp_path)


def test_everything_in_a_folder_is_a_case_or_named(tmp_path):
    touch(tmp_path, "a.nii.gz", "a-label.nrrd", "a.json", "p7/ct.nii.gz", "p7/seg.nii.gz", "k.nii/k.nii", ".DS_Store")
    touch(tmp_path, "f.mgz", "pair.img", "pair.hdr", "labels/a.nii.gz", "._a.nii.gz", "p8/thumb.jpg")
    touch(tmp_path, "p8/st/old.nii.gz", "disk.img")
    series(tmp_path / "p8" / "st" / "se")
    series(tmp_path / "p9")
    touch(tmp_path, "p9/thumb.jpg", "p9/old.nii.gz")
    (tmp_path / "annexed.nii.gz").symlink_to("/annex/objects/x.nii.gz")
    (tmp_path / "loop").symlink_to(tmp_path)
    touch(tmp_path, "out/a.nii.gz", "out/.samda/manifest.jsonl")
    found: list[Problem] = []
    cases = read_datalist(tmp_path, found.append, unlabeled=True).cases["test"]
    assert {c["id"]: str(Path(c["image"]).relative_to(tmp_path)) for c in cases} == {
        "a": "a.nii.gz",
        "f": "f.mgz",
        "pair": "pair.hdr",
        "k": "k.nii/k.nii",
        "p7_ct": "p7/ct.nii.gz",
        "p8_thumb": "p8/thumb.jpg",
        "p8_st_old": "p8/st/old.nii.gz",
        "p8_st_se": "p8/st/se",
        "p9": "p9",
    }
    named = {name for p in found for name in p.text.partition(": ")[2].partition(": ")[2].split(", ")}
    assert named == {
        *("a-label.nrrd", "p7/seg.nii.gz", "a.json", "disk.img", "labels", "annexed.nii.gz", "loop", "out"),
        *("p9/thumb.jpg", "p9/old.nii.gz"),
    }
    assert not any(p.stops for p in found)


def test_files_named_by_channel_are_one_case_of_a_model_with_channels(tmp_path):
    touch(tmp_path, *(f"{n}.nii.gz" for n in ("a_0000", "a_0001", "b_0000", "c")))
    cases = read_datalist(tmp_path).cases["test"]
    assert join_channels(cases, 1) == cases
    two = join_channels(cases, 2)
    assert [case["id"] for case in two] == ["a", "b_0000", "c"]
    assert two[0]["image"] == [str(tmp_path / f"a_000{k}.nii.gz") for k in (0, 1)]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("image,label,patient\n{}Müller\n", "latin-1"),
        ("image\tlabel\n{}", "utf-16"),
        ("sep=;\nimage;label\n{}", "utf-8"),
    ],
)
def test_lists_as_spreadsheets_save_them(place, text, encoding):
    sign = next(sign for sign in "\t;," if sign in text)
    row = sign.join(["ct/0.nii.gz", "seg/0.nii.gz", ""][: 3 if encoding == "latin-1" else 2])
    (place / "list.csv").write_bytes(text.format(row).encode(encoding))
    data = read_datalist(place)
    assert data.listing == place / "list.csv"
    assert data.cases["training"] == [
        {"id": "0", "image": str(place / "ct/0.nii.gz"), "label": str(place / "seg/0.nii.gz")}
        | ({"patient": "Müller"} if encoding == "latin-1" else {})
    ]


@pytest.mark.parametrize("name", ["a-label.nrrd", "a.seg.nrrd", "a_Segmentation.nrrd", "a.nrrd"])
def test_label_names_of_slicer(tmp_path, name):
    touch(tmp_path, "images/a.nrrd", f"labels/{name}", "images/a2.nrrd", "labels/a2.nrrd")
    assert pairs(tmp_path)["a"] == ("images/a.nrrd", f"labels/{name}")
    touch(tmp_path, "out/a.nii.gz", "out/a2.nii.gz")
    found, _ = find_pairs(tmp_path / "out", tmp_path / "labels")
    assert {str(p.name): label.name for p, label in found.values() if p} == {"a.nii.gz": name, "a2.nii.gz": "a2.nrrd"}
