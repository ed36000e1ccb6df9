# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field (ERF): which pixels of an image move the feature in the middle of the encoder's map.

The theoretical field of an encoder with global attention is the whole image, always; what differs between adapters is
how the influence is spread (arXiv 1701.04128). The measure is RepLKNet's (arXiv 2203.06717): of a feature map O
(1, C, h, w) of an image I (1, 3, H, W),

    s = sum_c ReLU(O[0, c, h // 2, w // 2])
    A = mean over the images of the sum over the colors of ReLU(ds / dI)

The ReLU under the sum is no detail: without it the sum over the channels of a layer norm has gradient 0. An area is
the smallest centered square that holds more than a share t of the sum of a map P made from A:

============ ================================== ======================================================================
scale        P                                  meaning
============ ================================== ======================================================================
`log`        log10(A + 1), over its largest     the papers' number. It depends on the size of the features, which
                                                adapters change: compare it with papers only
`mass`       A                                  the influence itself; a scaled network gives the same
`normalized` log10(1000 A / largest A + 1)      shows what is faint, as `log` does; a scaled network gives the same
============ ================================== ======================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from samda.errors import InputError, UsageError, nearest

if TYPE_CHECKING:
    from samda.networks.segmenter import SamSegmenter

__all__ = ["SCALES", "SHARES", "TAPS", "Area", "ErfMap", "area_ratios", "measure_erf", "pixel_influence", "rescale"]

TAPS = ("block", "neck")  # output of the encoder's last transformer block; output of the neck, the embedding
SCALES = ("log", "mass", "normalized")
SHARES = (0.2, 0.3, 0.5, 0.99)  # thresholds t, RepLKNet's
DECADES = 3  # that `normalized` shows below the largest influence


@dataclasses.dataclass(frozen=True)
class ErfMap:
    """The influence of every pixel, averaged over images.

    Attributes:
        array: (H, W) float64, A of the module; not negative.
        images: how many images it is the mean of.
        skipped: how many more gave gradients that are not finite, and were left out.
    """

    array: np.ndarray
    images: int
    skipped: int


@dataclasses.dataclass(frozen=True)
class Area:
    """A centered square.

    Attributes:
        side: in pixels, odd, at least 3; None where no square within the map holds the share.
        ratio: side^2 / (H W); None likewise.
    """

    side: int | None
    ratio: float | None

    def __str__(self) -> str:
        return "-" if self.side is None or self.ratio is None else f"{self.side} ({100 * self.ratio:.2f} %)"


def measure_erf(network: SamSegmenter, images: Iterable[torch.Tensor], tap: str = "neck") -> ErfMap:
    """The effective receptive field of a network's encoder, adapters included.

    The gradient is taken with regard to the normalized color image that enters the encoder, one image at a time, in
    evaluation. The network stays as it is, and no parameter gets a gradient.

    Args:
        network: a segmenter; its device and number type are used.
        images: (C, H, W) slices in [0, 1], all of one size, as the network takes them.
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
        with _untouched(network):
            normalized = (network.normalize(image[None].to(network.pixel_mean)) for image in images)
            return pixel_influence(features, normalized)
    finally:
        handle.remove()


def pixel_influence(features: Callable[[torch.Tensor], torch.Tensor], images: Iterable[torch.Tensor]) -> ErfMap:
    """The measure itself, for any function from images to feature maps.

    Args:
        features: (1, C, H, W) -> (1, C', h, w), differentiable.
        images: (1, C, H, W) each, all of one size.

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
        raise InputError("there is no image to measure the receptive field on; give at least one")
    if not used:
        raise InputError(f"none of {skipped} images gives finite gradients; are the model's parameters damaged?")
    return ErfMap(total / used, used, skipped)


def rescale(array: np.ndarray, scale: str) -> np.ndarray:
    """P of the module's table from A; a map of zeros stays one.

    Args:
        array: (H, W), not negative.
        scale: "log", "mass" or "normalized".

    Raises:
        UsageError: another scale.
    """
    if scale not in SCALES:
        raise UsageError(f"scale {scale!r} is unknown; {nearest(str(scale), SCALES)}")
    array = np.asarray(array, np.float64)
    if scale == "mass" or not array.any():
        return array
    if scale == "normalized":
        return np.log10(array / array.max() * 10**DECADES + 1)
    return np.log1p(array) / np.log1p(array.max())  # the base falls out; exact for small influences, too


def area_ratios(erf: ErfMap | np.ndarray, shares: Iterable[float] = SHARES) -> dict[str, dict[float, Area]]:
    """How large the middle is that holds a share of the influence: small is concentrated, large is spread.

    The square of side 2 i + 1, i at least 1, is centered at pixel (H // 2, W // 2) and lies within the map; it reaches
    a share t where it holds *more* than t of the sum over the whole map.

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


@contextlib.contextmanager
def _untouched(network: torch.nn.Module) -> Iterator[None]:
    """Evaluation without gradients of parameters, which would only cost memory; afterwards all is as it was."""
    training, before = network.training, [(p, p.requires_grad) for p in network.parameters()]
    network.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        network.train(training)
