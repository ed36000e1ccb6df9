# SPDX-License-Identifier: Apache-2.0
"""Bars: on a terminal one at a time and with the time left, in a pipe or with --quiet not a byte."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from samda.progress import Cases, bar, is_quiet, quiet

CODE = """
import sys, time
from samda.progress import Cases, bar, line, quiet, share
with quiet("quiet" in sys.argv):
    with Cases("predicting", 2) as cases:
        for _ in range(2):
            inner = bar("segmenting", 4, "slice")
            for i in range(4):
                time.sleep(0.12)
                inner.update()
                share((i + 1) / 4)
            inner.close()
            line("case done")
            cases.next()
"""


def on_terminal(*args: str) -> str:
    """What the program writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.Popen([sys.executable, "-c", CODE, *args], stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert done.wait() == 0
    return b"".join(parts).decode()


def test_a_terminal_shows_one_bar_that_moves_within_a_case() -> None:
    text = on_terminal()
    assert "predicting:" in text and "segmenting" not in text
    assert "/2 cases [" in text and "<00:0" in text, "count and time left"
    shares = [float(part.split("| ")[-1].split("/")[0]) for part in text.split("\r") if "cases [" in part]
    assert shares == sorted(shares) and any(share % 1 > 0 for share in shares)
    assert text.count("case done") == 2


def test_a_pipe_and_quiet_show_nothing_but_lines() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, encoding="utf-8", check=True)
    assert done.stderr == "case done\ncase done\n"
    assert on_terminal("quiet") == "case done\r\ncase done\r\n"


def test_quiet_ends_with_its_block() -> None:
    assert not is_quiet()
    with quiet(), quiet(False):
        assert is_quiet() and bar("x", 3, "slice").disable
    assert not is_quiet()


def test_cases_that_are_not_shown_leave_inner_bars_alone(capsys: pytest.CaptureFixture) -> None:
    with Cases("x", 2, shown=False) as cases:
        cases.within(0.5)
        cases.next()
    assert capsys.readouterr().err == ""


def test_no_module_draws_bars_of_its_own() -> None:
    package = Path(__file__).parent.parent / "samda"
    users = [path.name for path in package.rglob("*.py") if "tqdm" in path.read_text(encoding="utf-8")]
    assert users == ["progress.py"]


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("samda.progress.time.monotonic", lambda: now[0])
    slow = bar("encoding", 10, "slice")
    for _ in range(10):
        now[0] += 6
        slow.update()
    slow.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "encoding: 3 of 10 slices, 18 s",
        "encoding: 6 of 10 slices, 36 s",
        "encoding: 9 of 10 slices, 54 s",
    ]
