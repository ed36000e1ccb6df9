# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from samda.errors import UsageError
from samda.processes import (
    Shard,
    broadcast,
    exchange,
    is_main,
    join,
    launched,
    leave,
    local_device,
    rank_and_world,
    read_part,
)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the third of four processes, the first on its machine."""
    values = {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_parts_are_the_whole_and_differ_by_one_case_at_most(count: int) -> None:
    cases = [f"case{i}" for i in range(7)]
    parts = [Shard(i, count).of(cases) for i in range(1, count + 1)]
    assert sorted(case for part in parts for case in part) == cases
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Shard(2, 3).of(cases) == ["case1", "case4"]


def test_a_part_is_read_from_text() -> None:
    assert read_part("2/8") == Shard(2, 8)
    assert str(Shard(2, 8)) == "2/8"
    assert read_part() is None


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", " 1/4"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="INDEX/COUNT"):
        read_part(text)


def test_torchrun_gives_every_process_its_part(torchrun: None) -> None:
    assert launched() == (2, 4)
    assert read_part() == Shard(3, 4)
    with pytest.raises(UsageError, match="part '1/2'"):
        read_part("1/2")


def test_variables_that_torchrun_did_not_set_mean_nothing(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launched() == (0, 1)
    assert read_part() is None
    for start in (local_device, lambda: join("cpu")):
        with pytest.raises(UsageError, match="start it with torchrun"):
            start()


def test_a_single_process_is_its_own_group() -> None:
    assert rank_and_world() == (0, 1) and is_main()
    assert exchange("a") == ["a"] and broadcast("b") == "b"
    leave()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo"), reason="without the GNU C library")
def test_freed_memory_is_used_again() -> None:
    """Blocks that the system maps one by one are returned when they are freed; the others are kept."""
    code = """
import ctypes, sys, torch
from samda.processes import keep_freed_memory
names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in names]
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Info
if sys.argv[1] == "keep":
    keep_freed_memory()
before = mallinfo()
blocks = [torch.ones(10_000_000, dtype=torch.uint8) for _ in range(16)]
mapped = mallinfo().hblks - before.hblks
del blocks
print(mapped, mallinfo().fordblks - before.fordblks >= 160_000_000)
"""
    found = {}
    for choice in ("keep", "return"):
        run = subprocess.run([sys.executable, "-c", code, choice], check=True, capture_output=True, text=True)
        found[choice] = run.stdout.split()
    assert found == {"keep": ["0", "True"], "return": ["16", "False"]}
