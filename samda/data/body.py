# SPDX-License-Identifier: Apache-2.0
"""Where the body is: the largest thing in the scan that is neither air nor table.

The search runs on a coarse grid of about 4 mm, so it costs little however large the scan is.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from samda.task import Task

STEP = 4.0  # mm, of the coarse grid
BRIDGE = 8.0  # mm, radius of the opening: thinner things (table, tubes) are not body
SKIN = -200.0  # HU, between air and fat
MR_SHARE = 0.15  # of the 99th percentile of the volume, between air and tissue


def coarse(volume: np.ndarray, spacing_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A view of a volume (X, Y, Z) with steps of about 4 mm, and its strides (3,)."""
    strides = np.maximum(1, STEP // np.asarray(spacing_mm, float)).astype(int)
    strides = np.minimum(strides, np.asarray(volume.shape))
    return volume[:: strides[0], :: strides[1], :: strides[2]], strides


def body_threshold(values: np.ndarray, task: Task, scaled: bool) -> float:
    """Intensity between air and body.

    CT: -200 HU, or its place in the window where intensities are `scaled` to [0, 1]. MR: 15 % of the 99th percentile of
    `values`, as MR has no unit.
    """
    if task.modality == "MR":
        return MR_SHARE * float(np.percentile(values, 99))
    if not scaled:
        return SKIN
    low, high = task.window
    return float(np.clip((SKIN - low) / (high - low), 0.02, 0.98))  # a window may end above or begin below the skin


def body_mask(values: np.ndarray, spacing_mm: np.ndarray, threshold: float) -> np.ndarray:
    """The body with everything inside it, lungs and bowel gas included.

    Above the threshold; filled in each axial plane; opened there by a disc of 8 mm, which separates the table from the
    back; the largest connected component. Voxels beyond the border count as body in the opening, so a body that the
    scan cuts keeps its full extent. Where nothing remains, everything counts as body.

    Args:
        values: (X, Y, Z) on the coarse grid, in RAS order, as is the mask.
        spacing_mm: (3,) of that grid.
        threshold: intensity between air and body.
    """
    mask = values > threshold
    mask = np.stack([ndimage.binary_fill_holes(mask[:, :, k]) for k in range(mask.shape[2])], axis=2)
    disc = _disc(spacing_mm)
    opened = ndimage.binary_dilation(ndimage.binary_erosion(mask, disc, border_value=1), disc)
    parts, count = ndimage.label(opened & mask if opened.any() else mask)
    if count == 0:
        return np.ones(values.shape, bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def body_box(volume: np.ndarray, spacing_mm: np.ndarray, task: Task) -> np.ndarray:
    """Bounding box of the body in a volume (X, Y, Z) in [0, 1], RAS; of a picture, all of it.

    (3, 2) first voxel and end (exclusive) along X, Y, Z.
    """
    shape = np.asarray(volume.shape)
    if task.modality == "image":
        return np.stack([np.zeros(3, int), shape], axis=1)
    values, strides = coarse(volume, spacing_mm)
    mask = body_mask(values, np.asarray(spacing_mm) * strides, body_threshold(values, task, scaled=True))
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    # the coarse grid misses up to one step after its last body voxel
    return np.array([[s.start * n, min(s.stop * n, size)] for s, n, size in zip(found, strides, shape, strict=True)])


def _disc(spacing_mm: np.ndarray) -> np.ndarray:
    """An axial disc of radius `BRIDGE` as a (2a + 1, 2b + 1, 1) footprint."""
    reach = [int(BRIDGE // size) for size in spacing_mm[:2]]
    x, y = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    return ((x * spacing_mm[0]) ** 2 + (y * spacing_mm[1]) ** 2 <= BRIDGE**2)[:, :, None]
