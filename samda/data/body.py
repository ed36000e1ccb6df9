# SPDX-License-Identifier: Apache-2.0
"""Body detection: the largest component of a scan without air and table, on a coarse grid of about 4 mm."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from samda.task import Task

STEP = 4.0  # mm, of the coarse grid
BRIDGE = 8.0  # mm, radius of the opening, which removes thinner structures (table, tubes)
SKIN = -200.0  # HU, between air and fat
MR_SHARE = 0.15  # of the 99th percentile of the volume, between air and tissue


def coarse(volume: np.ndarray, spacing_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A view of a volume (X, Y, Z) with steps of about 4 mm, and its strides (3,)."""
    strides = np.maximum(1, STEP // np.asarray(spacing_mm, float)).astype(int)
    strides = np.minimum(strides, np.asarray(volume.shape))
    return volume[:: strides[0], :: strides[1], :: strides[2]], strides


def body_threshold(values: np.ndarray, task: Task, scaled: bool) -> float:
    """Intensity between air and body.

    CT: -200 HU, or its value in the window if intensities are `scaled` to [0, 1]. MR: 15 % of the 99th percentile of
    `values`, because MR intensities have no unit.
    """
    if task.modality == "MR":
        return MR_SHARE * float(np.percentile(values, 99))
    if not scaled:
        return SKIN
    low, high = task.window
    return float(np.clip((SKIN - low) / (high - low), 0.02, 0.98))  # a window may end above or begin below the skin


def body_mask(values: np.ndarray, spacing_mm: np.ndarray, threshold: float) -> np.ndarray:
    """The body, with lungs and bowel gas, as a mask of `values` (X, Y, Z) on the coarse grid, RAS.

    Threshold; fill holes in each axial plane; opening by a disc of 8 mm in the plane, which separates the table from
    the back; largest connected component. In the opening, voxels outside the volume are body, so a truncated body keeps
    its full extent. If nothing remains, everything is body.
    """
    mask = values > threshold
    mask = np.stack([ndimage.binary_fill_holes(mask[:, :, k]) for k in range(mask.shape[2])], axis=2)
    a, b = (int(BRIDGE // size) for size in spacing_mm[:2])
    x, y = np.ogrid[-a : a + 1, -b : b + 1]
    disc = ((x * spacing_mm[0]) ** 2 + (y * spacing_mm[1]) ** 2 <= BRIDGE**2)[:, :, None]  # axial
    opened = ndimage.binary_dilation(ndimage.binary_erosion(mask, disc, border_value=1), disc)
    parts, count = ndimage.label(opened & mask if opened.any() else mask)
    return parts == np.bincount(parts[parts > 0]).argmax() if count else np.ones(values.shape, bool)


def coarse_body(
    volume: np.ndarray, spacing_mm: np.ndarray, task: Task, scaled: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume (X, Y, Z), RAS, on the coarse grid, the body there, and the strides (3,); see the functions above."""
    values, strides = coarse(volume, spacing_mm)
    return values, body_mask(values, spacing_mm * strides, body_threshold(values, task, scaled)), strides


def body_box(volume: np.ndarray, spacing_mm: np.ndarray, task: Task) -> np.ndarray:
    """Bounding box of the body in a volume (X, Y, Z) in [0, 1], RAS; for a 2-D image, all of it.

    (3, 2): first voxel and end (exclusive) along X, Y, Z.
    """
    shape = np.asarray(volume.shape)
    if task.modality == "image":
        return np.stack([np.zeros(3, int), shape], axis=1)
    _, mask, strides = coarse_body(volume, np.asarray(spacing_mm), task, scaled=True)
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    # the body may end up to one step after its last voxel on the coarse grid
    return np.array([[s.start * n, min(s.stop * n, size)] for s, n, size in zip(found, strides, shape, strict=True)])
