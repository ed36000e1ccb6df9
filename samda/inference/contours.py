# SPDX-License-Identifier: Apache-2.0
"""Closed contours of a mask: the level 0.5 between pixels, holes joined to their outer contour by keyholes.

A keyhole is a channel of no width. DICOM asks for it in a CLOSED_PLANAR contour, and a program that unites the contours
of a slice reads it as well as one that combines them by XOR. Channels run between two rows of pixels and end where the
contours do, so every pixel center lies clearly inside or outside.
"""

from __future__ import annotations

import numpy as np
from skimage.measure import find_contours


def mask_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Contours (n, 2) of a mask (rows, columns), as row and column of their points; the first is not repeated.

    The center of every pixel of the mask lies inside one contour, that of every other pixel outside all. Pixels that
    touch at a corner are separate.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    cut = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.float32), 1)
    found = [line[:-1] for line in find_contours(cut, 0.5)]
    outer = [line for line in found if _area(line) < 0]
    holes = [line for line in found if _area(line) >= 0]
    for hole in sorted(holes, key=_start_column, reverse=True):
        _join(outer, hole)
    return [_straight(line) + np.array([top - 1, left - 1]) for line in outer]


def _area(line: np.ndarray) -> float:
    """Signed area; contours of the mask and of holes run in opposite directions."""
    following = np.roll(line, -1, axis=0)
    return float((line[:, 0] * following[:, 1] - line[:, 1] * following[:, 0]).sum()) / 2


def _between_rows(line: np.ndarray) -> np.ndarray:
    return line[:, 0] % 1 == 0.5


def _start_column(hole: np.ndarray) -> float:
    """Column where the channel of a hole begins: holes further right are joined first, so it ends at no open one."""
    return float(hole[_between_rows(hole), 1].max())


def _join(outer: list[np.ndarray], hole: np.ndarray) -> None:
    """Join a hole to the contour that is next on its right, between two rows of pixels."""
    candidates = np.where(_between_rows(hole), hole[:, 1], -np.inf)
    start = int(candidates.argmax())
    row, column = hole[start]
    best, place, after = np.inf, 0, 0
    for k, line in enumerate(outer):
        following = np.roll(line, -1, axis=0)
        crossing = (line[:, 0] - row) * (following[:, 0] - row) < 0  # halfway on a vertical line
        hit = (line[:, 0] == row) | crossing
        columns = np.where(hit & (line[:, 1] > column), line[:, 1], np.inf)
        nearest = int(columns.argmin())
        if columns[nearest] < best:
            best, place, after = columns[nearest], k, nearest
    line = outer[place]
    end = np.array([[row, best]])
    around = np.roll(hole, -start, axis=0)
    outer[place] = np.concatenate([line[: after + 1], end, around, around[:1], end, line[after + 1 :]])


def _straight(line: np.ndarray) -> np.ndarray:
    """The contour without repeated points and points on straight lines."""
    line = line[(line != np.roll(line, 1, axis=0)).any(1)]
    before, behind = line - np.roll(line, 1, axis=0), np.roll(line, -1, axis=0) - line
    turns = before[:, 0] * behind[:, 1] != before[:, 1] * behind[:, 0]
    back = (before * behind).sum(1) < 0
    return line[turns | back]
