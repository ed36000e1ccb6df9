# SPDX-License-Identifier: Apache-2.0
"""Corruptions of scans, in five severities: what another scanner, coil or protocol does to intensities.

They act on a preprocessed volume (C, X, Y, Z) in [0, 1] and keep its grid, so the labels stay. They share no code with
the views of the adaptation or the augmentations of the training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage

Array = np.ndarray

SEVERITIES = (1, 2, 3, 4, 5)
AIR = 0.03  # intensity below which an inversion changes nothing


def _bias(v: Array, severity: int) -> Array:
    rng = np.random.default_rng(severity)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in v.shape[1:]), indexing="ij")
    field = sum(c * a for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
    field = field + sum(c * (a * a - 1 / 3) for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
    return v * np.exp(0.2 * severity * field)


def _gamma(v: Array, severity: int) -> Array:
    return v ** (1.4, 1.8, 2.3, 2.9, 3.6)[severity - 1]


def _noise(v: Array, severity: int) -> Array:
    sigma = (0.03, 0.06, 0.1, 0.15, 0.2)[severity - 1]
    return v + sigma * np.random.default_rng(severity).standard_normal(v.shape)


def _resolution(v: Array, severity: int) -> Array:
    """Of the plane, as far as it has that many pixels."""
    factor = (1.3, 1.7, 2.2, 2.8, 3.5)[severity - 1]
    scale = [1.0, *(1 / factor if n > 8 else 1.0 for n in v.shape[1:3]), 1.0]
    smooth = ndimage.gaussian_filter(v, [0.0 if s == 1 else factor / 2 for s in scale])
    small = ndimage.zoom(smooth, scale, order=1)
    return ndimage.zoom(small, [n / m for n, m in zip(v.shape, small.shape, strict=True)], order=1)


def _inversion(v: Array, severity: int) -> Array:
    """A mixture of the scan and its negative."""
    weight = 0.2 * severity
    return np.where(v > AIR, (1 - weight) * v + weight * (1 + AIR - v), v)


SHIFTS: dict[str, Callable[[Array, int], Array]] = {
    "bias": _bias,
    "gamma": _gamma,
    "noise": _noise,
    "resolution": _resolution,
    "inversion": _inversion,
}


def shifted(volume: torch.Tensor, name: str, severity: int) -> torch.Tensor:
    """A volume under a shift of :data:`SHIFTS`, clipped to [0, 1]."""
    changed = SHIFTS[name](volume.numpy().astype(float), severity)
    return torch.from_numpy(np.clip(changed, 0, 1).astype(np.float32))
