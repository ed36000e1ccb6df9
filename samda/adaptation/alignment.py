# SPDX-License-Identifier: Apache-2.0
"""Alignment of features: the scan's features get the moments that the training slices had.

Another scanner shifts and stretches the channels that the class head reads. Networks with batch norm re-estimate their
moments at test time; SAM has none, so the adapter is asked to restore them, in the way of activation matching
(ActMAD, arXiv 2211.12870), with one mean and one deviation per channel instead of one per place: scans show other
slices of other bodies. Unlike entropy it has no trivial answer, so it needs no brake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from samda.features import moments

__all__ = ["FeatureAlignment"]


class FeatureAlignment:
    """Distance of features from the source's, per decoder layer l and channel c:

        L = mean_l mean_c [ |mu_lc - mu0_lc| / sigma0_lc + |ln(sigma_lc / sigma0_lc)| ]

    Args:
        source: per layer {"mean", "std"}, see :func:`samda.features.feature_statistics`.
    """

    def __init__(self, source: Sequence[Mapping[str, Sequence[float]]]) -> None:
        self.source = [tuple(torch.tensor(layer[key]) for key in ("mean", "std")) for layer in source]

    def __call__(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The distance, a scalar; features per layer (..., C)."""
        terms = []
        for layer, (mean0, std0) in zip(features, self.source, strict=True):
            mean, std = moments(layer)
            mean0, std0 = mean0.to(mean), std0.to(mean)
            terms.append(((mean - mean0).abs() / std0).mean() + (std / std0).log().abs().mean())
        return torch.stack(terms).mean()
