# SPDX-License-Identifier: Apache-2.0
"""SALT against its formula, written out here from the paper: U ReLU(blockdiag(...)) V^T."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import OneLayer, move, noise

from samda.adapters import base
from samda.adapters.attach import attach, build_configs
from samda.adapters.salt import SaltConfig
from samda.errors import AdapterError, UsageError

CASES = [  # (out, in) and settings; k is the smaller side
    ((24, 10), {"r": 3, "rank": 2}),  # V is square
    ((10, 24), {"r": 3, "rank": 2}),  # U is square
    ((16, 16), {"r": 0, "rank": 4}),  # tail only
    ((24, 10), {"r": 9, "rank": 5}),  # d > m / 2
    ((10, 24), {"r": 1.0}),  # S-SAM: no tail
    ((24, 10), {"r": 3, "rank": 2, "activation": None}),
    ((10, 24), {"r": 4, "rank": 3, "init": "paper"}),
]
cases = pytest.mark.parametrize(("shape", "settings"), CASES)


def tokens(model: OneLayer, count: int = 33) -> torch.Tensor:
    return noise(count, model.layer.in_features, seed=9).to(model.layer.weight.dtype)


def rebuilt_weight(model: OneLayer) -> torch.Tensor:
    """W~ by the paper's formula, in fp64, on an SVD of our own whose signs are those of the adapter."""
    weight, adapter = model.layer.weight.detach().double(), model.adapter
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    signs = torch.sign((u * adapter.u.double()).sum(0))
    u, vt = u * signs, vt * signs[:, None]
    r = len(adapter.scale)
    alpha, beta = 1 + adapter.scale.detach().double(), adapter.shift.detach().double()
    sigma = torch.zeros(len(s), len(s), dtype=torch.float64)
    sigma[:r, :r] = torch.diag(alpha * s[:r] + beta)
    sigma[r:, r:] = torch.diag(s[r:]) + adapter.left.detach().double() @ adapter.right.detach().double()
    if adapter.relu:
        sigma = sigma.clamp(min=0)
    return u @ sigma @ vt


@pytest.mark.filterwarnings("ignore:salt")
@cases
@pytest.mark.parametrize("count", [1, 400])  # few tokens and many are multiplied in another order
def test_parity_with_the_formula(settings: dict, shape: tuple[int, int], count: int) -> None:
    model = OneLayer(*shape, {"salt": settings})
    move(model, std=0.3)
    x, weight = tokens(model, count), rebuilt_weight(model)
    expected = F.linear(x.double(), weight, model.layer.bias.double())
    assert torch.allclose(model(x).double(), expected, atol=1e-5)
    assert torch.allclose(
        F.linear(x, model.layer.weight, model.layer.bias) + model.adapter(x), expected.float(), atol=1e-5
    )
    assert torch.allclose((model.layer.weight + model.adapter.delta()).double(), weight, atol=1e-5)


