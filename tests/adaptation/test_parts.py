# SPDX-License-Identifier: Apache-2.0
"""The cases of a folder done by several processes: each once, nothing lost, one report."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samda.adaptation.job import run_adaptation
from samda.errors import UsageError
from samda.models.versions import list_versions
from samda.processes import Shard
from tests.adaptation.conftest import ALWAYS

ROOT = str(Path(__file__).parents[2])
SETTINGS = {"method": "class_entropy", "lr": 0.02, "steps": 1, "views": 2, "slices": 2, "keep": "last", "guard": ALWAYS}
QUICK = ["--views", "2", "--slices", "2", "--steps", "1", "--device", "cpu"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


@pytest.fixture
def adapt(model: Path, scans: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(output: str, part: Shard | None = None, **options: Any) -> dict[str, Any]:
        options = {"settings": SETTINGS} | options
        return run_adaptation(model, scans / "images", tmp_path / output, part=part, **options)

    return run


def start(*command: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *map(str, command)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def decided(path: Path) -> list[dict[str, Any]]:
    """The records without what differs from run to run."""
    return [{k: v for k, v in r.items() if k not in ("time_start", "time_end", "seconds")} for r in lines(path)]


def names(folder: Path) -> list[str]:
    with (folder / "cases.csv").open() as file:
        return [row["case"] for row in csv.DictReader(file)]


def test_parts_one_after_the_other_are_the_whole(adapt: Callable, scans: Path, tmp_path: Path) -> None:
    whole = adapt("whole", labels=scans / "labels")
    second = adapt("parts", Shard(2, 2), labels=scans / "labels")
    assert second["page"] is None and second["dice"] is None and second["part"] == "2/2"
    assert list(second["cases"]) == names(tmp_path / "parts") == ["case1", "case3"]
    assert not (tmp_path / "parts" / "report.html").exists()
    first = adapt("parts", Shard(1, 2), labels=scans / "labels")
    assert list(first["cases"]) == ["case0", "case2"]  # answers for its own
    assert first["page"] == str(tmp_path / "parts" / "report.html") and first["dice"] == whole["dice"]
    assert names(tmp_path / "parts") == names(tmp_path / "whole") == [f"case{i}" for i in range(4)]
    assert decided(tmp_path / "parts" / "run.jsonl") == decided(tmp_path / "whole" / "run.jsonl")
    for i in range(4):
        file = f"case{i}.nii.gz"
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_part_that_comes_late_completes_the_lists(adapt: Callable, tmp_path: Path) -> None:
    for index in (1, 2, 3):
        adapt("parts", Shard(index, 3))
    shutil.rmtree(tmp_path / "parts" / "details" / "case1")
    for name in ("report.html", "run.jsonl"):
        (tmp_path / "parts" / name).unlink()
    again = adapt("parts", Shard(1, 3))
    assert again["resumed"] == ["case0", "case3"] and again["page"] is None
    assert len(lines(tmp_path / "parts" / "run.jsonl")) == 3
    assert adapt("parts", Shard(2, 3))["page"] is not None
    assert len(lines(tmp_path / "parts" / "run.jsonl")) == 4


def test_a_part_may_be_empty(adapt: Callable) -> None:
    result = adapt("parts", Shard(5, 6), settings={"steps": 0, "views": 1})
    assert result["cases"] == {} and result["page"] is None


def test_the_last_part_distills_the_site_version(adapt: Callable, model: Path) -> None:
    assert adapt("parts", Shard(1, 2), site="clinic-a")["site"] is None
    assert list_versions(model) == ["source"]
    about = adapt("parts", Shard(2, 2), site="clinic-a")["site"]
    assert len(about["cases"]) == 4 and list_versions(model) == ["source", "clinic-a"]


def test_a_part_does_not_overwrite(adapt: Callable, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part 1/2 cannot overwrite"):
        adapt("parts", Shard(1, 2), overwrite=True)
    assert not (tmp_path / "parts").exists()


def test_two_jobs_of_an_array_at_once(model: Path, scans: Path, tmp_path: Path) -> None:
    command = ["samda", "adapt", "-m", model, "-i", scans / "images", "-o", tmp_path / "out", *QUICK, "--json"]
    jobs = [start(*command, "--part", f"{i}/2") for i in (1, 2)]
    outputs = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    results = [json.loads(out) for out, _ in outputs]
    assert [list(result["cases"]) for result in results] == [["case0", "case2"], ["case1", "case3"]]
    assert names(tmp_path / "out") == [f"case{i}" for i in range(4)]
    assert len(lines(tmp_path / "out" / "run.jsonl")) == 4
    assert (tmp_path / "out" / "report.html").exists() and any(result["page"] for result in results)
    hidden = [path.name for path in (tmp_path / "out").rglob(".*")]
    assert hidden == [".samda"]


def test_torchrun_adapts_every_case_once_and_reports_once(model: Path, scans: Path, tmp_path: Path) -> None:
    command = ["samda", "adapt", "-m", model, "-i", scans / "images", "-o", tmp_path / "out", *QUICK, "--json"]
    job = start(*TORCHRUN, *command)
    out, err = job.communicate()
    assert job.returncode == 0, err
    result = json.loads(out)
    assert list(result["cases"]) == names(tmp_path / "out") == [f"case{i}" for i in range(4)]
    assert Path(result["page"]).exists()
    assert [err.count(f"case case{i}: ") for i in range(4)] == [1, 1, 1, 1]


def test_torchrun_predicts_every_case_once_and_a_bad_one_stops_nobody(model: Path, scans: Path, tmp_path: Path) -> None:
    shutil.copytree(scans / "images", tmp_path / "in")
    (tmp_path / "in" / "case1.nii.gz").write_bytes(b"no scan")  # the first of the second process
    command = ["samda", "predict", "-m", model, "-i", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu"]
    job = start(*TORCHRUN, *command, "--json")
    out, err = job.communicate()
    assert job.returncode == 1
    result = json.loads(out)
    assert sorted(result["done"]) == ["case0", "case2", "case3"] and list(result["failed"]) == ["case1"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"case{i}.nii.gz" for i in (0, 2, 3)]
    assert [err.count(f"case case{i}: done") for i in range(4)] == [1, 0, 1, 1]
    assert err.count("samda predict: 1 of 4 cases failed: case1") == 1
