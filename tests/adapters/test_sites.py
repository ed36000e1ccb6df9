# SPDX-License-Identifier: Apache-2.0
"""Sites without adapters are the plain modules; with adapters, the places of a block are where the table says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import OneLayer, move, noise

from samda.adapters import base
from samda.adapters.attach import attach, build_configs
from samda.adapters.sites import BranchSite, ChainSite, DecoderSite, LinearSite, NormSite, ResidualSites, SiteInfo


def info(kind: str = "linear", role: str = "mlp.fc1", dim: int = 5) -> SiteInfo:
    return SiteInfo(f"encoder.3.{role}", kind, role, 3, dim)


def test_empty_sites_are_plain() -> None:
    x = noise(2, 3, 4, 5)
    linear, norm = LinearSite(5, 6, info()), NormSite(5, info("norm", "norm"))
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))  # another library multiplies
    double = copy.deepcopy(linear).double()
    assert torch.equal(double(x.double()), F.linear(x.double(), double.weight, double.bias))
    assert torch.equal(norm(x), F.layer_norm(x, (5,), norm.weight, norm.bias, 1e-6))
    assert ChainSite(info("tokens"))(x) is x
    assert BranchSite(info("branch"))(x, x) is x
    assert all(a is b for a, b in zip(DecoderSite(info("decoder"))(x, x), (x, x), strict=True))
    assert set(linear.state_dict()) == set(nn.Linear(5, 6).state_dict())
    assert set(norm.state_dict()) == set(nn.LayerNorm(5).state_dict())
    assert linear.info.part == "encoder"


class Add(base.Adapter):
    """Adds a number to a token map, or is the number at a branch."""

    def __init__(self, value: float, skip: bool) -> None:
        super().__init__()
        self.value, self.skip = value, skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.value if self.skip else x + self.value


@pytest.mark.parametrize(
    ("place", "expected"),
    [("output", 10 + 3 * 7), ("branch", 10 + 7 + (2 + 3)), ("after", (10 + 7) * 3)],
)
def test_places_of_a_residual_sublayer(place: str, expected: float) -> None:
    """stream 10, the sublayer read 2 and gave 7; the adapter multiplies by 3, or adds 3 on the branch."""
    block = ResidualSites("encoder.3", "attn", 3, 1)
    getattr(block, place).adapters["test"] = Add(3, skip=place != "branch")
    stream, inputs, output = (torch.full((1, 1, 1, 1), value) for value in (10.0, 2.0, 7.0))
    assert block(stream, inputs, output).item() == expected
    assert getattr(block, place).info == SiteInfo(
        f"encoder.3.attn.{place}", "branch" if place == "branch" else "tokens", f"attn.{place}", 3, 1
    )


def test_adapters_of_a_site_act_in_the_order_of_attachment() -> None:
    site = ChainSite(info("tokens"))
    site.adapters["first"], site.adapters["second"] = Add(2, skip=True), Add(5, skip=False)
    assert site(torch.ones(1)).item() == 1 * 2 + 5


def test_loading_ends_a_merge() -> None:
    model, other = OneLayer(6, 5, {"lora": {}}), OneLayer(6, 5, {"lora": {}}, seed=8)
    for network, seed in ((model, 1), (other, 2)):
        move(network, seed=seed)
    x = noise(4, 5)
    expected = other(x)
    base.merge(model)
    model.load_state_dict(other.state_dict())
    assert not base.is_merged(model)
    assert torch.equal(model(x), expected)


def test_a_merged_copy_moves_along() -> None:
    model = OneLayer(6, 5, {"lora": {}})
    move(model)
    base.merge(model)
    assert model.double().layer.merged_weight.dtype == torch.float64
    assert model.to("meta").layer.merged_weight.is_meta


def test_one_adapter_takes_the_place_of_the_base_and_the_others_add() -> None:
    model = OneLayer(12, 10, {"lora": {}, "salt": {"r": 2, "rank": 2}})
    move(model)
    lora, salt = (adapter for _, _, adapter in base.modules(model))
    x = noise(4, 10)
    expected = F.linear(x, model.layer.weight + lora.delta() + salt.delta(), model.layer.bias)
    assert torch.allclose(model(x), expected, atol=1e-5)
    expected = F.linear(x, model.layer.weight + lora.delta(), model.layer.bias)
    with base.disabled(model, ["salt"]):
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_linear_site_without_bias() -> None:
    site = nn.Sequential(LinearSite(10, 12, info(dim=10), bias=False))
    x = noise(4, 10)
    before = site(x)
    attach(site, build_configs({"salt": {"r": 2, "rank": 2}}))
    assert torch.equal(site(x), before)
    move(site)
    merged = site(x)
    base.merge(site)
    assert torch.allclose(site(x), merged, atol=1e-5)
