# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.datalists import read_datalist
from samda.data.transforms import build_preprocessing
from samda.errors import InputError
from samda.examples import ARCHIVE, DATALISTS, datalist_text, fetch_examples

ROOT = Path(__file__).parents[2]


def test_all_scans_are_there(examples):
    assert list(examples) == ["A", "A_small", "B", "M", "slicerio"]
    assert len(examples) == 5
    assert examples["A"].patient == examples["A_small"].patient == "A"
    assert nib.load(examples["A"].image).shape == (122, 101, 112)
    assert nib.load(examples["A_small"].image).shape == (122, 101, 30)
    assert nib.load(examples["M"].image).shape == (117, 91, 20)
    assert len(list(examples["B"].image.iterdir())) == 20
    assert sitk.ReadImage(str(examples["slicerio"].image)).GetSize() == (128, 128, 34)
    with pytest.raises(KeyError, match="choose from A, A_small, B"):
        examples["b"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # voxels of background and the classes, counted by their ids in the label files
        ("A_small", {5: 38634, 1: 9452, 2: 3947, 3: 3676, 6: 4675, 52: 997}),
        ("B", {5: 366708, 1: 130634, 2: 0, 3: 0, 6: 74102, 52: 11723}),
        ("M", {5: 18480, 1: 1941, 2: 1721, 3: 1442, 6: 4221, 23: 672}),
    ],
)
def test_labels_are_read_by_the_ids_of_their_kind(examples, name, counts):
    example = examples[name]
    file = np.asarray(nib.load(example.label).dataobj)
    assert {i: int((file == i).sum()) for i in counts} == counts
    label = build_preprocessing(example.task, labels=True)(example.case)["label"]
    assert example.task.classes == ("background", "liver", "spleen", "kidney_right", "kidney_left", "stomach", "aorta")
    assert [int((label == k).sum()) for k in range(1, 7)] == list(counts.values())


def test_sides_of_the_body_are_right(examples):
    """In RAS order x grows to the patient's right, where the liver is; spleen and stomach are on the left."""
    for name in ("A", "B", "M"):
        example = examples[name]
        label = build_preprocessing(example.task, labels=True)(example.case)["label"][0].numpy()
        center = {
            name: np.argwhere(label == k).mean(0)[0]
            for k, name in enumerate(example.task.classes)
            if (label == k).any()
        }
        assert center["liver"] > center["stomach"]
        assert center["liver"] > center["spleen"]
        if "kidney_left" in center:
            assert center["kidney_right"] > center["kidney_left"]
    example = examples["slicerio"]
    label = build_preprocessing(example.task, labels=True)(example.case)["label"][0].numpy()
    right, left = (np.argwhere(label == example.task.classes.index(f"lung_{s}")).mean(0)[0] for s in ("right", "left"))
    assert right > left


def test_datalists_name_the_scans(examples):
    data = read_datalist(examples.folder / "abdomen_ct.json")
    assert [case["id"] for case in data.cases["training"]] == ["A"]
    assert data.cases["test"] == [examples["B"].case]
    assert data.labels == examples["A"].task.labels
    assert read_datalist(examples.folder / "abdomen_mr.json").labels["aorta"] == (23,)
    assert read_datalist(examples.folder / "chest_ct.json").labels["vertebrae"] == (2, 3, 4)


@pytest.mark.parametrize("name", DATALISTS)
def test_datalists_of_the_checkout_are_those_of_the_code(name):
    assert (ROOT / "data" / f"{name}.json").read_text("utf-8") == datalist_text(name)


def test_a_damaged_file_is_fetched_again(examples, tmp_path, monkeypatch):
    for file in examples.folder.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(examples.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # complete folders need no connection
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert list(fetch_examples(tmp_path)) == list(examples)
    (tmp_path / "slicerio/ct.nrrd").write_bytes(b"half")
    fetch_examples(tmp_path)
    assert (tmp_path / "slicerio/ct.nrrd").read_bytes() == examples["slicerio"].image.read_bytes()
    (tmp_path / "M/mr.nii.gz").write_bytes(b"half")
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch_examples(tmp_path)


def test_offline_message_names_archive_hash_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMDA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError) as caught:
        fetch_examples()
    message = str(caught.value)
    assert "\n" not in message
    assert "No matching distribution found" in message
    assert str(tmp_path / "examples" / ARCHIVE) in message
    assert "5d4223ef" in message
    assert not list((tmp_path / "examples").iterdir())  # nothing half done is left


def test_an_archive_of_another_hash_is_refused(tmp_path):
    """Even one whose members try to leave the folder: it is never opened."""
    with tarfile.open(tmp_path / ARCHIVE, "w:gz") as tar:
        info = tarfile.TarInfo("../../escaped")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(InputError, match=r"is not totalsegmentator.* of sha256 5d4223"):
        fetch_examples(tmp_path)
    assert not (tmp_path.parent.parent / "escaped").exists()
