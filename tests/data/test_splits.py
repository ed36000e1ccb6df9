# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from volumes import AFFINES, save

from samda.data.splits import split
from samda.errors import UsageError
from samda.task import Task

TASK = Task()


def cases(count: int, scans: int = 1) -> list[dict]:
    return [{"id": f"p{i}s{s}", "patient": f"p{i}", "image": "x"} for i in range(count) for s in range(scans)]


def patients(part) -> set[str]:
    return {case["patient"] for case in part}


@pytest.mark.parametrize(("count", "fraction", "expected"), [(10, 0.2, 2), (10, 0.25, 2), (4, 0.2, 1), (2, 0.2, 1)])
def test_fraction_of_patients(count, fraction, expected):
    result = split(cases(count, scans=3), TASK, fraction)
    assert len(patients(result.validation)) == expected
    assert len(result.validation) == 3 * expected
    assert not patients(result.training) & patients(result.validation)
    assert len(result.training) + len(result.validation) == 3 * count
    assert f"{expected} of {count} patients" in result.note


def test_seed_decides_and_order_of_cases_stays():
    first, again, other = (split(cases(12), TASK, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.validation != other.validation
    assert [case["id"] for case in first.training] == sorted(
        (case["id"] for case in first.training), key=lambda name: int(name[1:-2])
    )


def test_folds_by_seed_part_the_patients():
    parts = [patients(split(cases(11, 2), TASK, 0.2, fold).validation) for fold in range(5)]
    assert sorted(len(part) for part in parts) == [2, 2, 2, 2, 3]
    assert len(set().union(*parts)) == 11


def test_patient_0_is_a_patient():
    numbered = [{"id": f"s{i}", "patient": i // 2, "image": "x"} for i in range(4)]
    for seed in range(4):
        result = split(numbered, TASK, 0.5, seed=seed)
        assert not patients(result.training) & patients(result.validation) and "1 of 2 patients" in result.note


def test_stated_folds():
    listed = [case | {"fold": i % 3} for i, case in enumerate(cases(6))]
    result = split(listed, TASK, fold=1)
    assert [case["id"] for case in result.validation] == ["p1s0", "p4s0"]
    with pytest.raises(UsageError, match="fold 5; choose from 0, 1, 2"):
        split(listed, TASK, fold=5)


def test_stated_folds_that_tear_a_patient():
    listed = [case | {"fold": i % 2} for i, case in enumerate(cases(3, scans=2))]
    with pytest.raises(UsageError, match="'p0s0' is in another fold"):
        split(listed, TASK, fold=1)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", ["ras", "permuted"])
def test_single_patient_is_parted_by_blocks_of_slices(tmp_path, axis, name):
    path = save(tmp_path / "a.nii", np.zeros((21, 34, 43), np.int16), AFFINES[name])
    # "permuted": file axes run along y, z and x of RAS
    sizes = {"ras": (21, 34, 43), "permuted": (43, 21, 34)}[name]
    count = sizes[("sagittal", "coronal", "axial").index(axis)]
    result = split([{"id": "a", "image": path, "label": path}], Task(axis=axis), 0.2, fold=1)
    (training,), (validation,) = result.training, result.validation
    # ten blocks; the second and the seventh validate
    edges = [round(count * i / 10) for i in range(11)]
    assert validation["slices"] == [(edges[1], edges[2]), (edges[6], edges[7])]
    assert training["slices"] == [(0, edges[1]), (edges[2], edges[6]), (edges[7], count)]
    assert "one patient only" in result.note
    assert axis in result.note


def test_all_folds_of_slices_together_are_the_scan(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((5, 6, 23), np.int16), AFFINES["ras"])
    case = {"id": "a", "image": path, "label": path}
    slices = [
        i for fold in range(5) for a, b in split([case], TASK, 0.2, fold).validation[0]["slices"] for i in range(a, b)
    ]
    assert sorted(slices) == list(range(23))
    assert split([case], TASK, seed=3) == split([case], TASK, seed=3)
    assert "slices" not in case


def test_slices_that_the_list_leaves_out_stay_out(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((5, 6, 40), np.int16), AFFINES["ras"])
    case = {"id": "a", "image": path, "label": path, "slices": [[3, 11], [20, 32]]}
    allowed = [*range(3, 11), *range(20, 32)]
    for fold in range(5):
        result = split([case], TASK, 0.2, fold)
        sides = [
            [i for first, end in side["slices"] for i in range(first, end)]
            for side in (result.training[0], result.validation[0])
        ]
        assert sorted(sides[0] + sides[1]) == allowed
        assert sides[1] == [allowed[i] for i in range(20) if i // 2 % 5 == fold]  # ten blocks of two slices


def test_two_scans_of_one_patient_are_one_patient(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((5, 6, 20), np.int16), AFFINES["ras"])
    result = split([{"id": i, "patient": "p", "image": path} for i in "ab"], TASK)
    assert [case["id"] for case in result.training] == [case["id"] for case in result.validation] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction must be above 0"),
        ({"fraction": 0.8}, "at most 0.5, got 0.8"),
        ({"fold": 5}, "fold 5 does not exist: a fraction of 0.2 makes folds 0 to 4"),
        ({"fold": -1}, "fold -1 does not exist"),
        ({"fold": 4}, "3 patients make folds 0 to 2"),
    ],
)
def test_impossible_splits(arguments, message):
    with pytest.raises(UsageError, match=message):
        split(cases(3), TASK, **arguments)


def test_nothing_to_split():
    with pytest.raises(UsageError, match="no labeled cases"):
        split([], TASK)


def test_all_cases_in_one_fold():
    with pytest.raises(UsageError, match="none is left"):
        split([case | {"fold": 0} for case in cases(3)], TASK, fold=0)


def test_too_few_slices_for_a_validation(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((5, 6, 1), np.int16), AFFINES["ras"])
    with pytest.raises(UsageError, match="1 slice leaves none"):
        split([{"id": "a", "image": path}], TASK, fold=1)
