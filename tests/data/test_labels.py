# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from samda.data.headers import segment_names
from samda.data.labels import IGNORED, OPEN, MapLabelsd, label_map, partial_labels, relabeled
from samda.errors import InputError, UsageError
from samda.task import Task

CLASSES = ("background", "liver", "kidney")
PLAIN = Task(classes=CLASSES)
LISTED = Task(classes=CLASSES, labels={"liver": 5, "kidney": [2, 3]})
DATASET = {"background": (0,), "kidney": (2,), "spleen": (4,), "liver": (1,)}


def mapped(values, task, dataset_labels=None, dtype=torch.int16) -> list[int]:
    label = MetaTensor(torch.tensor(values, dtype=dtype).reshape(1, 1, 1, -1))
    label.meta["filename_or_obj"] = "labels.nii.gz"
    result = MapLabelsd("label", task, dataset_labels)({"label": label})["label"]
    assert result.dtype == torch.uint8
    assert result.shape == label.shape
    return result.flatten().tolist()


def test_listed_ids_count_and_all_others_are_background():
    assert mapped([0, 1, 2, 3, 4, 5, 117], LISTED) == [0, 0, 2, 2, 0, 1, 0]


def test_names_of_the_data_set():
    # the spleen is named but no class of the task
    assert mapped([0, 1, 2, 4], PLAIN, DATASET) == [0, 1, 2, 0]


def test_ids_that_the_data_set_does_not_name_are_refused():
    with pytest.raises(InputError, match=r"labels.nii.gz has ids that the data set's labels does not name: 3, 9") as e:
        mapped([0, 1, 9, 3], PLAIN, DATASET)
    assert "known: 0, 1, 2, 4" in str(e.value)
    assert "list the ids" in str(e.value)


def test_without_any_names_id_k_is_class_k():
    assert mapped([0, 1, 2, 2], PLAIN) == [0, 1, 2, 2]
    with pytest.raises(InputError, match="does not name: 3, 255"):
        mapped([0, 255, 3], PLAIN)


def test_a_class_that_the_data_set_does_not_name():
    with pytest.raises(InputError, match="'liver'; did you mean 'Liver'"):
        label_map(PLAIN, {"Liver": (1,), "kidney": (2,)})


def test_task_and_data_set_that_disagree():
    with pytest.raises(InputError, match=r"'liver' has ids \[5\] .* \[1\] in the data set"):
        label_map(LISTED, {"liver": (1,)})
    label_map(LISTED, {"liver": (5,), "kidney_right": (2,), "kidney_left": (3,)})  # merged names do not


def test_regions_that_overlap_are_refused():
    with pytest.raises(UsageError, match="'liver' and 'kidney' share id 1"):
        label_map(PLAIN, {"liver": (1, 2), "kidney": (1,)})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
def test_number_types(dtype):
    assert mapped([5, 0, 2, 3], LISTED, dtype=dtype) == [1, 0, 2, 2]


def test_negative_and_distant_ids():
    task = Task(classes=CLASSES, labels={"liver": -3, "kidney": 70_000})
    assert mapped([-3, 70_000, 0], task, dtype=torch.int32) == [1, 2, 0]


def test_fractions_are_refused():
    with pytest.raises(InputError, match="fractions"):
        mapped([0.0, 1.0, 1.5], PLAIN, dtype=torch.float32)


@pytest.mark.parametrize("values", [[0.0, float("nan")], [-1e9, 1e9]])
def test_values_that_are_no_ids_are_refused(values):
    with pytest.raises(InputError, match="not class ids"):
        mapped(values, LISTED, dtype=torch.float32)


def test_long_labels_are_mapped_in_parts(monkeypatch):
    monkeypatch.setattr("samda.data.labels.CHUNK", 7)
    values = np.random.default_rng(0).integers(0, 6, 100)
    table = np.array([0, 0, 2, 2, 0, 1])
    assert mapped(values.tolist(), LISTED) == table[values].tolist()


@pytest.mark.parametrize("task", [PLAIN, LISTED])
def test_voxels_that_a_data_set_leaves_unlabeled_are_ignored(task):
    names = {"background": (0,), "liver": (5,), "kidney": (2, 3), "ignore": (7,)}
    assert mapped([0, 5, 2, 7], task, names) == [0, 1, 2, IGNORED]
    listed = Task(classes=CLASSES, labels={"liver": 5, "kidney": [2, 3], "ignore": 9})
    assert mapped([0, 9, 7], listed) == [0, IGNORED, 0]
    own = Task(classes=CLASSES, labels={"liver": 5, "kidney": [2, 3, 7]})  # the user decides what they are
    assert mapped([0, 5, 7], own, {"ignore": (7,)}) == [0, 1, 2]


@pytest.mark.parametrize(("own", "other"), [(1, 255), (255, 1)])
def test_masks_of_another_scale_are_refused(own, other):
    task = Task(classes=("background", "organ"), labels={"organ": own})
    assert mapped([0, own], task) == [0, 1]
    with pytest.raises(InputError, match=rf"labels\.nii\.gz is a mask of 0 and {other}, .* has id {own}"):
        mapped([0, other], task)
    with pytest.raises(InputError, match=f"mask of 0 and {other}"):
        mapped([0, other], Task(classes=("background", "organ")), {"organ": (own,)})


