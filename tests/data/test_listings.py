# SPDX-License-Identifier: Apache-2.0
"""CSV files of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from samda.data.datalists import is_labeled, read_datalist
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
        ("image,label\n", "lists no usable case"),
        ("image,label\n,seg/0.nii.gz", "line 2 has no 'image'"),
        ("image,label,section\nct/0.nii.gz,seg/0.nii.gz,trainng", "section 'trainng' is unknown; did you mean 'train"),
        ("image,label,section\nct/0.nii.gz,,training", "line 2 has no 'label'"),
        ("image,label,fold\nct/0.nii.gz,seg/0.nii.gz,a", "fold must be a whole number, got 'a'"),
        ("image,label\nct/0.nii.gz,seg/0.nii.gz,x,y", "line 2 has more cells than the header (x, y)"),
        ("image,label\nct/0.nii.gz,seg/9.nii.gz", "seg/9.nii.gz; did you mean"),
        ("image,label\nct/0.nii.gz,seg/0.nii.gz\nct/0.nii.gz,seg/1.nii.gz", "2 cases have one id, 'ct_0' ("),
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
