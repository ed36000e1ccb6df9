# SPDX-License-Identifier: Apache-2.0
"""Progress from one process, and not with `--quiet`: on a terminal a bar with the time left, elsewhere now and then a
line. And where the time of a job goes: :func:`phase`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from samda.errors import printable
from samda.processes import is_main

EVERY = 15.0  # seconds between lines

phases: dict[str, float] = {}  # name -> seconds in this process

_quiet = False
_outer: list[Cases] = []  # the bar of the current job, if any


def is_quiet() -> bool:
    """Are only warnings and errors shown?"""
    return _quiet


@contextlib.contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Disable bars within the block."""
    global _quiet
    before, _quiet = _quiet, on or _quiet
    try:
        yield
    finally:
        _quiet = before


@contextlib.contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Add the time of the block, or of the decorated function, to `seconds[name]`, also if it fails; None adds to
    :data:`phases`. The time of an inner phase does not count for the outer one. Work on a GPU counts where it is
    waited for.
    """
    seconds = phases if seconds is None else seconds
    begin, before = time.perf_counter(), sum(seconds.values())
    try:
        yield
    finally:
        own = time.perf_counter() - begin - (sum(seconds.values()) - before)
        seconds[name] = seconds.get(name, 0.0) + own


class _Bar(tqdm):
    """tqdm; where that shows nothing, a line every :data:`EVERY` seconds."""

    def __init__(self, shown: bool, **settings: Any) -> None:
        super().__init__(**settings, disable=None if shown else True)  # None: tqdm looks whether it is a terminal
        self._lines = shown and self.disable
        self._what = settings
        self._began = self._last = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more."""
        if not self._lines:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last = now
            what, total, unit = (self._what[key] for key in ("desc", "total", "unit"))
            units = unit if unit == "s" else f"{unit}s"
            line(f"{what}: {self.n:.0f} of {total:.0f} {units}, {now - self._began:.0f} s")
        return None


def bar(what: str, total: float, unit: str, initial: float = 0, **settings: Any) -> tqdm:
    """A progress bar of tqdm on standard error with count, rate and time left; lines where that is not a terminal."""
    shown = not (_quiet or _outer) and is_main()
    common = {"desc": what, "total": total, "unit": unit, "initial": initial, "leave": False, "dynamic_ncols": True}
    return _Bar(shown, **common, **settings)


def line(text: str) -> None:
    """Write a line to standard error above the progress bar, if there is one."""
    tqdm.write(printable(text), file=sys.stderr)


def share(of_case: float) -> None:
    """Report the finished share, in [0, 1], of the current case; ignored if no :class:`Cases` is open."""
    if _outer:
        _outer[-1].within(of_case)


class Cases:
    """One bar over the `total` cases of a job, updated within a case by :func:`share`.

    If `shown` is False, nothing is shown and bars within a case are not suppressed.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} cases [{elapsed}<{remaining}{postfix}]"
        self._shown, self._done = shown, 0  # cases
        with quiet(not shown):
            self._bar = bar(what, total, "case", bar_format=layout)

    def __enter__(self) -> Cases:
        if self._shown:
            _outer.append(self)  # suppresses bars within a case
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            _outer.remove(self)
        self._bar.close()

    def next(self) -> None:
        """Count a finished case."""
        self._done += 1
        self._move(self._done)

    def within(self, share: float) -> None:
        """Show the finished share of the current case; the bar never moves back."""
        self._move(max(self._bar.n, self._done + min(max(share, 0.0), 0.999)))

    def _move(self, to: float) -> None:
        self._bar.update(to - self._bar.n)
