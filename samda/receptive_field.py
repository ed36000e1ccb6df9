# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field (ERF): which pixels of an image influence the center of the encoder's feature map.

The theoretical field of an encoder with global attention is always the whole image; adapters differ in how the
influence is spread (arXiv 1701.04128). The measure is that of RepLKNet (arXiv 2203.06717): for a feature map O (1, C,
h, w) of an image I (1, 3, H, W),

    s = sum_c ReLU(O[0, c, h // 2, w // 2])
    A = mean over the images of the sum over the colors of ReLU(ds / dI)

The inner ReLU is necessary: without it the sum over the channels of a layer norm has gradient 0. An area is the
smallest centered square with more than a share t of the sum of a map P computed from A:

============ ================================== ======================================================================
scale        P                                  meaning
============ ================================== ======================================================================
`log`        log10(A + 1), over its largest     measure of the papers. It depends on the scale of the features, which
                                                adapters change: compare it with papers only
`mass`       A                                  the influence itself; invariant to a scaling of the network
`normalized` log10(1000 A / largest A + 1)      shows faint influence, as `log` does; invariant to a scaling
============ ================================== ======================================================================

The images are preprocessed slices of scans. :func:`write_fields` writes `erf.json` (for each model: backbone, adapters,
version, and for each tap sides and ratios of the areas) and `erf.png` (one map per model and tap in one color scale:
influence relative to the maximum of the map, in decades; the square contains half of the influence).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.utils import eval_mode

from samda.adapters.base import attached
from samda.data.datalists import Case
from samda.data.slices import SliceGrid
from samda.data.transforms import build_preprocessing
from samda.errors import InputError, UsageError, nearest
from samda.io import new_folder, plain, write_json
from samda.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from samda.networks.segmenter import SamSegmenter

TAPS = ("block", "neck")  # output of the encoder's last transformer block; output of the neck, the embedding
SCALES = ("log", "mass", "normalized")
SHARES = (0.2, 0.3, 0.5, 0.99)  # thresholds t of RepLKNet
DECADES = 3  # shown by `normalized` below the maximum
HALF = 0.5  # share of the influence in the drawn square
LONGEST = 36  # characters of a name above a map; the end of a path is kept
PREPARED_BY = ("modality", "window", "percentiles", "spacing", "image_size", "axis", "in_channels", "context")


@dataclasses.dataclass(frozen=True)
class ErfMap:
    """The influence of every pixel, averaged over images."""

    array: np.ndarray  # (H, W) float64, A of the module; not negative
    images: int  # number of images averaged
    skipped: int  # number of further images, whose gradients were not finite


@dataclasses.dataclass(frozen=True)
class Area:
    """A centered square; None if no square within the map has the share."""

    side: int | None  # in pixels, odd, at least 3
    ratio: float | None  # side^2 / (H W)

    def __str__(self) -> str:
        return "-" if self.side is None or self.ratio is None else f"{self.side} ({100 * self.ratio:.2f} %)"


def measure_erf(network: SamSegmenter, images: Iterable[torch.Tensor], tap: str = "neck") -> ErfMap:
    """The effective receptive field of a network's encoder, adapters included.

    The gradient is that with respect to the normalized color image at the input of the encoder, one image at a time, in
    evaluation mode. The network is not changed, and no parameter gets a gradient.

    Args:
        network: a segmenter; its device and dtype are used.
        images: (C, H, W) slices in [0, 1], all of one size.
        tap: "block", the output of the last transformer block, before the neck; or "neck", the embedding.

    Raises:
        InputError: no image, or none with finite gradients.
    """
    if tap not in TAPS:
        raise UsageError(f"tap {tap!r} is unknown; {nearest(str(tap), TAPS)}")
    neck = network.image_encoder.get_submodule("neck")  # its input is the output of the last block
    kept: list[torch.Tensor] = []
    handle = neck.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0] if tap == "block" else output))

    def features(x: torch.Tensor) -> torch.Tensor:
        kept.clear()
        network.image_encoder(x)
        return kept.pop()

    try:
        with eval_mode(network):
            normalized = (network.normalize(image[None].to(network.pixel_mean)) for image in images)
            return pixel_influence(features, normalized)
    finally:
        handle.remove()


