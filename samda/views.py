# SPDX-License-Identifier: Apache-2.0
"""Views: random changes of slices that simulate other scanners, protocols and patient sizes.

A view changes only intensities, so all views of a slice correspond pixel by pixel. Five families act on images in
[0, 1]:

========= =================================================================== ===================================
family    change                                                              cause
========= =================================================================== ===================================
window    x -> (x - 1/2) width + 1/2 + shift                                  contrast medium, calibration, window
gamma     x -> x^gamma                                                        tissue contrast, MR weighting
noise     x + sigma n, n standard normal                                      dose, coil, field strength
blur      Gaussian of sigma pixels                                            reconstruction kernel, resolution
bias      x exp(b), b a smooth quadratic surface                              coil sensitivity, beam hardening
========= =================================================================== ===================================

Flips with exact inverse are available but off by default, because organs are lateralized: a mirrored abdomen has the
liver on the left, and swapping "kidney_left" with "kidney_right" corrects only the names.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from samda.task import mirrored_name

FAMILIES = ("window", "gamma", "noise", "blur", "bias")


@dataclasses.dataclass(frozen=True)
class View:
    """One view: a family ("identity" for the slice itself), its strengths, and an optional left-right flip."""

    family: str = "identity"
    strengths: tuple[float, ...] = ()
    seed: int = 0
    flip: bool = False

    def describe(self) -> dict[str, Any]:
        """Plain values for the record."""
        return {"family": self.family, "strengths": [round(s, 6) for s in self.strengths], "flip": self.flip}


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from printable values, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_views(
    count: int, seed: int, families: Sequence[str] | None = None, strength: float = 1.0, flips: bool = False
) -> list[View]:
    """`count` views: the identity first, then the families in turn, with strengths drawn from `seed`.

    A strength is drawn from the outer half of its range with alternating sign per round, so that eight views cover both
    ends. None takes all families; `strength` is a factor; with `flips`, every second view is mirrored left to right.
    """
    families = FAMILIES if families is None else families
    generator = torch.Generator().manual_seed(seed)
    start = 1 if torch.rand((), generator=generator) < 0.5 else -1
    views = [View()]
    for index in range(count - 1):
        turn, place = divmod(index, len(families))
        sign = start * (-1) ** (turn + place)
        draw = 0.5 + 0.5 * torch.rand(4, generator=generator)
        flip = flips and index % 2 == 0
        views.append(View(families[place], _strengths(families[place], sign, draw, strength), seed + index + 1, flip))
    return views


def _strengths(family: str, sign: int, draw: torch.Tensor, strength: float) -> tuple[float, ...]:
    """The strengths of one view; `draw` is four numbers in [1/2, 1]."""
    a, b = float(draw[0]) * strength, float(draw[1]) * strength
    surface = tuple(0.4 * sign * strength * float(d) * side for d, side in zip(draw, (1, -1, 1, -1), strict=True))
    return {
        "window": (2.0 ** (0.5 * sign * a), -0.1 * sign * b),  # width factor, shift
        "gamma": (2.0 ** (0.8 * sign * a),),
        "noise": (0.08 * a,),
        "blur": (1.5 * a,),  # sigma in pixels
        "bias": surface,
    }[family]


def apply_view(view: View, images: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """Apply a view to slices (N, C, H, W) in [0, 1].

    Noise depends on `indices`, the positions of the slices in the volume, and not on the batches.
    """
    images = _change(view, images, indices).clamp(0.0, 1.0) if view.family != "identity" else images
    return images.flip(-1) if view.flip else images


def _change(view: View, images: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    if view.family == "window":
        width, shift = view.strengths
        return (images - 0.5) * width + 0.5 + shift
    if view.family == "gamma":
        return images.clamp_min(0.0) ** view.strengths[0]
    if view.family == "noise":
        return images + view.strengths[0] * _noise(images, view.seed, indices)
    if view.family == "blur":
        return _blur(images, view.strengths[0])
    return images * _bias_field(images, view.strengths).exp()


def _noise(images: torch.Tensor, seed: int, indices: Sequence[int]) -> torch.Tensor:
    """Standard normal noise (N, C, H, W), drawn slice by slice on the CPU."""
    drawn = [
        torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed_of(seed, int(i)))) for i in indices
    ]
    return torch.stack(drawn).to(images)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian of `sigma` pixels, separable, borders repeated."""
    radius = max(1, round(3 * sigma))
    radius = min(radius, min(images.shape[-2:]) - 1)
    x = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (x / max(sigma, 1e-6)) ** 2)  # strength 0 leaves the slice
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    for shape, pad in (((1, 1, -1, 1), (0, 0, radius, radius)), ((1, 1, 1, -1), (radius, radius, 0, 0))):
        weight = kernel.view(shape).expand(channels, 1, *kernel.view(shape).shape[2:])
        images = F.conv2d(F.pad(images, pad, mode="replicate"), weight, groups=channels)
    return images


def _bias_field(images: torch.Tensor, strengths: Sequence[float]) -> torch.Tensor:
    """A quadratic surface of zero mean over the image, (H, W); `strengths` weigh y, x, y^2 and x y on [-1, 1]."""
    y = torch.linspace(-1, 1, images.shape[-2], dtype=images.dtype, device=images.device).view(-1, 1)
    x = torch.linspace(-1, 1, images.shape[-1], dtype=images.dtype, device=images.device).view(1, -1)
    a, b, c, d = strengths
    field = a * y + b * x + c * (y * y - 1 / 3) + d * x * y
    return field - field.mean()


def mirrored_classes(classes: Sequence[str]) -> list[int]:
    """For every class its mirrored class: "kidney_left" for "kidney_right", else itself."""
    index = {name: k for k, name in enumerate(classes)}
    return [index.get(mirrored_name(name), k) for k, name in enumerate(classes)]


def restore_view(view: View, logits: torch.Tensor, mirror: Sequence[int]) -> torch.Tensor:
    """Map logits (N, K, h, w) of a view back to the slice: the inverse of its flip, lateralized classes swapped."""
    return logits.flip(-1)[:, list(mirror)] if view.flip else logits
