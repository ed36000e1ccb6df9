# SPDX-License-Identifier: Apache-2.0
"""Files complete or not at all."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from samda.errors import InputError
from samda.io import check_room, csv_text, new_folder, plain, replacing, save_tensors, write_json


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "scan.nii.gz"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.name.endswith(".nii.gz"), "writers choose a format by the suffix"
        raise KeyboardInterrupt
    assert path.read_text("utf-8") == "old"
    assert [file.name for file in path.parent.iterdir()] == ["scan.nii.gz"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, name in ((ended.pid, "a.zip"), (ended.pid, "b.zip"), (os.getpid(), "a.zip")):
        left = tmp_path / f".{pid}-0123abcd-{name}"
        left.touch()
        os.utime(left, (0, 0))
    with replacing(tmp_path / "a.zip") as temporary:
        temporary.write_text("new")
    kept = {f".{ended.pid}-0123abcd-b.zip", f".{os.getpid()}-0123abcd-a.zip", "a.zip"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as place:
        (place / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty one is no obstacle
    with new_folder(tmp_path / "out") as place:
        assert place.parent == tmp_path and place.name.startswith(".")
        (place / "file").write_text("whole")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/file"]
    with pytest.raises(OSError), new_folder(tmp_path / "out"):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/file"]


def test_json_holds_plain_values_only(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {1: (np.float32(0.5), np.nan, Path("x")), "b": np.arange(2)})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"1": [0.5, None, "x"], "b": [0, 1]}
    assert plain(float("inf")) is None


def test_an_error_of_the_disk_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    for told in ((), ("temporary",)):
        with pytest.raises(OSError) as caught, replacing(tmp_path / "a.json") as temporary:
            raise OSError(errno.ENOSPC, "No space left on device", *[str(temporary) for _ in told])
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "a.json"):
        (tmp_path / "other").read_text("utf-8")
    with pytest.raises(ValueError, match="no disk"), replacing(tmp_path / "a.json"):
        raise ValueError("no disk")


def test_room_is_asked_for(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(InputError, match=r"MB left where 1000000000000 MB are needed; make room"):
        check_room(tmp_path, 1e18)


def test_equal_tensors_are_equal_bytes_under_any_name(tmp_path: Path) -> None:
    for name in ("model.pt", ".12-0123abcd-model.pt"):
        save_tensors({"weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / name)
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / ".12-0123abcd-model.pt").read_bytes()
    assert torch.load(tmp_path / "model.pt")["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("text", ["=1+2", "+cmd", "-x", "@SUM(A1)", "\tx", " =1", "\uff1d1", '-1+cmd|" /C calc"!A0'])
def test_a_text_is_no_formula_in_a_table(text: str) -> None:
    rows = list(csv.reader(csv_text([["case", "dice"], [text, -0.5]]).splitlines(keepends=True)))
    assert rows == [["case", "dice"], ["'" + text, "-0.5"]]


def test_a_text_is_no_row_of_its_own_in_a_table() -> None:
    assert csv_text([["a\r=1", "b\n=2", "\x1b[2J"]]) == 'a\\r=1,"b\n=2",\\x1b[2J\n'


def test_numbers_stay_numbers_in_a_table() -> None:
    assert csv_text([[-1, 2.5, -1e-9, "-3", "+2.5", "1e-3", "-2e5"]]) == "-1,2.5,-1e-09,-3,+2.5,1e-3,-2e5\n"


def test_names_that_are_no_text_are_written_out(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"case": "a\udcff"})  # how Python reads a file name in Latin-1
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"case": "a\udcff"}
