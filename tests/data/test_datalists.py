# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.datalists import read_datalist, read_labels
from samda.data.folders import Problem
from samda.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"scan")


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        read_datalist(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nnunet(folder: Path, ending=".nii.gz", cases=("liver_01", "liver_02"), test=("liver_07",), **content) -> Path:
    touch(folder, *(f"imagesTr/{c}_0000{ending}" for c in cases), *(f"labelsTr/{c}{ending}" for c in cases))
    touch(folder, *(f"imagesTs/{c}_0000{ending}" for c in test))
    known = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}, "file_ending": ending}
    write(folder / "dataset.json", known | content)
    return folder


# --------------------------------------------------------------------------------------------------- datalists and MSD


def test_monai_datalist_with_folds(tmp_path):
    touch(tmp_path, *(f"{kind}/{i}.nii.gz" for kind in ("ct", "seg") for i in range(4)))
    training = [
        {"image": f"ct/{i}.nii.gz", "label": f"seg/{i}.nii.gz", "fold": i % 2, "patient": f"p{i}", "weight": 3}
        for i in (0, 1)
    ]
    validation = [{"image": "ct/2.nii.gz", "label": "seg/2.nii.gz", "id": "named"}]
    path = write(tmp_path / "list.json", {"training": training, "validation": validation, "testing": ["ct/3.nii.gz"]})
    data = read_datalist(path)
    assert data.layout == "datalist"
    assert data.labels is None
    root = str(tmp_path)
    assert data.cases["training"] == [
        {
            "image": f"{root}/ct/{i}.nii.gz",
            "label": f"{root}/seg/{i}.nii.gz",
            "fold": i,
            "patient": f"p{i}",
            "weight": 3,
            "id": str(i),
        }
        for i in (0, 1)
    ]
    assert [case["id"] for case in data.cases["validation"]] == ["named"]
    assert data.cases["test"] == [{"image": f"{root}/ct/3.nii.gz", "id": "3"}]


def test_msd_folder(tmp_path):
    """MSD's own dataset.json: paths with ./, labels by id, and test cases as bare paths."""
    folder = tmp_path / "Task09_Spleen"
    touch(folder, "imagesTr/spleen_2.nii.gz", "labelsTr/spleen_2.nii.gz", "imagesTs/spleen_1.nii.gz")
    content = {
        "name": "Spleen",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "numTraining": 1,
        "training": [{"image": "./imagesTr/spleen_2.nii.gz", "label": "./labelsTr/spleen_2.nii.gz"}],
        "test": ["./imagesTs/spleen_1.nii.gz"],
    }
    write(folder / "dataset.json", content)
    for path in (folder, folder / "dataset.json"):
        data = read_datalist(path)
        assert data.layout == "datalist"
        assert data.labels == {"background": (0,), "spleen": (1,)}
        (case,) = data.cases["training"]
        assert case["id"] == "spleen_2"
        assert Path(case["image"]) == folder / "imagesTr/spleen_2.nii.gz"
        assert Path(case["label"]).read_bytes() == b"scan"
        assert [c["id"] for c in data.cases["test"]] == ["spleen_1"]


def test_absolute_paths_and_folders_as_images(tmp_path):
    touch(tmp_path, "elsewhere/a.nii.gz", "series/1.dcm")
    path = write(tmp_path / "lists/l.json", {"test": [str(tmp_path / "elsewhere/a.nii.gz"), "../series"]})
    data = read_datalist(path)
    assert [case["id"] for case in data.cases["test"]] == ["a", "series"]


def test_equal_file_names_take_their_folders(tmp_path):
    touch(tmp_path, *(f"{p}/{f}.nii.gz" for p in ("s1", "s2") for f in ("ct", "seg")))
    entries = [{"image": f"{p}/ct.nii.gz", "label": f"{p}/seg.nii.gz"} for p in ("s1", "s2")]
    data = read_datalist(write(tmp_path / "l.json", {"training": entries}))
    assert [case["id"] for case in data.cases["training"]] == ["s1_ct", "s2_ct"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainig": []}, "did you mean 'training'"),
        ({"name": "x"}, "lists no cases (keys: name)"),
        ({"training": [{"image": "a.nii", "lable": "b.nii"}]}, "training[0] has no 'label'; did you mean 'lable'"),
        ({"training": [{"label": "b.nii"}]}, "training[0] has no 'image'"),
        (
            {"training": [{"image": ["a.nii", 3], "label": "b.nii"}]},
            "must be one path, or a list",
        ),
        ({"training": [{"image": "a.nii", "label": ["a.nii", "b.nii"]}]}, "'label' must be one path"),
        ({"training": [7]}, "training[0] must be"),
        ({"training": ["a.nii"]}, "has no 'label'"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "fold": "1"}]}, "fold must be a whole number"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "patient": {"id": 1}}]}, "patient must be a text or a num"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "slices": [3, 9]}]}, "slices must be pairs [[first, end]"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "slices": [[0, 1.5]]}]}, "got [[0, 1.5]]"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "slices": []}]}, "slices must be pairs"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "slices": [[4, 4]]}]}, "slices must be pairs"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "slices": [[2, 8], [0, 6]]}]}, "[0, 6] and [2, 8] overlap"),
        ({"training": [{"image": "a.nii", "label": "b.nii", "id": True}]}, "id must be a text or a number, got True"),
        ({"training": [{"image": [], "label": "b.nii"}]}, "has no 'image'"),
        ({"training": [], "test": {"image": "a.nii"}}, "'test' must be a list"),
        ([1, 2], "JSON object"),
    ],
)
def test_malformed_lists(tmp_path, content, message):
    touch(tmp_path, "a.nii", "b.nii")
    assert message in refusal(write(tmp_path / "l.json", content))


