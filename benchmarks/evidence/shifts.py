# SPDX-License-Identifier: Apache-2.0
"""Simulated shifts of a labeled scan, in two families that share nothing.

The families `tuning` (gamma, noise, window) and `patients` (another anatomy with other tissue contrasts) are what
settings may be chosen on; the family `report` (bias field, blur, contrast medium, resolution) is only ever reported.
All act on a preprocessed volume (C, X, Y, Z) in [0, 1]. Labels serve to make a case (the organs that take up contrast
medium, the anatomy that is bent) and to score it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy import ndimage

__all__ = ["Shift", "shifts"]

BEND_MM = 30.0  # smoothness of the field that bends an anatomy
# HU that an organ gains from contrast medium in the portal venous phase, at strength 1
UPTAKE = {"aorta": 110, "kidney_right": 130, "kidney_left": 130, "spleen": 70, "liver": 55, "stomach": 10}


@dataclasses.dataclass(frozen=True)
class Shift:
    """One simulated shift.

    Attributes:
        name: of the case that it makes.
        family: "tuning", "patients" or "report".
        mild: is it a shift that a good model survives nearly unharmed?
        change: (volume (X, Y, Z) in [0, 1], labels (X, Y, Z), voxel size in mm, HU per unit) -> volume, not clipped.
        bend: seed of another anatomy; None keeps the patient's own.
    """

    name: str
    family: str
    mild: bool
    change: Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
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


def _bent(v: np.ndarray, y: np.ndarray, mm: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
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


def _gamma(power: float):
    return lambda v, y, mm, unit: v**power


def _noise(sigma: float, seed: int):
    return lambda v, y, mm, unit: v + sigma * np.random.default_rng(seed).standard_normal(v.shape)


def _window(width: float, shift: float):
    return lambda v, y, mm, unit: np.where(v > 0, (v - 0.5) / width + 0.5 + shift, 0)


def _inverted(v: np.ndarray, y: np.ndarray, mm: np.ndarray, unit: float) -> np.ndarray:
    return np.where(v > 0.03, 1.03 - v, v)


def _bias(strength: float, seed: int):
    def change(v: np.ndarray, y: np.ndarray, mm: np.ndarray, unit: float) -> np.ndarray:
        rng = np.random.default_rng(seed)
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in v.shape), indexing="ij")
        field = sum(c * a for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
        field = field + sum(c * (a * a - 1 / 3) for c, a in zip(rng.uniform(-1, 1, 3), axes, strict=True))
        return v * np.exp(strength * field)

    return change


def _blur(sigma_mm: float):
    return lambda v, y, mm, unit: ndimage.gaussian_filter(v, sigma_mm / mm)


def _contrast(strength: float):
    def change(v: np.ndarray, y: np.ndarray, mm: np.ndarray, unit: float, names: Mapping[int, str]) -> np.ndarray:
        gain = np.zeros_like(v)
        for k, name in names.items():
            gain[y == k] = UPTAKE.get(name, 0)
        return v + strength * ndimage.gaussian_filter(gain, 1.0) / unit

    return change


def _resolution(factor: float):
    def change(v: np.ndarray, y: np.ndarray, mm: np.ndarray, unit: float) -> np.ndarray:
        small = ndimage.zoom(
            ndimage.gaussian_filter(v, (factor / 2, factor / 2, 0)), (1 / factor, 1 / factor, 1), order=1
        )
        return ndimage.zoom(small, [n / m for n, m in zip(v.shape, small.shape, strict=True)], order=1)

    return change


def _tissues(seed: int):
    """Another tissue contrast, as between CT and MR: a random curve that need not rise, and an offset per organ."""

    def change(v: np.ndarray, y: np.ndarray, mm: np.ndarray, unit: float) -> np.ndarray:
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
        changed = _bias(rng.uniform(0, 0.3), seed)(changed, y, mm, unit)
        return changed + rng.uniform(0, 0.06) * rng.standard_normal(v.shape) * (v > 0.02)

    return change


def shifts(classes: tuple[str, ...]) -> list[Shift]:
    """All shifts; `classes` are the task's, background first, for the contrast medium."""
    names = {k: name for k, name in enumerate(classes) if k}

    def contrast(strength: float):
        inner = _contrast(strength)
        return lambda v, y, mm, unit: inner(v, y, mm, unit, names)

    return [
        Shift("gamma_0.7", "tuning", True, _gamma(0.7)),
        Shift("gamma_1.5", "tuning", True, _gamma(1.5)),
        Shift("noise_0.05", "tuning", True, _noise(0.05, 1)),
        Shift("window_1.3", "tuning", True, _window(1.3, 0.05)),
        Shift("gamma_0.4", "tuning", False, _gamma(0.4)),
        Shift("gamma_2.5", "tuning", False, _gamma(2.5)),
        Shift("noise_0.2", "tuning", False, _noise(0.2, 2)),
        Shift("window_0.5", "tuning", False, _window(0.5, -0.2)),
        Shift("window_2.0", "tuning", False, _window(2.0, 0.2)),
        Shift("inverted", "tuning", False, _inverted),
        *(Shift(f"patient_{n}", "patients", False, _tissues(n), bend=n) for n in range(1, 9)),
        *(Shift(f"bias_{s}", "report", True, _bias(s, round(100 * s))) for s in (0.15, 0.2, 0.25, 0.3, 0.35)),
        *(Shift(f"blur_{s}", "report", True, _blur(s)) for s in (1.0, 1.5, 2.0, 2.5, 3.0)),
        *(Shift(f"contrast_{s}", "report", True, contrast(s)) for s in (0.2, 0.3, 0.4, 0.5, 0.6)),
        *(Shift(f"resolution_{s}", "report", True, _resolution(s)) for s in (1.3, 1.6, 1.9, 2.2, 2.5)),
    ]
