# SPDX-License-Identifier: Apache-2.0
"""How wide the structures of a label map are: what decides how fine the slices must be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

SLICES = 24  # of each structure that are measured, evenly spread
LARGEST = 2048  # pixels: of a larger structure, the middle of its box is measured
ANISOTROPIC = 1.5  # times the middle voxel side: how long the side across the slices is at least


def structure_widths(label: np.ndarray, sides_mm: Sequence[float], ids: Iterable[int]) -> dict[int, float]:
    """Width (mm) of each structure in the slices of a label map: of vessels the caliber, of an organ its narrow side.

    A place on the ridge of the distance transform is the center of the largest disc around it. The width is the median
    of the discs' diameters, weighted by their areas, so that small ends and frayed borders do not count.

    Args:
        label: (X, Y, Z) ids, in RAS order.
        sides_mm: (3,) voxel sides.
        ids: every id that the label map holds; those above 0 are measured.
    """
    across = slice_axis(sides_mm)
    plane_sides = [float(side) for axis, side in enumerate(sides_mm) if axis != across]
    planes = np.moveaxis(label, across, 0)
    every = np.array(sorted(ids))
    found: dict[int, list[tuple[int, tuple[slice, slice]]]] = defaultdict(list)
    for number, plane in enumerate(planes):
        boxes = ndimage.find_objects(np.searchsorted(every, plane) + 1)
        for k, box in enumerate(boxes):
            if box is not None and every[k] > 0:
                found[int(every[k])].append((number, box))
    widths = {}
    for k, places in found.items():
        chosen = np.unique(np.linspace(0, len(places) - 1, SLICES).round().astype(int))
        discs = [_discs(planes[places[i][0]][_middle(places[i][1])] == k, plane_sides) for i in chosen]
        widths[k] = _weighted_median(np.concatenate(discs))
    return widths


def slice_axis(sides_mm: Sequence[float]) -> int:
    """The RAS axis along which a scan is clearly coarsest, else the third."""
    coarsest = int(np.argmax(sides_mm))
    return coarsest if sides_mm[coarsest] > ANISOTROPIC * float(np.median(sides_mm)) else 2


def _middle(box: tuple[slice, slice]) -> tuple[slice, ...]:
    """At most `LARGEST` pixels of a box in each direction."""
    cut = [max(0, side.stop - side.start - LARGEST) for side in box]
    return tuple(slice(side.start + n // 2, side.stop - (n - n // 2)) for side, n in zip(box, cut, strict=True))


def _discs(mask: np.ndarray, sides_mm: Sequence[float]) -> np.ndarray:
    """Diameters (mm) of the largest discs in a mask, one for each pixel of the ridge."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=sides_mm)  # to the next center outside
    ridge = (distance > 0) & (distance == ndimage.maximum_filter(distance, 3))
    return np.asarray(2 * distance[ridge] - np.mean(sides_mm))


def _weighted_median(diameters: np.ndarray) -> float:
    diameters = np.sort(diameters)
    areas = np.cumsum(diameters**2)
    return float(diameters[np.searchsorted(areas, areas[-1] / 2)])