def test_what_is_no_json(tmp_path):
    (tmp_path / "l.json").write_text('{"training": [')
    assert "is not JSON" in refusal(tmp_path / "l.json")


def test_json_that_begins_with_a_byte_order_mark(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    text = '{"training": [{"image": "a.nii", "label": "b.nii", "slices": [[0, 4], [6, 9]]}]}'
    (tmp_path / "l.json").write_text(text, encoding="utf-8-sig")
    assert read_datalist(tmp_path / "l.json").cases["training"][0]["slices"] == [[0, 4], [6, 9]]


def test_missing_files_are_listed(tmp_path):
    touch(tmp_path, "ct/liver_10.nii.gz", "seg/1.nii.gz")
    entries = [{"image": f"ct/liver_{i}.nii.gz", "label": "seg/1.nii.gz", "id": i} for i in (10, 1, 2, 3, 4, 5, 6)]
    message = refusal(write(tmp_path / "l.json", {"training": entries}))
    assert "6 of 14 listed files are missing" in message
    assert "liver_1.nii.gz" in message
    assert "liver_5.nii.gz, ..." in message
    assert "liver_6.nii.gz" not in message
    assert "liver_10" not in message  # another patient
    case = {"image": "CT/Liver-10.nii", "label": "seg/1.nii.gz"}
    (tmp_path / "CT").symlink_to(tmp_path / "ct") if not (tmp_path / "CT").exists() else None
    assert "did you mean 'liver_10.nii.gz'" in refusal(write(tmp_path / "l.json", {"training": [case]}))


def test_doubled_ids(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    entries = [{"image": f"{n}.nii.gz", "label": f"{n}.nii.gz", "id": "p"} for n in "ab"]
    assert "'p'" in refusal(write(tmp_path / "l.json", {"training": entries}))
    twice = {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}], "test": ["a.nii.gz"]}
    assert "'a'" in refusal(write(tmp_path / "m.json", twice))  # one scan in two sections


# -------------------------------------------------------------------------------------------------------------- nnU-Net


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
def test_nnunet_folder(tmp_path, ending):
    folder = nnunet(tmp_path / "Dataset001_Liver", ending)
    data = read_datalist(folder)
    assert data.layout == "nnunet"
    assert data.labels == {"background": (0,), "liver": (1,)}
    assert [case["id"] for case in data.cases["training"]] == ["liver_01", "liver_02"]
    case = data.cases["training"][1]
    assert case["image"] == str(folder / f"imagesTr/liver_02_0000{ending}")
    assert case["label"] == str(folder / f"labelsTr/liver_02{ending}")
    assert data.cases["test"] == [{"id": "liver_07", "image": str(folder / f"imagesTs/liver_07_0000{ending}")}]
    assert read_datalist(folder / "dataset.json") == data


def test_nnunet_test_labels_are_used_where_they_are(tmp_path):
    folder = nnunet(tmp_path)
    touch(folder, "labelsTs/liver_07.nii.gz")
    assert read_datalist(folder).cases["test"][0]["label"] == str(folder / "labelsTs/liver_07.nii.gz")


def test_nnunet_with_a_missing_label(tmp_path):
    folder = nnunet(tmp_path)
    (folder / "labelsTr/liver_02.nii.gz").unlink()
    assert "labelsTr/liver_02.nii.gz; check the paths" in refusal(folder)


