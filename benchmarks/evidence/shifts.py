# SPDX-License-Identifier: Apache-2.0
"""Simulated shifts of a labeled scan, in families that share nothing.

The families `tuning` (gamma, noise, window) and `patients` (another anatomy with other tissue contrasts) are what
settings may be chosen on; the family `report` (bias field, blur, contrast medium, resolution) is only ever reported.
All act on a preprocessed volume (C, X, Y, Z) in [0, 1]. A change takes the volume (X, Y, Z), its labels, the size of a
voxel in mm and the HU of a unit, and returns a volume that is not clipped. Labels serve to make a case (the organs that
take up contrast medium, the anatomy that is bent) and to score it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy import ndimage

Array = np.ndarray

BEND_MM = 30.0  # smoothness of the field that bends an anatomy
# HU that an organ gains from contrast medium in the portal venous phase, at strength 1
UPTAKE = {"aorta": 110, "kidney_right": 130, "kidney_left": 130, "spleen": 70, "liver": 55, "stomach": 10}


@dataclasses.dataclass(frozen=True)
class Shift:
    """One simulated shift.

    Attributes:
        name: of the case that it makes.
        family: "tuning", "patients" or "report".
        change: see above.
        bend: seed of another anatomy; None keeps the patient's own.
    """

    name: str
    family: str
    change: Callable[[Array, Array, Array, float], Array]
    bend: int | None = None

    def __call__(
        self, volume: torch.Tensor, labels: torch.Tensor, spacing_mm: np.ndarray, unit: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shifted volume (1, X, Y, Z), clipped to [0, 1], and its labels; `unit` is the window's width in HU."""
        v, y = volume[0].numpy().astype(float), labels[0].numpy()
        if self.bend is not None:
            v, y = _bent(v, y, spacing_mm, self.bend)
        changed = self.change(v, y, spacing_mm, unit)
        return torch.from_numpy(np.clip(changed, 0, 1).astype(np.float32))[None], torch.from_numpy(y)[None]


def _bent(v: Array, y: Array, mm: Array, seed: int) -> tuple[Array, Array]:
    """Another anatomy: every slice scaled, rotated and bent by one smooth random field that varies along the body."""
    rng = np.random.default_rng(seed)
    shape, middle = v.shape, (np.array(v.shape[:2]) - 1) / 2
    angle, scale = np.deg2rad(rng.uniform(-6, 6)), rng.uniform(0.88, 1.14, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    field = [ndimage.gaussian_filter(rng.standard_normal(shape), BEND_MM / mm) for _ in range(2)]
    field = [f / f.std() * rng.uniform(4, 8) / step for f, step in zip(field, mm, strict=False)]  # 4 to 8 mm
    x = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij"))
    plane = np.einsum("ij,jxyz->ixyz", turn, x[:2] - middle[:, None, None, None]) + middle[:, None, None, None]
    places = np.stack([plane[0] + field[0], plane[1] + field[1], x[2]])
    return ndimage.map_coordinates(v, places, order=1), ndimage.map_coordinates(y, places, order=0)


def _gamma(power: float, v: Array, y: Array, mm: Array, unit: float) -> Array:
    return v**power


def _noise(sigma: float, seed: int, v: Array, y: Array, mm: Array, unit: float) -> Array:
    return v + sigma * np.random.default_rng(seed).standard_normal(v.shape)


def _window(width: float, shift: float, v: Array, y: Array, mm: Array, unit: float) -> Array:
    return np.where(v > 0, (v - 0.5) / width + 0.5 + shift, 0)


def _inverted(v: Array, y: Array, mm: Array, unit: float) -> Array:
    return np.where(v > 0.03, 1.03 - v, v)


def _bias(strength: float, seed: int, v: Array, y: Array, mm: Array, unit: float) -> Array:
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in v.shape), indexing="ij")
    field = sum(c * a for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
    field = field + sum(c * (a * a - 1 / 3) for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
    return v * np.exp(strength * field)


def _blur(sigma_mm: float, v: Array, y: Array, mm: Array, unit: float) -> Array:
    return ndimage.gaussian_filter(v, sigma_mm / mm)


def _contrast(strength: float, classes: tuple[str, ...], v: Array, y: Array, mm: Array, unit: float) -> Array:
    gain = np.zeros_like(v)
    for k, name in enumerate(classes):
        gain[y == k] = UPTAKE.get(name, 0)
    return v + strength * ndimage.gaussian_filter(gain, 1.0) / unit


def _resolution(factor: float, v: Array, y: Array, mm: Array, unit: float) -> Array:
    smooth = ndimage.gaussian_filter(v, (factor / 2, factor / 2, 0))
    small = ndimage.zoom(smooth, (1 / factor, 1 / factor, 1), order=1)
    return ndimage.zoom(small, [n / m for n, m in zip(v.shape, small.shape, strict=True)], order=1)


def _tissues(seed: int, v: Array, y: Array, mm: Array, unit: float) -> Array:
    """Another tissue contrast, as between CT and MR: a random curve that need not rise, and an offset per organ."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, 5)
    weight = rng.uniform(0.5, 1)
    curve = (1 - weight) * grid + weight * rng.uniform(0.05, 1, 5)
    air = np.clip(v / 0.05, 0, 1)
    changed = air * np.interp(v, grid, curve) + (1 - air) * v
    offsets = np.zeros_like(v)
    for k in np.unique(y[y > 0]):
        offsets[y == k] = rng.uniform(-0.3, 0.3)
    changed = changed + ndimage.gaussian_filter(offsets, 3.0 / mm)
    changed = _bias(rng.uniform(0, 0.3), seed, changed, y, mm, unit)
    return changed + rng.uniform(0, 0.06) * rng.standard_normal(v.shape) * (v > 0.02)


def shifts(classes: tuple[str, ...]) -> list[Shift]:
    """All shifts; `classes` are the task's, background first, for the contrast medium."""
    tuning = [("gamma", p, partial(_gamma, p)) for p in (0.7, 1.5, 0.4, 2.5)]
    tuning += [("noise", s, partial(_noise, s, seed)) for s, seed in ((0.05, 1), (0.2, 2))]
    tuning += [("window", w, partial(_window, w, by)) for w, by in ((1.3, 0.05), (0.5, -0.2), (2.0, 0.2))]
    report = [("bias", s, partial(_bias, s, round(100 * s))) for s in (0.15, 0.2, 0.25, 0.3, 0.35)]
    report += [("blur", s, partial(_blur, s)) for s in (1.0, 1.5, 2.0, 2.5, 3.0)]
    report += [("contrast", s, partial(_contrast, s, classes)) for s in (0.2, 0.3, 0.4, 0.5, 0.6)]
    report += [("resolution", s, partial(_resolution, s)) for s in (1.3, 1.6, 1.9, 2.2, 2.5)]
    return [
        *(Shift(f"{name}_{value}", "tuning", change) for name, value, change in tuning),
        Shift("inverted", "tuning", _inverted),
        *(Shift(f"patient_{n}", "patients", partial(_tissues, n), bend=n) for n in range(1, 9)),
        *(Shift(f"{name}_{value}", "report", change) for name, value, change in report),
    ]
