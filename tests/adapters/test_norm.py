# SPDX-License-Identifier: Apache-2.0
"""Norm deltas: every LayerNorm of encoder blocks and decoder, or half of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import move, noise

from samda.adapters import base
from samda.adapters.attach import attach, build_configs
from samda.adapters.sites import NormSite, SiteInfo
from samda.errors import AdapterError, UsageError


def test_formula_and_merge() -> None:
    model = nn.Sequential(NormSite(6, SiteInfo("encoder.0.norm1", "norm", "norm", 0, 6), eps=1e-3))
    attach(model, build_configs({"norm": {}}))
    move(model)
    site, x = model[0], noise(4, 6)
    adapter = site.adapters["norm"]
    centered = x - x.mean(-1, keepdim=True)
    normal = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = normal * (site.weight + adapter.scale) + site.bias + adapter.shift
    assert torch.allclose(model(x), expected, atol=1e-6)
    base.merge(model)
    assert torch.equal(site.merged_weight, site.weight + adapter.scale)
    assert torch.equal(model(x), F.layer_norm(x, (6,), site.weight + adapter.scale, site.bias + adapter.shift, 1e-3))
    with torch.no_grad():
        adapter.shift.fill_(float("inf"))
    base.unmerge(model)
    with pytest.raises(AdapterError, match=r"encoder\.0\.norm1: merging gives values that are not finite"):
        base.merge(model)
    assert not base.is_merged(model)


@pytest.mark.parametrize(
    ("where", "parts"), [("both", {"encoder", "decoder"}), ("encoder", {"encoder"}), ("decoder", {"decoder"})]
)
def test_where(where: str, parts: set[str], make_segmenter: Callable[..., nn.Module]) -> None:
    model = make_segmenter(adapters={"norm": {"where": where}})
    assert {site.info.part for _, site, _ in base.modules(model)} == parts
    assert model.encoder_adapted == ("encoder" in parts)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="where must be one of encoder, decoder, both, got 'neck'"):
        build_configs({"norm": {"where": "neck"}})
