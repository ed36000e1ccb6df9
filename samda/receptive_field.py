# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field (ERF): which pixels of an image influence the center of the encoder's feature map.

The theoretical field of an encoder with global attention is always the whole image; adapters differ in how the
influence is spread (arXiv 1701.04128). The measure is RepLKNet's (arXiv 2203.06717): for a feature map O (1, C, h, w)
of an image I (1, 3, H, W),

    s = sum_c ReLU(O[0, c, h // 2, w // 2])
    A = mean over the images of the sum over the colors of ReLU(ds / dI)

The inner ReLU is necessary: without it the sum over the channels of a layer norm has gradient 0. An area is the
smallest centered square that holds more than a share t of the sum of a map P computed from A:

============ ================================== ======================================================================
scale        P                                  meaning
============ ================================== ======================================================================
`log`        log10(A + 1), over its largest     the papers' number. It depends on the size of the features, which
                                                adapters change: compare it with papers only
`mass`       A                                  the influence itself; invariant to a scaling of the network
`normalized` log10(1000 A / largest A + 1)      shows faint influence, as `log` does; invariant to a scaling
============ ================================== ======================================================================

The images are slices of scans, prepared as for a prediction. :func:`write_fields` writes `erf.json` (for each model:
backbone, adapters, version, and for each tap sides and ratios of the areas) and `erf.png` (one map per model and tap in
one color scale: influence over the largest of the map, in decades; the square holds half of the influence).
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
SHARES = (0.2, 0.3, 0.5, 0.99)  # thresholds t, RepLKNet's
DECADES = 3  # that `normalized` shows below the largest influence
HALF = 0.5  # share of the influence in the square that is drawn
LONGEST = 36  # letters of a name above a map; the end of a path tells models apart
PREPARED_BY = ("modality", "window", "percentiles", "spacing", "image_size", "axis", "in_channels", "context")


@dataclasses.dataclass(frozen=True)
class ErfMap:
    """The influence of every pixel, averaged over images."""

    array: np.ndarray  # (H, W) float64, A of the module; not negative
    images: int  # number of images averaged
    skipped: int  # number of further images, whose gradients were not finite


@dataclasses.dataclass(frozen=True)
class Area:
    """A centered square; None where no square within the map holds the share."""

    side: int | None  # in pixels, odd, at least 3
    ratio: float | None  # side^2 / (H W)

    def __str__(self) -> str:
        return "-" if self.side is None or self.ratio is None else f"{self.side} ({100 * self.ratio:.2f} %)"


def measure_erf(network: SamSegmenter, images: Iterable[torch.Tensor], tap: str = "neck") -> ErfMap:
    """The effective receptive field of a network's encoder, adapters included.

    The gradient is taken with respect to the normalized color image that enters the encoder, one image at a time, in
    evaluation mode. The network is left as it was, and no parameter gets a gradient.

    Args:
        network: a segmenter; its device and dtype are used.
        images: (C, H, W) slices in [0, 1], all of one size.
        tap: "block", the output of the last transformer block, before the neck; or "neck", the embedding.

    Raises:
        UsageError: an unknown tap, images of different sizes, or of a size or number of channels that the network
            does not take.
        InputError: no image, or none with finite gradients.
    """
    if tap not in TAPS:
        raise UsageError(f"tap {tap!r} is unknown; {nearest(str(tap), TAPS)}")
    neck = network.image_encoder.get_submodule("neck")  # what enters it leaves the last block
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
    """The measure itself, for any differentiable function from images (1, C, H, W) to feature maps (1, C', h, w).

    Raises:
        UsageError: images of different sizes.
        InputError: no image, or none with finite gradients.
    """
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
    """How large the centered square is that holds a share of the influence: small is concentrated, large is spread.

    The square of side 2 i + 1, i at least 1, is centered at pixel (H // 2, W // 2) and lies within the map; it reaches
    a share t if it holds *more* than t of the sum over the whole map.

    Args:
        erf: a result of :func:`measure_erf`, or an array (H, W), not negative.
        shares: thresholds t in (0, 1).

    Returns:
        scale -> share -> the smallest such square, for all of :data:`SCALES`.
    """
    array = erf.array if isinstance(erf, ErfMap) else np.asarray(erf)
    height, width = array.shape
    rows, columns = (np.abs(np.arange(side) - side // 2) for side in array.shape)
    ring = np.maximum(rows[:, None], columns[None])  # i of the smallest square that holds a pixel
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
    """Evenly spaced slices through the bodies of scans, each as the network sees it.

    Every scan contributes equally many as far as it has them; of more scans than slices, evenly spaced ones contribute
    one each. Where the body is larger than the field of view, the window in the middle is taken.

    Args:
        cases: see :func:`samda.find_cases`.
        task: geometry and intensities.
        count: at most this many slices in all, at least 1.

    Returns:
        (C, H, W) float32 in [0, 1] each, C the task's `network_channels`, H and W its `image_size`; in the order of the
        scans and of the slices within them.

    Raises:
        InputError: a scan cannot be read or used, or no slice of any scan shows a body.
        UsageError: `count` is below 1.
    """
    if count < 1:
        raise UsageError(f"at least one slice is needed, got {count}")
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
    """Refuse tasks (model name -> task) that turn one scan into different slices."""
    (first, reference), *others = tasks.items()
    for name, task in others:
        for key in PREPARED_BY:
            if getattr(task, key) != getattr(reference, key):
                raise UsageError(
                    f"{first} and {name} see different images ({key} {getattr(reference, key)} and "
                    f"{getattr(task, key)}), so their fields cannot be compared; measure them one at a time"
                )


def _slices_of(image: MetaTensor, task: Task, count: int) -> list[torch.Tensor]:
    """Slices of a preprocessed volume (C, X, Y, Z)."""
    volume = image.as_tensor()
    grid = SliceGrid.from_volume(volume, image.affine, task)
    planes = volume.movedim(1 + grid.axes[0], 0).flatten(1)
    shown = [i for i in range(*grid.body) if planes[i].min() < planes[i].max()]  # a constant plane shows nothing
    starts = [(side - task.image_size) // 2 for side in grid.canvas]  # of the middle window
    rows, columns = (slice(start, start + task.image_size) for start in starts)
    return [grid.inputs(volume, shown[i])[0, :, rows, columns] for i in _spread(len(shown), count)]


def _spread(total: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `total`; all of them where there are no more."""
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
    """Write `erf.json`, which begins with `about`, and `erf.png` into a new or empty folder, completely or not at all.

    Raises:
        UsageError: the folder cannot be written, or is not empty.
    """
    try:
        with new_folder(folder) as place:
            write_json(place / "erf.json", {**about, "models": [model.to_dict() for model in models]})
            draw_fields(models).savefig(place / "erf.png", dpi=110, metadata={"Software": None})
    except OSError as error:
        raise UsageError(
            f"nothing can be written to {folder} ({error.strerror or error}); choose another output folder"
        ) from error


def draw_fields(models: Sequence[ModelField]) -> Figure:
    """One row per model, one column per tap, one color scale for all: the share of each map's largest influence."""
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
            title = f"{name}, {tap}".replace("$", r"\$")  # no formula
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
