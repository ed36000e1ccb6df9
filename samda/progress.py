# SPDX-License-Identifier: Apache-2.0
"""Bars with the time left: on a terminal only, from one process, and only where nobody asked for quiet. In pipes and
files nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from samda.processes import is_main

_quiet = False
_outer: list[Cases] = []  # the bar of the whole job, while there is one


def is_quiet() -> bool:
    """Did somebody ask for no bars and no messages but warnings and errors?"""
    return _quiet


@contextlib.contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """No bars within the block."""
    global _quiet
    before, _quiet = _quiet, on or _quiet
    try:
        yield
    finally:
        _quiet = before


def bar(what: str, total: float, unit: str, initial: float = 0, **settings: Any) -> tqdm:
    """A bar on standard error with count, rate and time left; nothing at all where that is no terminal.

    Args:
        what: is done.
        total: how much of it.
        unit: of the total.
        initial: how much is done already.
        settings: further ones of tqdm.
    """
    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        initial=initial,
        leave=False,
        dynamic_ncols=True,
        disable=True if _quiet or _outer or not is_main() else None,  # None: tqdm looks whether it is a terminal
        **settings,
    )


def line(text: str) -> None:
    """Write a line to standard error without tearing the bar that may stand there."""
    tqdm.write(text, file=sys.stderr)


def share(of_case: float) -> None:
    """Say how much of the present case is done, in [0, 1]; nothing happens where no :class:`Cases` is open."""
    if _outer:
        _outer[-1].within(of_case)


class Cases:
    """One bar over the cases of a job, which moves within a case, too.

    Args:
        what: is done with them.
        total: number of cases.
        shown: False shows nothing, and leaves bars within a case to themselves.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} cases [{elapsed}<{remaining}{postfix}]"
        self._shown, self._done = shown, 0  # cases
        with quiet(not shown):
            self._bar = bar(what, total, "case", bar_format=layout)

    def __enter__(self) -> Cases:
        if self._shown:
            _outer.append(self)  # bars within a case stay silent: one at a time
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            _outer.remove(self)
        self._bar.close()

    def next(self) -> None:
        """A case is finished."""
        self._done += 1
        self._move(self._done)

    def within(self, share: float) -> None:
        """This share of the present case is done; it never goes back."""
        self._move(max(self._bar.n, self._done + min(max(share, 0.0), 0.999)))

    def _move(self, to: float) -> None:
        self._bar.update(to - self._bar.n)
