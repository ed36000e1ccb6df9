# SPDX-License-Identifier: Apache-2.0
"""Slice-wise inference on volumes, by slabs, so that memory does not grow with classes x voxels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference

from samda.data.slices import SliceGrid, axis_tasks
from samda.embeddings import allocate
from samda.errors import InputError, SamdaError, UsageError, nearest
from samda.networks.ops import argmax, computes_bf16
from samda.progress import bar, share
from samda.task import Task

OUTPUTS = ("labels", "probabilities", "logits")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
AMP = ("auto", *PRECISIONS, "off")
SMALLEST = 1e-12  # lower bound of probabilities before the logarithm


class VolumeInferer(Inferer):
    """Segment a preprocessed volume slice by slice and return the result on the grid of the volume.

    Slices of :class:`samda.data.slices.SliceGrid` (with neighbors, if the task has `context`) are processed in batches;
    if the body is larger than the field of view, in overlapping windows blended with Gaussian weights. The class
    probabilities are resampled to the in-plane grid of the volume *before* the argmax, for smooth borders. Slabs of a
    few slices keep the memory within the budget, in addition to volume, label map and the network on `batch_size`
    slices. The result does not depend on the budget.

    Where the task's `axes` are "all" and the voxels nearly cubes, this is done along all three axes, with `mirror` also
    on mirrored slices, and the class probabilities are averaged; beyond the budget their mean lies in a temporary file.

    Args:
        task: a Task or its values.
        batch_size: slices (or windows) per forward pass.
        overlap: share of a window that it has in common with its neighbor, in [0, 1).
        output: "labels" (1, 1, X, Y, Z), uint8, or uint16 beyond 255 classes; "probabilities" (1, K, X, Y, Z) float32;
            or "logits", the logarithm of these probabilities: softmax gives them back, argmax the labels.
        memory_budget_mb: memory for the class maps of a slab on the volume's grid (MB = 10^6 bytes); a slab holds at
            least one slice.
        amp: "bf16" or "fp16" autocast of the network call; "off" or None is full precision, "auto" is bf16 on CPUs that
            compute it (:func:`samda.networks.ops.computes_bf16`). Stitching is always in float32.
        device: where the network runs; None takes the device of its parameters, else that of the inputs.
        progress: show a progress bar, on a terminal only.
        axes: "one" or "all" instead of the task's.

    Raises:
        UsageError: an argument out of its range.
    """

    def __init__(
        self,
        task: Task | Mapping[str, Any],
        batch_size: int = 8,
        overlap: float = 0.5,
        output: str = "labels",
        memory_budget_mb: float = 512.0,
        amp: str | None = "auto",
        device: torch.device | str | None = None,
        progress: bool = False,
        axes: str | None = None,
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise UsageError(f"output {output!r} is unknown; {nearest(str(output), OUTPUTS)}")
        if amp is not None and amp not in AMP:
            raise UsageError(f"amp {amp!r} is unknown; {nearest(str(amp), AMP)}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= overlap < 1:
            raise UsageError(f"overlap must be in [0, 1), got {overlap}")
        if memory_budget_mb <= 0:
            raise UsageError(f"memory_budget_mb must be positive, got {memory_budget_mb}")
        self.task = task if isinstance(task, Task) else Task.from_dict(task)
        if axes is not None:
            self.task = dataclasses.replace(self.task, axes=axes)
        self.batch_size, self.overlap, self.output = int(batch_size), overlap, output
        self.memory_budget_mb, self.amp, self.device, self.progress = memory_budget_mb, amp, device, progress
        self._turn = 0, 1  # number of the axis that is looked along, and how many there are
        if device is not None:
            self.precision(torch.device(device))

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        *args: Any,
        spacing_mm: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Segment one volume: (1, 1 or K, X, Y, Z), see `output`, on the device of the inputs, with their metadata.

        Args:
            inputs: (1, C, X, Y, Z) in [0, 1], RAS; a MetaTensor, or a tensor with `spacing_mm`.
            network: (n, C, H, W) slices -> (n, K, H, W) logits; called with `args` and `kwargs`.
            spacing_mm: size of a voxel along X, Y, Z, for a plain tensor.
        """
        labels, probabilities = self.segment(
            inputs, network, *args, spacing_mm=spacing_mm, keep_probabilities=self.output != "labels", **kwargs
        )
        result = labels if probabilities is None else probabilities
        if self.output == "logits":
            result = result.clamp_(min=SMALLEST).log_()
        return MetaTensor(result).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else result

    @torch.no_grad()
    def segment(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        *args: Any,
        spacing_mm: Sequence[float] | None = None,
        keep_probabilities: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the call, but returns labels (1, 1, X, Y, Z) and optionally probabilities (1, K, X, Y, Z) in one pass."""
        geometry = _geometry(inputs, spacing_mm)
        volume = (inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs)[0]
        shape, classes = tuple(volume.shape[1:]), self.task.num_classes
        kind = torch.uint8 if classes <= 255 else torch.uint16
        labels = torch.empty(shape, dtype=kind, device=volume.device)
        kept = torch.empty((classes, *shape), device=volume.device) if keep_probabilities else None
        for place, maps in self.slabs(volume, self.grids(volume, geometry), network, *args, **kwargs):
            labels[place] = argmax(maps).to(kind).to(labels.device)
            if kept is not None:
                kept[(slice(None), *place)] = maps.to(kept.device)
        return labels[None, None], None if kept is None else kept[None]

    @property
    def first_pass(self) -> bool:
        """Are the slices of the present pass those along the axis of the task, not mirrored?"""
        return self._turn[0] == 0

    def slabs(
        self,
        volume: torch.Tensor,
        grids: Sequence[SliceGrid],
        network: Callable[..., torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """Yield class probabilities by slabs: index of the slab in (X, Y, Z), and (K, ...).

        They are those of the slices of one grid, or their mean over several. `volume` is (C, X, Y, Z) in [0, 1], RAS,
        `grids` those of :meth:`grids`. Batches and their order are the same in every call.
        """
        if len(grids) == 1:
            return self._pass(volume, grids[0], network, *args, **kwargs)
        return self._mean(volume, grids, network, *args, **kwargs)

    def grids(self, volume: torch.Tensor, geometry: Any) -> list[SliceGrid]:
        """One for each pass: along the axis of the task, along the other two, and mirrored, as the task says.

        `geometry` is the affine (4, 4) of the volume (C, X, Y, Z), or the sides of its voxels (3,) in mm.
        """
        sides = np.asarray(geometry, float)
        sides = np.linalg.norm(sides[:3, :3], axis=0) if sides.ndim == 2 else sides
        tasks = axis_tasks(self.task, volume.shape[1:], sides.tolist())
        grids = [SliceGrid.from_volume(volume, geometry, task) for task in tasks]
        return [*grids, grids[0].mirrored()] if self.task.mirror else grids

    def _mean(
        self, volume: torch.Tensor, grids: Sequence[SliceGrid], *args: Any, **kwargs: Any
    ) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """Slabs of the mean of the class probabilities over several passes."""
        mean = allocate((self.task.num_classes, *volume.shape[1:]), torch.float32, self.memory_budget_mb)
        for number, grid in enumerate(grids):
            self._turn = number, len(grids)
            for place, maps in self._pass(volume, grid, *args, **kwargs):
                part = mean[(slice(None), *place)]
                share = maps.to(mean.device) / len(grids)
                part.copy_(share if number == 0 else part + share)
        self._turn = 0, 1
        across, step = grids[0].axes[0], self.slab_size(grids[0])
        for start in range(0, grids[0].num_slices, step):
            place = tuple(slice(start, start + step) if axis == across else slice(None) for axis in range(3))
            yield place, mean[(slice(None), *place)]

    def _pass(
        self, volume: torch.Tensor, grid: SliceGrid, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """Slabs of the class probabilities of the slices of one grid, on the network's device."""
        device = self._device(network, volume)
        across = grid.axes[0]
        size = self.slab_size(grid)
        shown = bar("segmenting", grid.num_slices, "slice") if self.progress else None
        # batches do not depend on the slabs, so that rounding in the network does not either
        for start in range(0, grid.num_slices, self.batch_size):
            stop = min(start + self.batch_size, grid.num_slices)
            logits = self._logits(grid.inputs(volume, range(start, stop)).to(device), network, args, kwargs)
            for first in range(start, stop, size):
                last = min(first + size, stop)
                maps = grid.restore(logits[first - start : last - start].softmax(1))
                yield (slice(None),) * across + (slice(first, last),), maps
            if shown is not None:
                shown.update(stop - start)
                share((self._turn[0] + stop / grid.num_slices) / self._turn[1])
        if shown is not None:
            shown.close()

    def slab_size(self, grid: SliceGrid) -> int:
        """Slices per slab, from the memory budget."""
        rows, columns = grid.canvas
        height, width = (grid.shape[axis] for axis in grid.axes[1:])
        maps = rows * columns + rows * width + height * width  # softmax, after the first of two products, restored
        bytes_per_slice = 4 * self.task.num_classes * maps + 8 * height * width  # largest, index
        return max(1, min(self.batch_size, int(self.memory_budget_mb * 1e6 // bytes_per_slice)))

    def _logits(
        self, slices: torch.Tensor, network: Callable[..., torch.Tensor], args: tuple, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """(n, C, rows, columns) -> (n, K, rows, columns), float32; in windows if the canvas is larger."""

        def call(windows: torch.Tensor) -> torch.Tensor:
            with self.autocast(windows.device):
                logits = network(windows, *args, **kwargs)
            return logits.to(torch.float32, copy=True)  # blending multiplies in place

        size = self.task.image_size
        if tuple(slices.shape[2:]) == (size, size):
            logits = call(slices)
        else:
            overlap = [window_overlap(side, size, self.overlap) for side in slices.shape[2:]]
            logits = sliding_window_inference(  # type: ignore[assignment]
                slices, (size, size), self.batch_size, call, overlap=overlap, mode="gaussian"
            )
        classes = self.task.num_classes
        if logits.shape[1] != classes:
            raise UsageError(f"the network has {logits.shape[1]} classes, task {self.task.name!r} has {classes}")
        if not torch.isfinite(logits).all():
            remedy = "use bf16 or full precision" if self.amp == "fp16" else "its parameters are damaged"
            raise SamdaError(f"the output of the network is not finite; {remedy}")
        return logits

    def _device(self, network: Callable, volume: torch.Tensor) -> torch.device:
        parameter = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
        return torch.device(self.device) if self.device is not None else getattr(parameter, "device", volume.device)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of the network call on `device`."""
        precision = self.precision(device)
        return torch.autocast(device.type, precision, enabled=precision != torch.float32)

    def precision(self, device: torch.device | str) -> torch.dtype:
        """Of the network call on `device`."""
        if torch.device(device).type == "cpu" and self.amp == "fp16":
            raise UsageError("amp 'fp16' needs a GPU; on a CPU use bf16 or off")
        amp = self.amp if self.amp != "auto" or not computes_bf16(device) else "bf16"
        return PRECISIONS.get(amp or "off", torch.float32)


def window_overlap(side: int, size: int, least: float) -> float:
    """Overlap, at least `least`, of an odd number of evenly spaced windows of `size` pixels on a canvas of `side`.

    With an odd number, one window is centered on the body, as in the training.
    """
    if side <= size:
        return least
    steps = 2 * math.ceil((side - size) / (2 * size * (1 - least)))
    return max(0.0, 1 - (math.ceil((side - size) / steps) + 0.5) / size)  # MONAI rounds the step down


def _geometry(inputs: torch.Tensor, spacing_mm: Sequence[float] | None) -> Any:
    """The affine (4, 4) of a MetaTensor, or the given spacing (3,)."""
    if inputs.ndim != 5 or len(inputs) != 1:
        raise UsageError(f"expected one volume (1, C, X, Y, Z), got {tuple(inputs.shape)}; give volumes one at a time")
    if spacing_mm is not None:
        return spacing_mm
    if not isinstance(inputs, MetaTensor):
        raise UsageError("a tensor without metadata needs spacing_mm, the size of a voxel along X, Y, Z")
    affine = np.asarray(torch.as_tensor(inputs.affine).detach().cpu(), float).reshape(-1, 4, 4)[0]
    order = "".join(map(str, nib.orientations.aff2axcodes(affine)))
    if order != "RAS":
        raise InputError(f"the volume has orientation {order} instead of RAS; preprocess it with build_preprocessing")
    return affine