def pixel_influence(features: Callable[[torch.Tensor], torch.Tensor], images: Iterable[torch.Tensor]) -> ErfMap:
    """The measure for any differentiable function from images (1, C, H, W) to feature maps (1, C', h, w)."""
    total: np.ndarray | None = None
    used = skipped = 0
    for image in images:
        x = image.detach().requires_grad_()
        with torch.enable_grad():
            maps = features(x)
            score = maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(score, x)
        influence = gradient[0].relu().sum(0).cpu().numpy().astype(np.float64)
        if total is None:
            total = np.zeros_like(influence)
        if influence.shape != total.shape:
            raise UsageError(f"images must have one size, got {total.shape} and {influence.shape}; crop or pad them")
        if torch.isfinite(gradient).all():
            total += influence
            used += 1
        else:
            skipped += 1
    if total is None:
        raise InputError("no image to measure the receptive field on; give at least one")
    if not used:
        raise InputError(f"none of {skipped} images gives finite gradients; are the model's parameters damaged?")
    return ErfMap(total / used, used, skipped)


def rescale(array: np.ndarray, scale: str) -> np.ndarray:
    """P of the module's table from A (H, W); a map of zeros stays zero."""
    if scale not in SCALES:
        raise UsageError(f"scale {scale!r} is unknown; {nearest(str(scale), SCALES)}")
    array = np.asarray(array, np.float64)
    if scale == "mass" or not array.any():
        return array
    if scale == "normalized":
        return np.log10(array / array.max() * 10**DECADES + 1)
    return np.log1p(array) / np.log1p(array.max())  # the base cancels; exact for small influences too


