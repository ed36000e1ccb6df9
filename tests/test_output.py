# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samda.errors import UsageError
from samda.io import new_folder, replacing, write_text
from samda.output import open_output
from samda.processes import Shard

OTHER = """
import sys, time
from samda.output import open_output
from samda.processes import Shard
part = Shard(*map(int, sys.argv[2].split("/"))) if len(sys.argv) > 2 else None
with open_output(sys.argv[1], part=part):
    print("open", flush=True)
    sys.stdin.read()
"""


def other(folder: Path, *part: str) -> subprocess.Popen:
    """Another process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder), *part],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def test_own_files_are_replaced_and_foreign_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("theirs")
    with open_output(tmp_path):
        write_text(tmp_path / "a.txt", "1")
        write_text(tmp_path / "a.txt", "2")
        with pytest.raises(UsageError, match=r"b\.txt"):
            write_text(tmp_path / "b.txt", "ours")
    with open_output(tmp_path, ["a.txt", "c.txt"]):  # a later command
        write_text(tmp_path / "a.txt", "3")
    (tmp_path / "a.txt").write_text("edited by hand")
    with pytest.raises(UsageError, match=r"did not write.*: a\.txt, b\.txt; choose another"):
        open_output(tmp_path, ["a.txt", "b.txt", "c.txt"])
    assert [(tmp_path / name).read_text("utf-8") for name in ("a.txt", "b.txt")] == ["edited by hand", "theirs"]


def test_a_refused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("theirs")
    with pytest.raises(UsageError):
        open_output(tmp_path, ["b.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("kind", ["folder", "link", "broken link"])
def test_what_is_no_file_is_foreign(tmp_path: Path, kind: str) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("theirs")
    out = tmp_path / "out"
    out.mkdir()
    if kind == "folder":
        (tmp_path / "theirs").rename(out / "a.txt")
    else:
        (out / "a.txt").symlink_to(tmp_path / "theirs" / ("x" if kind == "link" else "gone"))
    with open_output(out), pytest.raises(UsageError, match=r"a\.txt"):
        write_text(out / "a.txt", "ours")


@pytest.mark.parametrize("name", [".samda", ".samda/manifest.jsonl", ".samda/lock", ".samda/part-1-of-2.lock"])
@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "folder or file"])
def test_nothing_is_written_through_what_lies_in_the_hidden_folder(tmp_path: Path, name: str, kind: str) -> None:
    theirs, path = tmp_path / "theirs", tmp_path / "out" / name
    theirs.write_text("theirs")
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder or file":
        path.write_text("theirs") if name == ".samda" else path.mkdir()
    else:
        path.symlink_to(theirs if kind == "link" else tmp_path / "gone")
    with pytest.raises(UsageError, match=r"\.samda.* was not made by samda"):
        open_output(tmp_path / "out")
    assert theirs.read_text("utf-8") == "theirs" and not (tmp_path / "gone").exists()


def test_files_behind_a_linked_folder_are_foreign(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.txt").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "details").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"did not write.*: details/a\.txt;"):
        open_output(tmp_path / "out", ["details/a.txt"])


@pytest.mark.parametrize("line", ["[" * 200_000, '{"file": [1], "sha256": {}}', "7", "null", '{"file": "a.txt"'])
def test_damaged_lines_of_the_manifest_are_passed_over(tmp_path: Path, line: str) -> None:
    with open_output(tmp_path):
        write_text(tmp_path / "a.txt", "1")
    with (tmp_path / ".samda" / "manifest.jsonl").open("a") as file:
        file.write(f"\n{line}")
    with open_output(tmp_path):
        write_text(tmp_path / "a.txt", "2")
    assert (tmp_path / "a.txt").read_text("utf-8") == "2"


def test_a_folder_with_a_foreign_file_is_not_replaced(tmp_path: Path) -> None:
    with open_output(tmp_path):
        for text in ("1", "2"):
            with new_folder(tmp_path / "case", overwrite=True) as place:
                (place / "x").write_text(text)
        assert (tmp_path / "case" / "x").read_text("utf-8") == "2"
        (tmp_path / "case" / "notes").write_text("theirs")
        with pytest.raises(UsageError, match="case"), new_folder(tmp_path / "case", overwrite=True):
            pass
    assert (tmp_path / "case" / "notes").read_text("utf-8") == "theirs"


def test_a_kill_before_the_renaming_leaves_the_old_file_own(tmp_path: Path) -> None:
    with open_output(tmp_path) as output:
        write_text(tmp_path / "a.txt", "old")
        (tmp_path / "new").write_text("new")
        output.note(tmp_path / "a.txt", tmp_path / "new")
        with (tmp_path / ".samda" / "manifest.jsonl").open("a") as file:
            file.write('\n{"file": "a.t')  # cut short
    with open_output(tmp_path, ["a.txt"]):
        write_text(tmp_path / "a.txt", "newest")
    lines = (tmp_path / ".samda" / "manifest.jsonl").read_text("utf-8").splitlines()
    assert sum("a.txt" in line for line in lines) >= 1
    assert (tmp_path / "a.txt").read_text("utf-8") == "newest"


def test_the_manifest_keeps_one_line_per_file(tmp_path: Path) -> None:
    with open_output(tmp_path):
        for number in range(5):
            write_text(tmp_path / "curve.json", str(number))
    (line,) = (tmp_path / ".samda" / "manifest.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["file"] == "curve.json"


def test_a_second_command_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = other(tmp_path)
    for part in (None, Shard(1, 2)):
        with pytest.raises(UsageError, match="already in use"):
            open_output(tmp_path, part=part)
    first.kill()
    first.wait()
    open_output(tmp_path).close()


def test_parts_share_a_folder_but_not_with_themselves_or_with_the_whole(tmp_path: Path) -> None:
    first = other(tmp_path, "1/2")
    for part in (None, Shard(1, 2)):
        with pytest.raises(UsageError, match="already in use"):
            open_output(tmp_path, part=part)
    (tmp_path / ".7-0123abcd-x").write_text("")  # being written by part 1
    with open_output(tmp_path, part=Shard(2, 2)):
        assert (tmp_path / ".7-0123abcd-x").exists()
    first.communicate("")
    open_output(tmp_path).close()
    assert not (tmp_path / ".7-0123abcd-x").exists()


def test_litter_of_killed_commands_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "details").mkdir()
    for place in (tmp_path, tmp_path / "details"):
        (place / ".4711-0a1b2c3d-case").mkdir()
        (place / ".4711-0a1b2c3d-case" / "x").write_text("half")
        (place / ".4711-0a1b2c3d-a.nii.gz").write_text("half")
        for name in (".hidden", ".4711-case", "4711-0a1b2c3d-x"):
            (place / name).write_text("theirs")
    open_output(tmp_path).close()
    for place in (tmp_path, tmp_path / "details"):
        assert {path.name for path in place.iterdir()} - {".samda", "details"} == {
            ".hidden",
            ".4711-case",
            "4711-0a1b2c3d-x",
        }


def test_the_mode_of_a_file_is_that_of_the_umask_whatever_its_writer_does(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
