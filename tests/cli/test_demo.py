# SPDX-License-Identifier: Apache-2.0
"""The demo from nothing to report, with a single epoch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samda.cli import main as cli
from samda.cli.demo import hold_out, new_folder, ranges
from samda.errors import UsageError
from samda.examples import fetch_examples


def test_ranges() -> None:
    assert ranges([]) == []
    assert ranges([2, 3, 4, 7, 9, 10]) == [(2, 5), (7, 8), (9, 11)]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    assert new_folder(tmp_path / "new").is_dir()
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="choose an empty folder"):
        new_folder(tmp_path)


def test_no_slice_is_used_twice(tmp_path: Path) -> None:
    scan = fetch_examples()["A"]
    cases = json.loads(hold_out(scan, tmp_path).read_text("utf-8"))
    volume = np.asarray(nib.load(scan.image).dataobj)
    label = np.asarray(nib.load(scan.label).dataobj)
    used = [
        i for key in ("training", "validation") for first, end in cases[key][0]["slices"] for i in range(first, end)
    ]
    blocks = [tuple(map(int, case["id"].split("_")[1:])) for case in cases["test"]]
    tested = [i for first, end in blocks for i in range(first, end)]
    assert sorted(used + tested) == list(range(112))
    for (first, end), case in zip(blocks, cases["test"], strict=True):
        block = nib.load(tmp_path / case["image"])
        assert np.array_equal(np.asarray(block.dataobj), volume[:, :, first:end])
        corner = nib.affines.apply_affine(nib.load(scan.image).affine, [0, 0, first])
        assert np.allclose(block.affine[:3, 3], corner)
    organs = {i for ids in scan.task.labels.values() for i in ids}
    for part in (tested, [i for first, end in cases["validation"][0]["slices"] for i in range(first, end)]):
        assert organs <= set(np.unique(label[:, :, part]))  # every organ is seen in every part


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "demo"
    assert cli.main(["demo", "-o", str(output), "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert str(output / "report.html") in printed
    assert re.search(r"total time \d+ s", printed)
    metrics = json.loads((output / "metrics.json").read_text("utf-8"))
    held, other, mr = metrics["scores"].values()
    blocks = [case["id"] for case in json.loads((output / "data" / "dataset.json").read_text("utf-8"))["test"]]
    assert list(held["cases"]) == blocks
    assert list(other["cases"]) == ["B"]
    assert held["failed"] == other["failed"] == mr["failed"] == {}
    assert [list(score["cases"]) for score in metrics["adapted"].values()] == [["B"], ["M"]]
    for name, score in zip("BM", metrics["adapted"].values(), strict=True):
        decided = json.loads((output / "adapted" / name / "run.jsonl").read_text("utf-8"))
        assert decided["reason"] == score["reason"]
    for block in blocks:
        found = nib.load(output / "predictions" / f"{block}.nii.gz")
        scan = nib.load(output / "data" / f"{block}_image.nii.gz")
        assert found.shape == scan.shape
        assert np.array_equal(found.affine, scan.affine)
    assert nib.load(output / "predictions" / "B.nii.gz").shape == (512, 512, 20)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert (
        page.count("<figure>") == 3 * (len(blocks) + 2) + 1
    )  # three slices of each block, of B and of M, and the curves
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "not expert annotations" in page
    assert "Research use only" in page
