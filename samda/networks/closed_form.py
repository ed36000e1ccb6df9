# SPDX-License-Identifier: Apache-2.0
"""Weighted ridge regression from features to classes, from sufficient statistics of one pass.

With the features u = (x - mean) / std of a pixel, a constant 1 and the class fractions y of the pixel,

    W = (sum w [u, 1] [u, 1]^T + R)^-1 sum w [u, 1] y^T,    R = ridge * sum w * diag(1, ..., 1, 0)

mean and std are those of all pixels. Sums are collected in the frame of the first batch, where they are well
conditioned, and transformed at the end, so that features are computed only once.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
import torch.nn.functional as F

from samda.errors import InputError

LEAST_STD = 1e-3


@dataclasses.dataclass(frozen=True)
class RidgeSolution:
    """`scores = ((x - mean) / std) @ weight + bias`, about 1 for the class of a pixel and 0 for the others."""

    mean: torch.Tensor  # (C,)
    std: torch.Tensor  # (C,)
    weight: torch.Tensor  # (C, K)
    bias: torch.Tensor  # (K,)


class RidgeStatistics:
    """Sums of all pixels added so far.

    The weight of a pixel is (pixels of background / pixels of its class)^(1/2), which keeps small classes from being
    ignored. Only `background_share` of the pixels that are purely background are used, with as much more weight.

    With partial labels each class has its own sums over the pixels that are known to be of it or not, and the score of
    background is 1 less those of the classes, as it is by itself where all is known.

    Args:
        class_counts: (K,) pixels of each class in the training labels.
        background_share: in (0, 1].
        ridge: strength of the regularization.
        possible: (256, K), see :meth:`samda.data.labels.PartialLabels.possible`.

    Raises:
        InputError: no foreground.
    """

    def __init__(
        self,
        class_counts: torch.Tensor,
        background_share: float = 0.25,
        ridge: float = 1e-2,
        possible: torch.Tensor | None = None,
    ) -> None:
        if class_counts[1:].sum() == 0:
            raise InputError("the closed-form start needs foreground, the training labels hold none; check the labels")
        counts = class_counts.double().cpu()
        self.class_weights = (counts[0].clamp_min(1) / counts.clamp_min(1)).sqrt()
        self.background_share, self.ridge, self.possible = background_share, ridge, possible
        self._generator = torch.Generator().manual_seed(0)
        self._frame: tuple[torch.Tensor, torch.Tensor] | None = None
        self.pixels = 0

    @torch.no_grad()
    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add pixels: features (B, C, h, w), labels (B, H, W) of class indices, H and W multiples of h and w."""
        classes, size = len(self.class_weights), features.shape[-2:]
        x = features.float().permute(0, 2, 3, 1).flatten(0, 2)
        gaps = None
        if self.possible is not None:  # the largest value of a place: a place that holds an ignored pixel is ignored
            gaps = torch.where(labels < classes, 0, labels).float()
            gaps = F.adaptive_max_pool2d(gaps, size).flatten().long()
            labels = torch.where(labels < classes, labels, 0)
        maps = F.one_hot(labels.long(), classes).permute(0, 3, 1, 2).float()
        y = F.interpolate(maps, size=size, mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        if self._frame is None:
            self._frame = x.mean(0), x.std(0).clamp_min(LEAST_STD)
            width = x.shape[1] + 1
            self.total, self.square = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
            self.sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = defaultdict(  # what pixels may be -> their sums
                lambda: (
                    torch.zeros(width, width, dtype=torch.float64),
                    torch.zeros(width, classes, dtype=torch.float64),
                )
            )
        z = (x - self._frame[0]) / self._frame[1]
        self.pixels += len(z)
        self.total += z.sum(0).double().cpu()
        self.square += z.square().sum(0).double().cpu()
        weight = y @ self.class_weights.to(y)
        background = y[:, 0] == 1
        drawn = torch.rand(len(y), generator=self._generator).to(y.device) < self.background_share
        weight = torch.where(background, weight / self.background_share, weight)
        keep = drawn | ~background
        z, y, weight = F.pad(z[keep], (0, 1), value=1.0), y[keep], weight[keep, None]
        for gap in [0] if gaps is None else gaps.unique().tolist():
            chosen = slice(None) if gaps is None else gaps[keep] == gap
            gram, cross = self.sums[gap]
            gram += ((z[chosen] * weight[chosen]).T @ z[chosen]).double().cpu()
            cross += ((z[chosen] * weight[chosen]).T @ y[chosen]).double().cpu()

    def solve(self) -> RidgeSolution:
        """The solution of everything that was added.

        Raises:
            InputError: nothing was added, or features that are not finite.
        """
        if self._frame is None:
            raise InputError("the closed-form start was given no slices; add labeled slices first")
        center, scale = (moment.double().cpu() for moment in self._frame)
        mean = self.total / self.pixels
        std = (self.square / self.pixels - mean.square()).clamp_min(0).sqrt()
        std = torch.maximum(std, LEAST_STD / scale)
        transform = torch.block_diag(torch.diag(1 / std), torch.ones(1, 1, dtype=torch.float64))
        transform[:-1, -1] = -mean / std
        classes = range(len(self.class_weights))
        if self.possible is None:
            weight = self._weights(transform, list(self.sums.values()))
        else:
            known = [[s for gap, s in self.sums.items() if not gap or not self.possible[gap, k]] for k in classes]
            weight = torch.stack([self._weights(transform, known[k])[:, k] for k in classes[1:]], 1)
            rest = -weight.sum(1, keepdim=True)
            rest[-1] += 1
            weight = torch.cat([rest, weight], 1)
        solution = (center + scale * mean, scale * std, weight[:-1], weight[-1])
        return RidgeSolution(*(part.float() for part in solution))

    def _weights(self, transform: torch.Tensor, sums: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """(C + 1, K) of these sums, 0 of none, in the standardized frame."""
        if not sums:
            return transform.new_zeros(len(transform), len(self.class_weights))
        gram, cross = (sum(parts) for parts in zip(*sums, strict=True))
        gram, cross = transform @ gram @ transform.T, transform @ cross
        gram.diagonal()[:-1] += self.ridge * gram[-1, -1]
        if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            raise InputError("the closed-form start met features that are not finite; check scans and base weights")
        return torch.linalg.solve(gram, cross)
