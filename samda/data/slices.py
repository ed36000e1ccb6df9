# SPDX-License-Identifier: Apache-2.0
"""Extraction of slices from a volume for the network, and restoration of maps to the volume.

A slice is resampled once, from the in-plane grid of the volume to the spacing of the task, and cropped or padded around
the body in the same step. Nothing is resampled across slices. With `context` 1, a slice is stacked with its two
neighbors, whose distance is the through-plane spacing of the scan.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from samda.data.body import body_box
from samda.data.labels import OPEN
from samda.errors import InputError
from samda.task import AXES, Task

logger = logging.getLogger(__name__)

ANISOTROPIC = 1.5  # times the shortest voxel side: how long the longest is where all three axes are used
MOST = 64  # slices resampled at once, which bounds the memory
FARTHEST = 64  # largest ratio of pixel and voxel size; a larger one indicates wrong units


def plane_axes(task: Task) -> tuple[int, int]:
    """Axes of an RAS volume along the rows and along the columns of a slice.

    In-plane axes are reversed: rows run from anterior to posterior (axial) or superior to inferior, columns from right
    to left (axial, coronal) or anterior to posterior (sagittal).
    """
    rows, columns = (axis for axis in (2, 1, 0) if axis != task.slice_axis)
    return rows, columns


def interpolation_matrix(positions: np.ndarray, size: int, width: float = 1.0) -> torch.Tensor:
    """Linear interpolation of a sampled line as a matrix.

    Row k has the weights max(0, 1 - |j - positions[k]| / width) over the samples j, divided by their sum. With
    `width` > 1 the triangle spans more samples (anti-aliasing). Positions up to half a sample beyond the ends take the
    value of the end; rows of positions further out are zero. `positions` (m,) and `width` (at least 1) are in samples,
    sample j is at j; the matrix for `size` samples is (m, size) float32.
    """
    inside = (positions > -0.5 - 1e-6) & (positions < size - 0.5 + 1e-6)
    clipped = np.clip(positions, 0, size - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(size)[None] - clipped[:, None]) / max(1.0, width))
    weights = weights / weights.sum(axis=1, keepdims=True) * inside[:, None]
    return torch.from_numpy(weights.astype(np.float32))


def sides_mm(spacing_mm: Sequence[float], shape: Sequence[int], task: Task) -> list[float]:
    """Voxel sides (3,) along the axes of a volume (X, Y, Z), RAS; for a 2-D image as `Task.picture_size` has them."""
    sides = [float(side) for side in spacing_mm]
    if task.picture_size is not None:
        axes = plane_axes(task)
        for axis in axes:
            sides[axis] = task.picture_size / min(shape[a] for a in axes)
    return sides


def refuse_other_scale(spacing_mm: Sequence[float], task: Task) -> None:
    """Refuse pixels much smaller or larger than the voxels (3,), RAS, which indicates wrong units."""
    for axis in plane_axes(task):
        if not 1 / FARTHEST <= task.spacing / spacing_mm[axis] <= FARTHEST:
            raise InputError(
                f"pixels of {task.spacing:g} mm (spacing of the task) do not fit voxels of {spacing_mm[axis]:g} mm; "
                "check that both are in mm"
            )


def axis_tasks(task: Task, shape: Sequence[int], spacing_mm: Sequence[float], name: str = "the volume") -> list[Task]:
    """The task and, where its `axes` are "all", the same along the other two axes of a volume (X, Y, Z), RAS.

    Slices across thick ones would be made up by interpolation: an anisotropic volume keeps the task's own axis, with a
    warning.
    """
    if task.axes == "one":
        return [task]
    if max(spacing_mm) > ANISOTROPIC * min(spacing_mm) or 1 in shape:
        sides = " x ".join(f"{side:.3g}" for side in spacing_mm)
        logger.warning(
            "%s has %s voxels of %s mm: only its %s slices are used, axes 'all' needs sides within a factor of %g",
            *(name, " x ".join(map(str, shape)), sides, task.axis, ANISOTROPIC),
        )
        return [task]
    return [task, *(dataclasses.replace(task, axis=axis) for axis in AXES if axis != task.axis)]


@dataclasses.dataclass(frozen=True)
class _Line:
    """One in-plane direction: matrices between the samples of the volume and the canvas."""

    forward: torch.Tensor  # (canvas, samples) volume -> canvas
    backward: torch.Tensor  # (samples, canvas) canvas -> volume
    covered: torch.Tensor  # (samples,) does the canvas reach this sample?

    def mirrored(self) -> _Line:
        """The same with the canvas reversed."""
        return _Line(self.forward.flip(0), self.backward.flip(1), self.covered)

    @classmethod
    def build(cls, size: int, spacing_mm: float, body: Sequence[int], task: Task) -> _Line:
        """A canvas centered on the body, of the image size or, for a larger body, of the next multiple of 16.

        `size` and `spacing_mm` are number and distance of the samples, `body` is the first sample and the end
        (exclusive).
        """
        # the center is between two samples, as the center of a canvas is between two pixels: at equal spacing, pixels
        # coincide with samples and nothing is interpolated
        center = np.floor(0.5 * (body[0] + body[1] - 1)) + 0.5
        reach = max(center - body[0], body[1] - 1 - center) + 0.5  # samples from the center to the end of the body
        needed = 2 * reach * spacing_mm / task.spacing
        pixels = max(task.image_size, int(np.ceil(needed / 16 - 1e-6)) * 16)
        ratio = task.spacing / spacing_mm  # samples of the volume per pixel of the canvas
        # pixel k of the canvas is at sample center - (k - middle) * ratio: reversed, see plane_axes
        middle = 0.5 * (pixels - 1)
        samples = center - (np.arange(pixels) - middle) * ratio
        pixel = middle - (np.arange(size) - center) / ratio
        backward = interpolation_matrix(pixel, pixels, width=1 / ratio)
        return cls(interpolation_matrix(samples, size, width=ratio), backward, backward.sum(dim=1) > 0)


class SliceGrid:
    """The slices of a volume on the canvas of the network.

    Slice i is plane i of the volume; for its directions see :func:`plane_axes`. The field of view is centered on the
    body; pixels outside the volume are 0.

    Args:
        shape: (X, Y, Z) of the volume, in RAS order.
        spacing_mm: (3,) voxel size along X, Y, Z.
        box: (3, 2) first voxel and end of the body along X, Y, Z.
        task: slice axis, spacing and image size.

    Attributes:
        canvas: (rows, columns) in pixels: `task.image_size`, or larger multiples of 16 if the body is larger than the
            field of view; the network then processes windows of `task.image_size`.
        num_slices: number of slices.
        body: first slice and end (exclusive) of the body.
    """

    def __init__(self, shape: Sequence[int], spacing_mm: Sequence[float], box: np.ndarray, task: Task) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.spacing_mm = tuple(float(s) for s in spacing_mm)
        self.task = task
        refuse_other_scale(self.spacing_mm, task)
        self.axes = (task.slice_axis, *plane_axes(task))
        across, *plane = self.axes
        self.num_slices = self.shape[across]
        self.body = (int(box[across][0]), int(box[across][1]))
        self._rows, self._columns = (_Line.build(self.shape[a], self.spacing_mm[a], box[a], task) for a in plane)
        self.canvas = (len(self._rows.forward), len(self._columns.forward))

    @classmethod
    def from_volume(cls, volume: torch.Tensor, affine_or_spacing_mm: Any, task: Task) -> SliceGrid:
        """The grid of a preprocessed volume (C, X, Y, Z), centered on its body.

        `affine_or_spacing_mm` is (4, 4), voxel index to RAS mm, or (3,), voxel size in mm.
        """
        if volume.ndim != 4:
            raise InputError(f"a volume must be (C, X, Y, Z), got {volume.ndim} dimensions: {tuple(volume.shape)}")
        geometry = np.asarray(torch.as_tensor(affine_or_spacing_mm).detach().cpu(), float)
        if geometry.shape not in ((4, 4), (3,)):
            raise InputError(f"geometry must be an affine (4, 4) or a spacing (3,), got shape {geometry.shape}")
        spacing_mm = np.linalg.norm(geometry[:3, :3], axis=0) if geometry.ndim == 2 else geometry
        sides = sides_mm(spacing_mm.tolist(), volume.shape[1:], task)
        box = body_box(_plain(volume)[0].detach().cpu().numpy(), np.asarray(sides), task)
        return cls(volume.shape[1:], sides, box, task)

    def mirrored(self) -> SliceGrid:
        """The same slices with their columns in reversed order."""
        grid = copy.copy(self)
        grid._columns = self._columns.mirrored()
        return grid

    def extract(self, volume: torch.Tensor, index: int | slice | Iterable[int]) -> torch.Tensor:
        """Slices `index` of a volume (C, X, Y, Z) on the canvas: (n, C, rows, columns) float32."""
        if len(chosen := self._chosen(index)) > MOST:
            return torch.cat([self.extract(volume, chosen[i : i + MOST]) for i in range(0, len(chosen), MOST)])
        # contiguous, so that rounding does not depend on the memory layout of the volume
        planes = self._planes(volume, index).float().contiguous()
        return _resample(planes, self._rows.forward, self._columns.forward)

    def inputs(self, volume: torch.Tensor, index: int | slice | Iterable[int]) -> torch.Tensor:
        """Slices `index` of a volume (C, X, Y, Z) as input of the network, see `Task.context`.

        (n, `network_channels`, rows, columns) float32: the slice itself, or with context the slice below (smaller
        index: inferior, posterior, left), the slice, and the slice above. At both ends of the volume the last slice is
        repeated.
        """
        chosen = self._chosen(index)
        if not self.task.context:
            return self.extract(volume, chosen)
        around = with_neighbors(chosen, 0, self.num_slices)
        needed = sorted({i for triple in around for i in triple})  # resample each slice once
        place = {i: position for position, i in enumerate(needed)}
        places = torch.tensor([[place[i] for i in triple] for triple in around], dtype=torch.long).reshape(-1, 3)
        return self.extract(volume, needed)[places, 0]

    def extract_labels(self, label: torch.Tensor, index: int | slice | Iterable[int]) -> torch.Tensor:
        """Slices `index` of a label map (1, X, Y, Z) on the canvas: (n, rows, columns) uint8.

        A pixel has the class, or the value of :class:`samda.data.labels.PartialLabels`, with the largest interpolated
        share; pixels outside the volume are background.
        """
        if len(chosen := self._chosen(index)) > MOST:
            return torch.cat([self.extract_labels(label, chosen[i : i + MOST]) for i in range(0, len(chosen), MOST)])
        planes = self._planes(label, index)[:, 0].contiguous()
        best = torch.zeros((len(planes), *self.canvas), dtype=torch.uint8, device=planes.device)
        if not planes.any():
            return best
        share = torch.zeros(best.shape, device=planes.device)
        shown = _extent(planes > 0, 0)
        share[shown] = _resample((planes[shown] == 0).float(), self._rows.forward, self._columns.forward)
        gaps = planes[planes >= OPEN].unique().tolist()
        for k in (*gaps, *range(1, self.task.num_classes)):
            mask = planes == k
            if not mask.any():
                continue
            n, r, c = (_extent(mask, axis) for axis in range(3))  # a class fills little of the volume
            other = _resample(mask[n, r, c].float(), self._rows.forward[:, r], self._columns.forward[:, c])
            best[n][other > share[n]] = k
            share[n] = torch.maximum(share[n], other)
        return best

    def restore(self, maps: torch.Tensor, outside: float = 1.0) -> torch.Tensor:
        """Resample maps (n, K, rows, columns), background first, from the canvas to the grid of the volume.

        `outside` is the value of channel 0 outside the canvas; the other channels are 0 there. The result has the axis
        order of the volume: (K, X, Y, n) axial, (K, X, n, Z) coronal, (K, n, Y, Z) sagittal.
        """
        if maps.ndim != 4 or tuple(maps.shape[2:]) != self.canvas:
            rows, columns = self.canvas
            raise InputError(f"maps must be (n, K, {rows}, {columns}), got {tuple(maps.shape)}")
        planes = _resample(maps.float(), self._rows.backward, self._columns.backward)
        covered = (self._rows.covered[:, None] & self._columns.covered[None]).to(planes.device)
        planes[:, 0].masked_fill_(~covered, outside)
        place = dict(zip(self.axes, (0, 2, 3), strict=True))  # dimension of each axis of the volume
        return planes.permute(1, place[0], place[1], place[2])

    def _planes(self, volume: torch.Tensor, index: int | slice | Iterable[int]) -> torch.Tensor:
        """Slices (n, C, rows, columns) on the grid of the volume, a view if possible."""
        if tuple(volume.shape[1:]) != self.shape:
            raise InputError(f"the grid was made for a volume of {self.shape} voxels, got {tuple(volume.shape[1:])}")
        volume = _plain(volume)
        across, rows, columns = (axis + 1 for axis in self.axes)
        chosen = self._chosen(index)
        if chosen and chosen == list(range(chosen[0], chosen[0] + len(chosen))):
            slab = volume.narrow(across, chosen[0], len(chosen))
        else:
            slab = volume.index_select(across, torch.tensor(chosen, dtype=torch.long, device=volume.device))
        return slab.permute(across, 0, rows, columns)

    def _chosen(self, index: int | slice | Iterable[int]) -> list[int]:
        """The slices of `index` as a list."""
        if isinstance(index, slice):
            return list(range(*index.indices(self.num_slices)))
        return [index] if isinstance(index, int) else [int(i) for i in index]


def with_neighbors(indices: Iterable[int], first: int, end: int) -> list[tuple[int, int, int]]:
    """Each index with its neighbors in the range from `first` to `end` (exclusive); ends are repeated."""
    return [(max(i - 1, first), i, min(i + 1, end - 1)) for i in indices]


def center_channels(slices: Any, task: Task) -> Any:
    """The channels (n, C, ...) of the slices without the neighbors of `Task.context`; a view."""
    return slices[:, task.context : task.context + task.in_channels]


def _plain(volume: torch.Tensor) -> torch.Tensor:
    """The tensor without MONAI's metadata, which is copied at every operation."""
    return volume.as_tensor() if hasattr(volume, "as_tensor") else volume


def _extent(mask: torch.Tensor, axis: int) -> slice:
    """From the first to the last index along `axis` of a mask (n, r, c) that is not empty."""
    held = mask.any([other for other in range(3) if other != axis]).nonzero()
    return slice(int(held[0]), int(held[-1]) + 1)


def _resample(planes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """rows @ plane @ columns^T for planes (..., r, c)."""
    rows, columns = rows.to(planes.device), columns.to(planes.device)
    return rows @ (planes @ columns.T)
