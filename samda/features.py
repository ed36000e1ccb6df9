# SPDX-License-Identifier: Apache-2.0
"""What the decoder makes of images: mean and spread of every channel after each of its layers, class by class.

A model stores them for its training slices, so that a later adaptation can bring the features of a strange scanner back
to where the class head expects them. By class, since a scan may show other organs than the training slices did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.networks.segmenter import SamSegmenter

__all__ = ["FeatureTap", "class_shares", "class_sums", "feature_statistics"]

MOST = 256  # slices measured: moments of 256 channels over their 16 x 16 places or more are exact enough
EPS = 1e-6


class FeatureTap:
    """Collects the image side of the decoder's sites, with gradients, while it is open.

    Args:
        network: the segmenter.

    Attributes:
        features: per decoder layer the outputs (B, HW, C) of every pass since :meth:`clear`.

    Example:
        >>> with FeatureTap(network) as tap:  # doctest: +SKIP
        ...     network.decode(embedding)
        ...     mean = tap.features[0][0].mean((0, 1))
    """

    def __init__(self, network: SamSegmenter) -> None:
        self.sites = list(network.mask_decoder.transformer.sites)
        self.features: list[list[torch.Tensor]] = [[] for _ in self.sites]
        self._handles: list[Any] = []

    def clear(self) -> None:
        """Forget what was collected."""
        for kept in self.features:
            kept.clear()

    def __enter__(self) -> FeatureTap:
        for site, kept in zip(self.sites, self.features, strict=True):

            def keep(module: nn.Module, inputs: Any, outputs: Any, kept: list[torch.Tensor] = kept) -> None:
                kept.append(outputs[1])  # (tokens, image)

            self._handles.append(site.register_forward_hook(keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.clear()


def class_shares(labels: torch.Tensor, num_classes: int, grid: tuple[int, int]) -> torch.Tensor:
    """Share of each class in each place of the decoder's grid.

    Args:
        labels: (B, H, W) class indices.
        num_classes: K.
        grid: (h, w) of the features; H and W are multiples of them.

    Returns:
        (B, h w, K), summing to 1 over K.
    """
    rows, columns = labels.shape[1] // grid[0], labels.shape[2] // grid[1]
    maps = F.one_hot(labels.long(), num_classes).movedim(-1, 1).float()
    return F.avg_pool2d(maps, (rows, columns)).flatten(2).transpose(1, 2)


def class_sums(features: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (K,), weighted sum (K, C) and weighted sum of squares (K, C) of features (B, n, C), shares (B, n, K)."""
    weights, values = shares.flatten(0, 1).T, features.flatten(0, 1)
    return weights.sum(1), weights @ values, weights @ values.square()


@torch.no_grad()
def feature_statistics(
    network: SamSegmenter, items: Any, indices: Sequence[int], batch_size: int = 8
) -> list[dict[str, Any]]:
    """Moments of every decoder layer and class over some slices, evenly chosen where there are more than 256.

    Args:
        network: the trained network.
        items: `items[i]` holds "label" (1, H, W) class indices, and "embedding" (256, h, w) or "image" (C, H, W).
        indices: which of them; those with foreground, as they are without augmentation.
        batch_size: slices decoded at once.

    Returns:
        Per layer {"mean", "std"}: K rows of C values each, None for a class that no slice holds; plain values for JSON.
    """
    step = max(1, -(-len(indices) // MOST))
    sums: list[list[torch.Tensor]] = []
    device = network.pixel_mean.device
    network.eval()
    with FeatureTap(network) as tap:
        for batch in _batches([items[i] for i in list(indices)[::step]], batch_size):
            embedded = "embedding" in batch[0]
            inputs = torch.stack([item["embedding" if embedded else "image"] for item in batch]).to(device)
            embedding = inputs if embedded else network.encode(inputs)
            tap.clear()
            network.decode(embedding)
            labels = torch.stack([item["label"][0] for item in batch]).to(device)
            shares = class_shares(labels, network.num_classes, (embedding.shape[2], embedding.shape[3])).double()
            found = [list(class_sums(torch.cat(kept).double(), shares)) for kept in tap.features]
            sums = [_added(*pair) for pair in zip(sums, found, strict=True)] if sums else found
    return [_moments(*layer) for layer in sums]


def _added(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _moments(weight: torch.Tensor, total: torch.Tensor, square: torch.Tensor) -> dict[str, Any]:
    mean = total / weight[:, None]
    std = (square / weight[:, None] - mean.square()).clamp_min(EPS**2).sqrt()
    there = (weight > 0).tolist()
    return {
        name: [_short(row) if held else None for row, held in zip(rows, there, strict=True)]
        for name, rows in (("mean", mean), ("std", std))
    }


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _short(values: torch.Tensor) -> list[float]:
    """Five significant digits: more would only make the file longer."""
    return [float(f"{value:.5g}") for value in values.tolist()]
