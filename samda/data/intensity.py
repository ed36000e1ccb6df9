# SPDX-License-Identifier: Apache-2.0
"""Intensities of a scan to [0, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from samda.data.body import body_mask, body_threshold, coarse
from samda.data.task import Task
from samda.errors import InputError

__all__ = ["ScaleBodyIntensityd", "intensity_range"]


def intensity_range(image: np.ndarray, spacing_mm: np.ndarray, task: Task) -> tuple[float, float]:
    """The two intensities that become 0 and 1.

    CT: the task's window, in HU. MR: percentiles inside the body, so that the amount of air around it does not decide.
    Pictures: percentiles of all pixels and channels together, so that colors stay.

    Args:
        image: (C, X, Y, Z), RAS; of an MR one channel, as every sequence has a scale of its own.
        spacing_mm: (3,) along X, Y, Z.
        task: modality, window and percentiles.
    """
    if task.modality == "CT":
        return task.window
    samples = image
    if task.modality == "MR":
        values, strides = coarse(image[0], spacing_mm)
        samples = values[body_mask(values, spacing_mm * strides, body_threshold(values, task, scaled=False))]
    low, high = np.percentile(samples, task.percentiles)
    return float(low), float(high)


class ScaleBodyIntensityd(MapTransform):
    """Map the intensities of a scan (C, X, Y, Z) to [0, 1], float32, clipped; see :func:`intensity_range`.

    The result lies in memory slice by slice along the last axis, which makes reading axial slabs fast.

    Args:
        keys: keys of the images.
        task: modality, window and percentiles.

    Raises:
        InputError: the scan holds NaN or infinity, is constant, or lies outside the window altogether.
    """

    def __init__(self, keys: KeysCollection, task: Task) -> None:
        super().__init__(keys)
        self.task = task

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            scaled = self._scale(image.as_tensor(), image.pixdim.numpy(), str(image.meta.get("filename_or_obj", key)))
            d[key] = MetaTensor(scaled, meta=image.meta, applied_operations=image.applied_operations)
        return d

    def _scale(self, image: torch.Tensor, spacing_mm: np.ndarray, name: str) -> torch.Tensor:
        channels, x, y, z = image.shape
        scaled = torch.empty((channels, z, y, x), dtype=torch.float32).permute(0, 3, 2, 1)
        scaled.copy_(image)
        parts = range(channels) if self.task.modality == "MR" else [slice(None)]  # MR sequences differ in scale
        for part in parts:
            what = f"channel {part} of {name}" if channels > 1 and isinstance(part, int) else name
            values = image[part : part + 1] if isinstance(part, int) else image
            low, high = self._limits(values, spacing_mm, what)
            scaled[part].sub_(low).div_(high - low).clamp_(0, 1)  # in place: scans are large
        return scaled

    def _limits(self, image: torch.Tensor, spacing_mm: np.ndarray, name: str) -> tuple[float, float]:
        """The intensities that become 0 and 1, refusing an image that they do not tell apart."""
        smallest, largest = (float(v) for v in image.aminmax())  # NaN, if any voxel is NaN
        if not (np.isfinite(smallest) and np.isfinite(largest)):
            raise InputError(f"{name} holds NaN or infinite values; replace them before use")
        if smallest == largest:
            raise InputError(
                f"{name} is constant ({smallest:g} everywhere), so there is nothing to segment; check the file"
            )
        low, high = intensity_range(image.numpy(), spacing_mm, self.task)
        if largest <= low or smallest >= high or low >= high:
            raise InputError(
                f"{name} holds {smallest:g} to {largest:g}, which {self._range(low, high)} does not tell apart; "
                "check the units of the file and the task's modality, window and percentiles"
            )
        if self.task.modality == "CT" and smallest >= 0:
            warnings.warn(f"{name} has no value below 0; a CT in Hounsfield units has air near -1000", stacklevel=2)
        return low, high

    def _range(self, low: float, high: float) -> str:
        if self.task.modality == "CT":
            return f"the window {low:g} to {high:g} HU"
        return f"the range {low:g} to {high:g} of percentiles {self.task.percentiles}"