def test_nnunet_channels_are_listed_in_their_order(tmp_path):
    folder = nnunet(tmp_path, channel_names={"0": "T2", "1": "ADC"})
    touch(folder, *(f"imagesTr/liver_0{k}_0001.nii.gz" for k in (1, 2)), "imagesTs/liver_07_0001.nii.gz")
    data = read_datalist(folder)
    assert data.channels == ("T2", "ADC")
    assert data.cases["training"][1]["image"] == [str(folder / f"imagesTr/liver_02_000{c}.nii.gz") for c in (0, 1)]
    assert data.cases["training"][1]["id"] == "liver_02"
    (folder / "imagesTr/liver_02_0001.nii.gz").unlink()
    assert str(folder / "imagesTr/liver_02_0001.nii.gz (dataset.json names 2 channels)") in refusal(folder)
    (folder / "imagesTr/liver_02_0000.nii.gz").rename(folder / "imagesTr/liver_02.nii.gz")
    assert "liver_02.nii.gz is not a channel" in refusal(folder)


def test_nnunet_with_more_channels_than_named_or_than_the_network_takes(tmp_path):
    folder = nnunet(tmp_path)
    touch(folder, "imagesTr/liver_01_0001.nii.gz")
    assert "liver_01_0001.nii.gz is channel 1, dataset.json names 1 (channel_names)" in refusal(folder)
    touch(folder, *(f"imagesTr/liver_01_000{c}.nii.gz" for c in (2, 3)))
    nnunet(folder, channel_names={})
    assert "comes with 4 channel files, the network takes 3" in refusal(folder)


def test_nnunet_colors_lie_in_one_picture(tmp_path):
    folder = nnunet(tmp_path, ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    assert read_datalist(folder).cases["training"][0]["image"] == str(folder / "imagesTr/liver_01_0000.png")


def test_channels_in_a_datalist(tmp_path):
    touch(tmp_path, "a/t1.nii", "a/t2.nii", "seg.nii")
    entry = {"image": ["a/t1.nii", "a/t2.nii"], "label": "seg.nii"}
    (case,) = read_datalist(write(tmp_path / "l.json", {"training": [entry]})).cases["training"]
    assert case["image"] == [str(tmp_path / "a/t1.nii"), str(tmp_path / "a/t2.nii")]
    assert case["id"] == "t1"


def test_every_problem_reaches_a_report_and_the_sound_cases_stay(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "l.nii")
    entries = [
        {"image": "a.nii", "label": "l.nii"},
        {"image": "gone.nii", "label": "l.nii"},
        {"label": "l.nii"},
        {"image": "b.nii", "label": "l.nii", "id": "a"},
        {"image": "b.nii", "label": "also_gone.nii"},
    ]
    problems: list[Problem] = []
    path = write(tmp_path / "l.json", {"labels": {"liver": "one"}, "training": entries})
    data = read_datalist(path, problems.append)
    assert [case["id"] for case in data.cases["training"]] == ["a"]
    assert [(p.kind, p.case) for p in problems] == [
        ("labels", ""),
        ("entry", ""),
        ("missing", "gone"),
        ("missing", "b"),
        ("id", "a"),
    ]
    assert all(p.stops and "\n" not in p.text for p in problems)


def test_nnunet_folder_of_version_1(tmp_path):
    folder = nnunet(tmp_path)
    listed = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("liver_01", "liver_02")]
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver"},
        "numTraining": 2,
        "training": listed,
    }
    write(folder / "dataset.json", content | {"test": ["./imagesTs/liver_07.nii.gz"]})
    data = read_datalist(folder)
    assert data.layout == "nnunet" and [case["id"] for case in data.cases["training"]] == ["liver_01", "liver_02"]
    assert data.cases["training"][0]["image"] == str(folder / "imagesTr/liver_01_0000.nii.gz")
    assert [case["id"] for case in data.cases["test"]] == ["liver_07"]


def test_nnunet_entry_dataset_lists_the_cases(tmp_path):
    touch(tmp_path, "ct/a.nii.gz", "ct/b.nii.gz", "seg/a.nii.gz")
    cases = {"p1": {"images": ["ct/a.nii.gz", "ct/b.nii.gz"], "label": "seg/a.nii.gz"}}
    write(tmp_path / "dataset.json", {"labels": {"liver": 1}, "file_ending": ".nii.gz", "dataset": cases})
    assert read_datalist(tmp_path).cases["training"] == [
        {
            "id": "p1",
            "image": [str(tmp_path / "ct/a.nii.gz"), str(tmp_path / "ct/b.nii.gz")],
            "label": str(tmp_path / "seg/a.nii.gz"),
        }
    ]


def test_hidden_files_of_macos_and_wrong_counts(tmp_path):
    folder = nnunet(tmp_path, numTraining=3)
    touch(folder, "imagesTr/._liver_01_0000.nii.gz", "labelsTr/._liver_01.nii.gz")
    found: list[Problem] = []
    assert len(read_datalist(folder, found.append).cases["training"]) == 2
    assert [(p.kind, p.stops) for p in found] == [("count", False)]
    assert "numTraining 3, but 2 training cases" in found[0].text


