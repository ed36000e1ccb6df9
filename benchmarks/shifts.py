# SPDX-License-Identifier: Apache-2.0
"""Simulated shifts of a labelled scan, in two families that share nothing.

The family `tuning` (gamma, noise, window) is what settings may be chosen on; the family `report` (bias field, blur,
contrast medium, resolution) is only ever reported. All act on a preprocessed volume (C, X, Y, Z) in [0, 1]. Labels
serve to make a case (the organs that take up contrast medium) and to score it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy import ndimage

__all__ = ["Shift", "shifts"]

# HU that an organ gains from contrast medium in the portal venous phase, at strength 1
UPTAKE = {"aorta": 110, "kidney_right": 130, "kidney_left": 130, "spleen": 70, "liver": 55, "stomach": 10}


@dataclasses.dataclass(frozen=True)
class Shift:
    """One simulated shift.

    Attributes:
        name: of the case that it makes.
        family: "tuning" or "report".
        mild: is it a shift that a good model survives nearly unharmed?
        change: (volume (X, Y, Z) in [0, 1], labels (X, Y, Z), voxel size in mm, HU per unit) -> volume, not clipped.
    """

    name: str
    family: str
    mild: bool
    change: Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]

    def __call__(self, volume: torch.Tensor, labels: torch.Tensor, spacing_mm: np.ndarray, unit: float) -> torch.Tensor:
        """The shifted volume (1, X, Y, Z), clipped to [0, 1]; `unit` is the width of the window in HU."""
        changed = self.change(volume[0].numpy().astype(float), labels[0].numpy(), spacing_mm, unit)
        return torch.from_numpy(np.clip(changed, 0, 1).astype(np.float32))[None]


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
        *(Shift(f"bias_{s}", "report", True, _bias(s, round(100 * s))) for s in (0.15, 0.2, 0.25, 0.3, 0.35)),
        *(Shift(f"blur_{s}", "report", True, _blur(s)) for s in (1.0, 1.5, 2.0, 2.5, 3.0)),
        *(Shift(f"contrast_{s}", "report", True, contrast(s)) for s in (0.2, 0.3, 0.4, 0.5, 0.6)),
        *(Shift(f"resolution_{s}", "report", True, _resolution(s)) for s in (1.3, 1.6, 1.9, 2.2, 2.5)),
    ]
