# SPDX-License-Identifier: Apache-2.0
"""Fold adapters into a network for good, for files that leave samda; what can be undone is :func:`merge`."""

from __future__ import annotations

import torch
import torch.nn as nn

from samda.adapters.base import merge, modules, sites
from samda.adapters.sites import LinearSite, NormSite

__all__ = ["fold"]


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Write what merges into the base weights themselves and drop the adapters that it came from.

    Adapters that are modules stay, their own parts folded into fewer where possible. There is no way back: give a copy.

    Raises:
        AdapterError: a merged weight is not finite; the model is unchanged.
    """
    merge(model)
    for site in sites(model).values():
        if isinstance(site, LinearSite | NormSite) and site.merged:
            for name in ("weight", "bias"):
                merged = getattr(site, f"merged_{name}", None)
                if merged is not None:
                    getattr(site, name).copy_(merged)
            site.unmerge()
    for path, site, adapter in list(modules(model)):
        if adapter.mergeable and isinstance(site, LinearSite | NormSite):
            del site.adapters[path.rpartition(".")[2]]