def test_labels_that_become_background_as_a_whole_warn():
    with pytest.warns(UserWarning, match=r"labels.nii.gz: all of it is background.*: 9, 117"):
        assert mapped([0, 9, 117], LISTED) == [0, 0, 0]


def test_background_of_a_label_that_lacks_classes_may_be_these() -> None:
    cases = [{"id": "a"}, {"id": "b", "unlabeled": ["kidney"]}, {"id": "c", "unlabeled": ["kidney", "liver"]}]
    gaps = partial_labels(cases, PLAIN)
    assert gaps is not None
    assert gaps.sets == ((1, 2), (2,))
    table = gaps.possible()
    assert table[:3].equal(torch.eye(3, dtype=torch.bool))
    assert table[OPEN : OPEN + 2].tolist() == [[True, True, True], [True, False, True]]
    assert table[IGNORED].all() and not table[3:OPEN].any()
    transform = MapLabelsd("label", PLAIN, None, gaps)
    found = [
        transform(case | {"label": MetaTensor(torch.tensor([[[[0, 1, 2]]]]))})["label"].flatten().tolist()
        for case in cases
    ]
    assert found == [[0, 1, 2], [OPEN + 1, 1, 2], [OPEN, 1, 2]]
    assert partial_labels([{"id": "a"}], PLAIN, DATASET) is None


def test_classes_that_no_case_labels() -> None:
    task = Task(classes=CLASSES, labels={"liver": [], "kidney": 2})
    gaps = partial_labels([{}], task)
    assert gaps is not None and gaps.everywhere == ("liver",) and gaps.sets == ((1,),)
    del (names := dict(DATASET))["liver"]
    gaps = partial_labels([{}], PLAIN, names, known=("background", "liver"))
    assert gaps is not None and gaps.everywhere == ("liver",)
    assert MapLabelsd("label", PLAIN, names, gaps).map.ids[2] == 2
    assert partial_labels([{}], PLAIN, names) is None  # such a data set is refused where no model knows the class


def test_an_unknown_unlabeled_class_is_refused() -> None:
    with pytest.raises(InputError, match="case 'a': unlabeled names 'kidneys'; did you mean 'kidney'"):
        partial_labels([{"id": "a", "unlabeled": ["kidneys"]}], PLAIN)
    with pytest.raises(InputError, match="its case lacks classes"):
        MapLabelsd("label", PLAIN)({"label": MetaTensor(torch.zeros(1, 1, 1, 1)), "unlabeled": ["kidney"]})


def segmentation(path: Path, names: Sequence[str]) -> Path:
    """A segmentation as 3D Slicer writes it: id k + 1 is `names[k]`."""
    image = sitk.GetImageFromArray(np.arange(len(names) + 1, dtype=np.uint8).reshape(1, 1, -1))
    for k, name in enumerate(names):
        image.SetMetaData(f"Segment{k}_Name", name)
        image.SetMetaData(f"Segment{k}_LabelValue", str(k + 1))
    sitk.WriteImage(image, str(path))
    return path


def test_names_of_segments_that_contradict_the_task_are_refused(tmp_path: Path) -> None:
    task = Task(classes=("background", "liver", "spleen"), labels={"liver": (1,), "spleen": (2,)})
    for names, fits in ((("liver", "spleen"), True), (("spleen", "liver"), False), (("Leber", "Milz"), True)):
        path = segmentation(tmp_path / "a.seg.nrrd", names)
        assert segment_names(path) == {1: names[0], 2: names[1]}
        label = MetaTensor(torch.arange(3).reshape(1, 3, 1, 1), meta={"filename_or_obj": str(path)})
        mapping = MapLabelsd("label", task)
        if fits:
            assert mapping({"label": label})["label"].flatten().tolist() == [0, 1, 2]
        else:
            with pytest.raises(
                InputError, match=r"states that id 1 is 'spleen', but task .* says it is that of 'liver'"
            ):
                mapping({"label": label})


# ---------------------------------------------------------------------------------------- labels of another data set


MODEL = Task(classes=("background", "liver", "spleen", "aorta"), labels={"liver": (), "spleen": (2,), "aorta": (3,)})


@pytest.mark.parametrize(
    ("named", "labels"),
    [
        ({"liver": (1,), "spleen": (2,), "aorta": (3,)}, {"liver": (1,), "spleen": (2,), "aorta": (3,)}),
        ({"liver": (5,), "spleen": (6,)}, {"liver": (5,), "spleen": (6,), "aorta": ()}),
        ({"liver": (1,), "vessels": (3,)}, {"liver": (1,), "spleen": (), "aorta": (3,)}),  # aorta by its id, see below
        ({"spleen": (3,)}, {"liver": (), "spleen": (3,), "aorta": ()}),  # not spleen for aorta
        (None, dict(MODEL.labels or {})),
    ],
)
def test_names_of_another_data_set_win_over_ids(named: Any, labels: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert relabeled(MODEL, named).labels == labels
    told = ["the data set has no class 'aorta': its ids 3 (vessels) are taken for it"]
    assert [str(one.message) for one in caught] == (told if "vessels" in (named or {}) else [])


def test_a_data_set_of_other_structures_is_refused() -> None:
    with pytest.raises(InputError, match="names 'heart', none of which is a class of task"):
        relabeled(MODEL, {"heart": (7,)})