@pytest.mark.filterwarnings("ignore:salt")
@cases
@pytest.mark.parametrize("moved", [False, True])
def test_gradients_are_those_of_the_formula(settings: dict, shape: tuple[int, int], moved: bool) -> None:
    """Autograd through a rebuilt weight in fp64, at the start (whose value is the base's own) and away from it."""
    model = OneLayer(*shape, {"salt": settings}, dtype=torch.float64)
    if moved:
        move(model, std=0.3)
    adapter, (r, m) = model.adapter, (model.adapter.r, model.adapter.m)
    for count in (4, 300):
        x = tokens(model, count).reshape(2, count // 2, -1).requires_grad_()
        g = noise(2, count // 2, shape[0], seed=4, dtype=torch.float64)
        parameters = [adapter.scale, adapter.shift, adapter.left, adapter.right]
        top = (1 + adapter.scale) * adapter.s[:r] + adapter.shift
        tail = torch.diag(adapter.s[r:]) + adapter.left @ adapter.right
        sigma = torch.block_diag(torch.diag(top), tail) if r and m else torch.diag(top) if r else tail
        sigma = sigma.relu() if adapter.relu else sigma
        expected = torch.autograd.grad(
            F.linear(x, adapter.u @ sigma @ adapter.vt), [x, *parameters], g, allow_unused=True
        )
        found = torch.autograd.grad(model(x), [x, *parameters], g, allow_unused=True)
        added = torch.autograd.grad(
            F.linear(x, model.layer.weight) + adapter(x), [x, *parameters], g, allow_unused=True
        )
        for one, two, three in zip(expected, found, added, strict=True):
            if one is None:
                assert two is None or not two.numel()
            else:
                assert torch.allclose(two, one, atol=1e-9)
                assert torch.allclose(three, one, atol=1e-9)


@pytest.mark.filterwarnings("ignore:salt")
def test_gradients_at_the_start() -> None:
    """k = 10, r = 3, m = 7. With ReLU only the diagonal of the tail is live, without it all; X waits for Y."""
    x = noise(50, 10, seed=9)
    for activation, live in (("relu", 7), (None, 49)):
        model = OneLayer(24, 10, {"salt": {"r": 3, "rank": 7, "activation": activation}})
        adapter = model.adapter
        with torch.no_grad():  # X = I makes Y's gradient the one of the whole tail X Y
            adapter.left.copy_(torch.eye(7))
        model(x).square().sum().backward()
        assert int((adapter.right.grad != 0).sum()) == live
        assert adapter.left.grad.eq(0).all()
        assert adapter.scale.grad.ne(0).all()
        assert adapter.shift.grad.ne(0).all()


def test_everything_moves_from_the_second_step_on() -> None:
    model = OneLayer(24, 10, {"salt": {"r": 3, "rank": 2}})
    optimizer = torch.optim.SGD(base.adapter_parameters(model).values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(noise(50, 10, seed=9)).square().mean().backward()
        assert bool(model.adapter.left.grad.any()) == (step == 1)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:salt")
def test_the_start_of_the_released_code_is_no_identity() -> None:
    model = OneLayer(24, 10, {"salt": {"r": 3, "rank": 64, "init": "paper"}})
    adapter = model.adapter
    assert adapter.left.std().item() == pytest.approx(0.01, rel=0.1)
    assert adapter.right.std().item() == pytest.approx(0.01, rel=0.1)
    x = noise(5, 10, seed=9)
    assert not torch.equal(model(x), F.linear(x, model.layer.weight, model.layer.bias))


def test_the_identity_start_has_uniform_x_and_no_y() -> None:
    left = OneLayer(300, 300, {"salt": {"r": 0, "rank": 4}}).adapter.left
    assert left.abs().max().item() == pytest.approx((6 / 4) ** 0.5, rel=0.01)  # sqrt(6 / d)
    assert left.mean().item() == pytest.approx(0, abs=0.1)


@pytest.mark.filterwarnings("ignore:salt")
def test_the_preset_and_clipping_of_r() -> None:
    def r(role: str = "mlp.fc1", k: int = 128, **settings: object) -> int:
        with torch.device("meta"):
            model = OneLayer(2 * k, k, role=role)
        attach(model, build_configs({"salt": settings}))
        return model.adapter.r

    assert [r("attn.qkv"), r("attn.proj"), r("mlp.fc1"), r("mlp.fc2")] == [120, 120, 50, 50]
    assert [r("attn.qkv", k=4), r("mlp.fc1", k=32)] == [0, 32]
    assert [r(r=0), r(r=7), r(r=1000), r(r=0.1), r(r=1.0), r(r=1)] == [0, 7, 128, 12, 128, 1]


def test_wasteful_ranks_warn_once_for_a_model() -> None:
    layers = [OneLayer(24, 16, role=role) for role in ("attn.qkv", "attn.proj", "mlp.fc1")]
    for index, model in enumerate(layers):
        object.__setattr__(model.layer.info, "name", f"encoder.{index}.x")
    network = nn.ModuleList(layers)
    with pytest.warns(UserWarning, match="in 2 of 3 layers, rank 5 has more parameters than a full tail") as caught:
        attach(network, {"salt": SaltConfig(rank=5)})  # m = 8, 8 and 0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(network, {"light": SaltConfig(rank=4)})


def test_regularizer() -> None:
    model = OneLayer(24, 10, {"salt": {"r": 3, "rank": 2}})
    adapter = model.adapter
    start = base.regularization(model)
    start.backward()
    assert start == 0
    assert all(p.grad.isfinite().all() for p in base.adapter_parameters(model).values())
    move(model, std=0.3)
    s = torch.linalg.svdvals(model.layer.weight)[:3]
    top = ((1 + adapter.scale) * s + adapter.shift - s).square().sum().sqrt()
    assert base.regularization(model).item() == pytest.approx(
        (top + (adapter.left @ adapter.right).norm()).item(), rel=1e-5
    )
    plain = OneLayer(24, 10, {"lora": {}})
    assert base.regularization(plain) == 0


def test_merged_weight_and_bias() -> None:
    model = OneLayer(24, 10, {"salt": {"r": 3, "rank": 2}})
    move(model)
    before = model.layer.weight.clone(), model.layer.bias.clone()
    base.merge(model)
    assert torch.allclose(model.layer.merged_weight.double(), rebuilt_weight(model), atol=1e-6)
    base.unmerge(model)
    assert torch.equal(model.layer.weight, before[0])
    assert torch.equal(model.layer.bias, before[1])


def flipped(model: OneLayer, columns: list[int]) -> OneLayer:
    """The same adapter on the same weight, whose SVD came out with other signs, as on another machine."""
    signs = torch.ones(model.adapter.r + model.adapter.m)
    signs[columns] = -1
    adapter = model.adapter
    adapter.u, adapter.vt = adapter.u * signs, adapter.vt * signs[:, None]
    adapter.signature[1:] *= signs
    return model


@pytest.mark.parametrize("activation", ["relu", None])
def test_another_choice_of_signs_is_put_right(activation: str | None) -> None:
    settings = {"salt": {"r": 3, "rank": 2, "activation": activation}}
    model, x = OneLayer(24, 10, settings), noise(7, 10, seed=9)
    move(model, std=0.3)
    other = flipped(OneLayer(24, 10, settings), [1, 4, 8, 9])
    blind = flipped(OneLayer(24, 10, settings), [1, 4, 8, 9])
    for mine, theirs in zip(blind.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    assert not torch.allclose(blind(x), model(x), atol=1e-2)  # what loading without a signature would do
    other.load_state_dict(model.state_dict())
    assert torch.allclose(other(x), model(x), atol=1e-6)
    assert torch.equal(other.adapter.signature, model.adapter.signature)
    again = OneLayer(24, 10, settings)
    again.load_state_dict(other.state_dict())  # a file written after the repair is as good as the first
    assert torch.allclose(again(x), model(x), atol=1e-6)


def test_other_base_weights_are_refused_by_layer() -> None:
    model, other = (OneLayer(24, 10, {"salt": {"r": 3, "rank": 2}}, seed=seed) for seed in (3, 4))
    state = {key: t for key, t in model.state_dict().items() if "adapters" in key}
    with pytest.raises(
        RuntimeError, match=r"encoder\.0\.mlp\.fc1: the state dict was trained in another singular basis"
    ):
        other.load_state_dict(state, strict=False)
    wide = OneLayer(300, 300, {"salt": {}}, seed=3)
    rounded = OneLayer(300, 300, seed=3)
    rounded.layer.weight.data = rounded.layer.weight.data.bfloat16().float()
    attach(rounded, {"salt": SaltConfig()})
    with pytest.raises(AdapterError, match="another singular basis"):
        rounded.adapter.check_state(wide.adapter.state_dict(), "the file")


def test_a_half_precision_copy_is_the_same_basis() -> None:
    model = OneLayer(300, 300, {"salt": {}})
    for dtype in (torch.float16, torch.bfloat16):
        low = OneLayer(300, 300, {"salt": {}}).to(dtype)
        model.adapter.check_state(low.adapter.state_dict(), "the file")
        low.adapter.check_state(model.adapter.state_dict(), "the file")


def test_a_stored_basis_serves_where_no_svd_is_reproducible() -> None:
    """A weight with equal singular values: every rotation is a basis."""
    settings = {"salt": {"r": 3, "rank": 2, "save_basis": True}}
    model, x = OneLayer(10, 10), noise(7, 10, seed=9)
    rotation = torch.linalg.qr(noise(10, 10, seed=1))[0]
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(10))
    other = OneLayer(10, 10)
    other.layer.load_state_dict(model.layer.state_dict())
    for network in (model, other):
        attach(network, build_configs(settings))
    other.adapter.u, other.adapter.vt = rotation, rotation.T.contiguous()
    move(model, std=0.3)
    other.adapter.check_state(model.adapter.state_dict(), "the file")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    stranger = OneLayer(10, 10, settings, seed=8)
    with pytest.raises(AdapterError, match="another base weight"):
        stranger.adapter.check_state(model.adapter.state_dict(), "the file")


def test_the_basis_follows_a_base_that_is_loaded_later() -> None:
    """A full state dict brings base and adapter: the SVD is taken anew before the adapter's tensors arrive."""
    model, other, x = (
        OneLayer(24, 10, {"salt": {"r": 3, "rank": 2}}),
        OneLayer(24, 10, {"salt": {"r": 3, "rank": 2}}, seed=5),
        noise(7, 10),
    )
    move(model, std=0.3)
    other.load_state_dict(model.state_dict())
    assert torch.allclose(other(x), model(x), atol=1e-6)
    assert torch.allclose(
        other(x).double(), F.linear(x.double(), rebuilt_weight(other), other.layer.bias.double()), atol=1e-5
    )


@pytest.mark.parametrize(("fraction", "r"), [(0.01, 1), (0.19, 1), (0.39, 3), (1.0, 10)])
def test_a_fraction_is_at_least_one_value(fraction: float, r: int) -> None:
    model = OneLayer(24, 10, {"salt": {"r": fraction, "rank": 2}})
    (adapter,) = (adapter for _, _, adapter in base.modules(model))
    assert (adapter.r, adapter.m) == (r, 10 - r)  # max(1, floor(r k)) of k = 10


def test_weights_that_are_not_finite_are_refused() -> None:
    model = OneLayer(24, 10)
    model.layer.weight.data[3, 4] = float("nan")
    with pytest.raises(AdapterError, match=r"encoder\.0\.mlp\.fc1: the base weight"):
        attach(model, {"salt": SaltConfig()})
    assert base.attached(model) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "got True"),
        ({"rank": "4"}, "got '4'"),
        ({"r": -1}, "r must be 'preset', an integer or a fraction"),
        ({"r": 1.5}, "got 1.5"),
        ({"r": "all"}, "got 'all'"),
        ({"activation": "gelu"}, "activation must be one of relu, null, got 'gelu'"),
        ({"init": "zero"}, "init must be one of identity, paper"),
        ({"layers": ["attn.q"]}, "layers must be a list out of attn.qkv"),
        ({"layers": []}, "layers must be"),
        ({"save_basis": 1}, "save_basis must be true or false"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"ranks": 4}, "unknown key 'ranks'; did you mean 'rank'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_configs({"salt": settings})


def test_layers_choose_the_linears(make_segmenter) -> None:
    model = make_segmenter(adapters={"salt": {"layers": "attn.proj"}})
    assert {site.info.role for _, site, _ in base.modules(model)} == {"attn.proj"}
