# SPDX-License-Identifier: Apache-2.0
"""Progress bars on terminals, from the main process, and not with `--quiet`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from samda.processes import is_main

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


def bar(what: str, total: float, unit: str, initial: float = 0, **settings: Any) -> tqdm:
    """A progress bar of tqdm on standard error; nothing is shown if that is not a terminal."""
    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        initial=initial,
        leave=False,
        dynamic_ncols=True,
        disable=True if _quiet or _outer or not is_main() else None,  # None: only on terminals
        **settings,
    )


def line(text: str) -> None:
    """Write a line to standard error above the progress bar, if there is one."""
    tqdm.write(text, file=sys.stderr)


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
