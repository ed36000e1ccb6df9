# SPDX-License-Identifier: Apache-2.0
"""What the decoder makes of images: mean and spread of every channel after each of its layers, adapters included.

A model stores them for its training slices, so that a later adaptation can bring the features of a strange scanner back
to where the class head expects them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn as nn

from samda.networks.segmenter import SamSegmenter

__all__ = ["FeatureTap", "feature_statistics", "moments"]

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
        ...     mean, std = moments(tap.features[0])
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


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C,) of features (..., C) over all other axes; the deviation is at least 1e-6."""
    values = features.flatten(0, -2).float()
    return values.mean(0), values.var(0, unbiased=False).clamp_min(EPS**2).sqrt()


@torch.no_grad()
def feature_statistics(
    network: SamSegmenter, items: Sequence[Mapping[str, Any]] | Any, indices: Sequence[int], batch_size: int = 8
) -> list[dict[str, list[float]]]:
    """Moments of every decoder layer over some slices, evenly chosen where there are more than 256.

    Args:
        network: the trained network.
        items: `items[i]` holds "embedding" (256, h, w) or "image" (C, H, W).
        indices: which of them; those with foreground, as they are without augmentation.
        batch_size: slices decoded at once.

    Returns:
        Per layer {"mean": C values, "std": C values}; plain numbers for JSON.
    """
    step = max(1, -(-len(indices) // MOST))
    chosen = list(indices)[::step]
    sums: list[list[torch.Tensor]] = []
    network.eval()
    with FeatureTap(network) as tap:
        for batch in _batches([items[i] for i in chosen], batch_size):
            embedded = "embedding" in batch[0]
            inputs = torch.stack([item["embedding" if embedded else "image"] for item in batch])
            inputs = inputs.to(network.pixel_mean.device)
            tap.clear()
            network.decode(inputs if embedded else network.encode(inputs))
            layers = [torch.cat(kept).flatten(0, -2).double() for kept in tap.features]
            found = [torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)]) for x in layers]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    result = []
    for count, total, square in sums:
        mean = total / count
        std = (square / count - mean.square()).clamp_min(EPS**2).sqrt()
        result.append({"mean": _short(mean), "std": _short(std)})
    return result


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _short(values: torch.Tensor) -> list[float]:
    """Six significant digits."""
    return [float(f"{value:.6g}") for value in values.tolist()]