def area_ratios(erf: ErfMap | np.ndarray, shares: Iterable[float] = SHARES) -> dict[str, dict[float, Area]]:
    """The smallest centered square with a share of the influence, as scale -> share -> area, for all :data:`SCALES`.

    The square of side 2 i + 1, i at least 1, is centered at pixel (H // 2, W // 2) and within the map; it reaches a
    share t in (0, 1) if it contains *more* than t of the sum over the whole map. `erf` is a result of
    :func:`measure_erf`, or an array (H, W), not negative.
    """
    array = erf.array if isinstance(erf, ErfMap) else np.asarray(erf)
    height, width = array.shape
    rows, columns = (np.abs(np.arange(side) - side // 2) for side in array.shape)
    ring = np.maximum(rows[:, None], columns[None])  # i of the smallest square that contains a pixel
    largest = min(height, width) // 2 - 1
    found: dict[str, dict[float, Area]] = {}
    for scale in SCALES:
        values = rescale(array, scale)
        inside = np.cumsum(np.bincount(ring.ravel(), weights=values.ravel()))
        found[scale] = {}
        for share in shares:
            reached = np.flatnonzero(inside[1 : largest + 1] > share * inside[-1])
            side = 2 * int(reached[0]) + 3 if len(reached) else None
            found[scale][share] = Area(side, None if side is None else side**2 / (height * width))
    return found


def body_slices(cases: Sequence[Case], task: Task, count: int) -> list[torch.Tensor]:
    """At most `count` evenly spaced, preprocessed slices (C, H, W) through the bodies of scans.

    All scans contribute the same number of slices if they have as many; if there are more scans than slices, evenly
    spaced scans contribute one each. If the body is larger than the field of view, the central window is taken.
    C is the task's `network_channels`, H and W are its `image_size`.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    scans = [cases[i] for i in _spread(len(cases), count)]
    preprocessing = build_preprocessing(task, labels=False)
    slices: list[torch.Tensor] = []
    for k, case in enumerate(scans):
        image = preprocessing({key: value for key, value in case.items() if key != "label"})["image"]
        slices += _slices_of(image, task, count // len(scans) + (k < count % len(scans)))
    if not slices:
        raise InputError(f"no slice of {len(scans)} scans shows a body; check the files and the task's modality")
    return slices


def check_same_slices(tasks: dict[str, Task]) -> None:
    """Refuse tasks (model name -> task) with different preprocessing."""
    (first, reference), *others = tasks.items()
    for name, task in others:
        for key in PREPARED_BY:
            if getattr(task, key) != getattr(reference, key):
                raise UsageError(
                    f"{first} and {name} have different preprocessing ({key} {getattr(reference, key)} and "
                    f"{getattr(task, key)}), so their fields cannot be compared; measure them one at a time"
                )


def _slices_of(image: MetaTensor, task: Task, count: int) -> list[torch.Tensor]:
    """Slices of a preprocessed volume (C, X, Y, Z)."""
    volume = image.as_tensor()
    grid = SliceGrid.from_volume(volume, image.affine, task)
    planes = volume.movedim(1 + grid.axes[0], 0).flatten(1)
    shown = [i for i in range(*grid.body) if planes[i].min() < planes[i].max()]  # a constant plane has no influence
    starts = [(side - task.image_size) // 2 for side in grid.canvas]  # of the middle window
    rows, columns = (slice(start, start + task.image_size) for start in starts)
    return [grid.inputs(volume, shown[i])[0, :, rows, columns] for i in _spread(len(shown), count)]


def _spread(total: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `total`, at most all."""
    count = min(total, count)
    return [int(i) for i in (np.arange(count) + 0.5) * total // max(count, 1)]


@dataclasses.dataclass(frozen=True)
class ModelField:
    """The fields of one model."""

    name: str  # of the model, as shown
    version: str | None  # of the model folder; None for the base without adapters
    backbone: str | dict[str, Any]  # as in `adapter.json`
    adapters: dict[str, dict[str, Any]]  # adapter name -> settings; empty for the base
    fields: Mapping[str, ErfMap]  # tap -> map
    areas: Mapping[str, Mapping[str, Mapping[float, Area]]]  # tap -> scale -> share -> area

    @classmethod
    def of(cls, network: SamSegmenter, fields: Mapping[str, ErfMap], name: str, version: str | None) -> ModelField:
        """The fields of a network, whose backbone and adapters are read from it."""
        adapters = {key: config.to_dict() for key, config in attached(network).items()}
        areas = {tap: area_ratios(field) for tap, field in fields.items()}
        return cls(name, version, network.config.to_json(), adapters, fields, areas)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the maps."""
        taps = {
            tap: {
                "images": field.images,
                "skipped": field.skipped,
                "largest": float(field.array.max()),
                "areas": {
                    scale: {str(share): dataclasses.asdict(area) for share, area in areas.items()}
                    for scale, areas in self.areas[tap].items()
                },
            }
            for tap, field in self.fields.items()
        }
        about = {"model": self.name, "version": self.version, "backbone": self.backbone, "adapters": self.adapters}
        return plain(about | {"taps": taps})


def write_fields(folder: str | Path, models: Sequence[ModelField], about: Mapping[str, Any]) -> None:
    """Write `erf.json`, which begins with `about`, and `erf.png` to a new or empty folder."""
    try:
        with new_folder(folder) as place:
            write_json(place / "erf.json", {**about, "models": [model.to_dict() for model in models]})
            draw_fields(models).savefig(place / "erf.png", dpi=110, metadata={"Software": None})
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror or error}); choose another output folder"
        ) from error


def draw_fields(models: Sequence[ModelField]) -> Figure:
    """One row per model and one column per tap; influence relative to the maximum of each map, in one color scale."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    taps = list(models[0].fields)
    side = 3.3  # inches
    figure = Figure(figsize=(side * len(taps) + 0.9, (side + 0.3) * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(taps), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, tap in zip(row, taps, strict=True):
            array, area = model.fields[tap].array, model.areas[tap]["mass"][HALF]
            image = axes.imshow(rescale(array, "normalized"), cmap="magma", vmin=0, vmax=np.log10(10**DECADES + 1))
            name = model.name if len(model.name) <= LONGEST else "..." + model.name[3 - LONGEST :]
            title = f"{name}, {tap}".replace("$", r"\$")  # not a formula
            if area.side is not None:
                top, left = (n // 2 - area.side // 2 - 0.5 for n in array.shape)
                axes.add_patch(Rectangle((left, top), area.side, area.side, fill=False, color="cyan", linewidth=1))
                title += f"\nhalf within {area.side} px"
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    shares = [0.0, *(10.0**-k for k in range(DECADES, -1, -1))]
    bar = figure.colorbar(image, ax=panels, ticks=[float(np.log10(10**DECADES * s + 1)) for s in shares], shrink=0.8)
    bar.ax.set_yticklabels([f"{share:g}" for share in shares])
    bar.set_label("influence, share of the largest")
    return figure