def test_json_with_a_key_twice(tmp_path):
    (tmp_path / "l.json").write_text('{"labels": {"liver": 1, "liver": 2}, "test": []}')
    assert "'liver' stands twice" in refusal(tmp_path / "l.json")


def test_links_to_files_that_are_not_there(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    (tmp_path / "images/b.nii.gz").symlink_to("/annex/objects/b")
    found: list[Problem] = []
    assert [case["id"] for case in read_datalist(tmp_path, found.append).cases["training"]] == ["a"]
    assert [(p.kind, p.case, p.stops) for p in found] == [("missing", "b", True)]
    assert "/annex/objects/b" in found[0].text


def test_nnunet_with_another_file_ending(tmp_path):
    folder = nnunet(tmp_path, file_ending=".nrrd")
    assert "no CASE_0000.nrrd" in refusal(folder)


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"background": 0, "liver": 1}, {"background": (0,), "liver": (1,)}),  # nnU-Net v2
        ({"0": "background", "1": "liver"}, {"background": (0,), "liver": (1,)}),  # MSD
        ({"background": 0, "kidneys": [2, 3]}, {"background": (0,), "kidneys": (2, 3)}),
        ({"2": "kidneys", "3": "kidneys"}, {"kidneys": (2, 3)}),
        ({"background": 0, "liver": 1, "ignore": 2}, {"background": (0,), "liver": (1,), "ignore": (2,)}),
    ],
)
def test_the_two_styles_of_labels(given, expected):
    assert read_labels(given, "dataset.json") == expected


@pytest.mark.parametrize("given", [{"liver": "one"}, {"0": 1}, {"liver": True}, {"a": []}, {"liver": 1.5}, [0, 1], {}])
def test_labels_of_neither_style(given):
    with pytest.raises(InputError, match="labels must be"):
        read_labels(given, "dataset.json")


# ---------------------------------------------------------------------------------------------------------------- scans


def test_folder_of_scans(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.NRRD", "notes.txt", ".hidden.nii.gz", "c.png", "other/d.nii.gz")
    data = read_datalist(tmp_path)
    assert data.layout == "scans"
    assert data.labels is None
    assert [case["id"] for case in data.cases["test"]] == ["a", "b", "c", "other_d"]
    assert data.cases["training"] == data.cases["validation"] == []
    assert all("label" not in case for case in data.cases["test"])


def test_one_scan(tmp_path):
    touch(tmp_path, "b.nii.gz")
    assert read_datalist(tmp_path / "b.nii.gz").cases["test"] == [{"image": str(tmp_path / "b.nii.gz"), "id": "b"}]


def test_folders_of_dicom_series(tmp_path):
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 6, 5), np.int16)), str(tmp_path / patient / "1.dcm"))
    touch(tmp_path, "c.nii.gz")
    assert [case["id"] for case in read_datalist(tmp_path).cases["test"]] == ["c", "p1", "p2"]
    assert read_datalist(tmp_path / "p1").cases["test"] == [{"id": "p1", "image": str(tmp_path / "p1")}]


def test_labels_beside_scans_are_none(tmp_path, caplog):
    touch(tmp_path, "b1/b1_t1.nii.gz", "b1/b1_seg.nii.gz", "s1/ct.nii.gz", "s1/segmentations/liver.nii.gz", "k_seg.nii")
    ids = [case["id"] for case in read_datalist(tmp_path).cases["test"]]
    assert ids == ["k_seg", "b1_b1_t1", "s1_ct"]
    assert "labels by their names (1): b1/b1_seg.nii.gz" in caplog.text
    assert "folders of labels (1): s1/segmentations" in caplog.text


def test_scans_of_one_name_are_told_apart_by_their_endings(tmp_path, caplog):
    touch(tmp_path, "a.nii.gz", "a.nrrd", "b.mha", "p1/a.nii.gz", "p1_a.png")
    ids = {case["image"]: case["id"] for case in read_datalist(tmp_path).cases["test"]}
    named = {"a.nii.gz": "a_nii_gz", "a.nrrd": "a_nrrd", "b.mha": "b"}
    assert ids == {str(tmp_path / file): name for file, name in named.items()} | {
        str(tmp_path / "p1" / "a.nii.gz"): "p1_a_nii_gz",
        str(tmp_path / "p1_a.png"): "p1_a_png",
    }
    assert "a.nii.gz, a.nrrd, p1_a.png, a.nii.gz" in caplog.text


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no scans" in refusal(tmp_path / "empty")
    assert "did you mean 'empty'" in refusal(tmp_path / "Empty")
