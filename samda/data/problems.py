# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set: one line each, with the case and the remedy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from samda.errors import InputError

__all__ = ["Problem", "Report", "refuse"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a data set.

    Attributes:
        kind: what, in a word or two, for programs: "missing", "grid", "label ids", ...
        text: one line that names the file, the value and the remedy.
        case: id of the case; empty where it concerns the data set as a whole.
        stops: would training stumble on it?
    """

    kind: str
    text: str
    case: str = ""
    stops: bool = True

    def line(self) -> str:
        """The line a person reads."""
        return f"case {self.case}: {self.text}" if self.case else self.text


Report = Callable[[Problem], None]  # takes a problem, and decides what becomes of it


def refuse(problem: Problem) -> None:
    """The report of those who want to go on with sound data only.

    Raises:
        InputError: training would stumble on the problem; the others are logged.
    """
    if problem.stops:
        raise InputError(problem.text)
    logger.warning("%s", problem.line())
