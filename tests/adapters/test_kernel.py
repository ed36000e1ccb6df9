# SPDX-License-Identifier: Apache-2.0
"""LKA and DKA against plain convolutions, the depthwise convolution against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapter_tools import move, noise

from samda.adapters import base
from samda.adapters.attach import build_configs
from samda.adapters.base import AdapterConfig
from samda.adapters.kernel import DkaConfig, KernelAdapter, LkaConfig, crop_kernel, depthwise
from samda.adapters.sites import BranchSite, ChainSite, SiteInfo
from samda.errors import UsageError


def single(config: AdapterConfig, dim: int = 12, kind: str = "branch", seed: int = 0) -> KernelAdapter:
    """The adapter of one site, in fp64 and away from its start."""
    info = SiteInfo("encoder.0.attn.x", kind, "attn.x", 0, dim)
    site = BranchSite(info) if kind == "branch" else ChainSite(info)
    adapter = config.build(site, torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter += noise(*parameter.shape, seed=index, std=0.2, dtype=torch.float64)
    return adapter


def tokens(height: int = 7, width: int = 10, dim: int = 12) -> torch.Tensor:
    return noise(2, height, width, dim, seed=6, dtype=torch.float64)


def conv(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    z = z.permute(0, 3, 1, 2)
    return F.conv2d(z, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)).permute(0, 2, 3, 1)


def gelu(z: torch.Tensor) -> torch.Tensor:
    return z * 0.5 * (1 + torch.erf(z / 2**0.5))


@pytest.mark.parametrize("act", ["pre", "post", "both"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["branch", "tokens"])
def test_lka_formula(act: str, bias: bool, kind: str) -> None:
    adapter, x = single(LkaConfig(act=act, bias=bias, width=5), kind=kind), tokens()
    down, up = ((layer.weight, layer.bias) for layer in (adapter.down, adapter.up))
    z = F.linear(x, *down)
    z = gelu(z) if act != "post" else z
    z = conv(z, adapter.kernels[0], adapter.biases[0] if bias else None)
    z = gelu(z) if act != "pre" else z
    expected = F.linear(z, *up) + (x if kind == "tokens" else 0)
    assert torch.allclose(adapter(x), expected, atol=1e-12)


@pytest.mark.parametrize("pre_act", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(7, 10), (30, 26)])
def test_dka_formula_and_reparameterization(pre_act: bool, bias: bool, size: tuple[int, int]) -> None:
    adapter, x = single(DkaConfig(pre_act=pre_act, bias=bias, width=5), kind="tokens"), tokens(*size)
    u = F.linear(x, adapter.down.weight, adapter.down.bias)
    u = gelu(u) if pre_act else u
    biases = adapter.biases if bias else (None, None)
    v = sum(conv(u, kernel, b) for kernel, b in zip(adapter.kernels, biases, strict=True))
    expected = x + F.linear(gelu(v), adapter.up.weight, adapter.up.bias)
    assert torch.allclose(adapter(x), expected, atol=1e-12)
    before = copy.deepcopy(adapter.state_dict())
    for _ in range(2):
        assert adapter.reparameterize()
        assert torch.allclose(adapter(x), expected, atol=1e-12)
        assert torch.allclose(copy.deepcopy(adapter).float()(x.float()).double(), expected, atol=1e-5)
    assert adapter.folded_kernel.shape == (5, 1, 51, 51)
    assert set(adapter.state_dict()) == set(before)  # the folded kernel is derived and not stored
    adapter.restore()
    assert adapter.folded_kernel is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state_dict().items())
    assert torch.allclose(adapter(x), expected, atol=1e-12)


def test_both_kernels_learn() -> None:
    adapter, x = single(DkaConfig(width=5), kind="tokens"), tokens()
    adapter(x).square().sum().backward()
    large, small = (kernel.grad for kernel in adapter.kernels)
    assert torch.allclose(
        large[..., 23:28, 23:28], small, atol=1e-9
    )  # the small kernel sits in the middle of the large
    assert small.ne(0).all()


def test_loading_ends_the_reparameterization() -> None:
    adapter, other, x = single(DkaConfig()), single(DkaConfig(), seed=1), tokens()
    adapter.reparameterize()
    adapter.load_state_dict(other.state_dict())
    assert not adapter.reparameterized
    assert torch.equal(adapter(x), other(x))


def test_merge_of_a_network_reparameterizes(make_segmenter: Callable[..., nn.Module]) -> None:
    model = make_segmenter(adapters={"dka": {}, "lka": {}})
    move(model)
    assert base.merge(model) == []
    assert base.is_merged(model)
    assert {adapter.reparameterized for _, _, adapter in base.modules(model, ["dka"])} == {True}
    assert {adapter.reparameterized for _, _, adapter in base.modules(model, ["lka"])} == {False}
    base.unmerge(model)
    assert not base.is_merged(model)


def test_an_impulse_becomes_a_kernel() -> None:
    """With identity projections and no activation in effect the response is k x k, across borders of windows."""
    adapter = single(LkaConfig(width=12, kernel_size=7, act="pre", bias=False))
    with torch.no_grad():
        adapter.down.weight.copy_(torch.eye(12))
        adapter.up.weight.copy_(torch.eye(12))
        adapter.kernels[0].fill_(1)
    x = torch.zeros(1, 28, 28, 12, dtype=torch.float64)
    x[0, 13, 14] = 100.0  # GELU(100) = 100; the border of 14 x 14 windows runs beside it
    expected = torch.zeros(28, 28, dtype=torch.float64)
    expected[10:17, 11:18] = 100.0
    assert torch.equal(adapter(x)[0, :, :, 5], expected)


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_backends_agree_in_the_adapter(backend: str) -> None:
    x = tokens().requires_grad_()
    auto, other = single(DkaConfig()), single(DkaConfig(conv_backend=backend))
    assert torch.allclose(other(x), auto(x), atol=1e-12)
    one, two = (torch.autograd.grad(a(x).square().sum(), [x, *a.parameters()]) for a in (auto, other))
    assert all(torch.allclose(g, h, atol=1e-9) for g, h in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["lka", "dka"])
def test_placements(name: str, make_segmenter: Callable[..., nn.Module]) -> None:
    def roles(**settings: str) -> set[str]:
        model = make_segmenter(adapters={name: settings})
        return {site.info.role for _, site, _ in base.modules(model)}

    assert roles() == ({"attn.branch", "mlp.branch"} if name == "lka" else {"attn.after", "mlp.after"})
    for placement, place in (("parallel", "branch"), ("output", "output"), ("after", "after")):
        assert roles(placement=placement) == {f"attn.{place}", f"mlp.{place}"}


@pytest.mark.parametrize("name", ["lka", "dka"])
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_start(name: str, size: tuple[int, int], make_segmenter: Callable[..., nn.Module]) -> None:
    """The default start is the base on square and other grids, the papers' own start is not; step 1 moves Up only."""
    x = noise(1, 1, *size, seed=5).sigmoid()
    plain, model, paper = (
        make_segmenter(),
        make_segmenter(adapters={name: {}}),
        make_segmenter(adapters={name: {"init": "paper"}}),
    )
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert not torch.allclose(paper(x), plain(x), atol=1e-3)
    model(x).square().mean().backward()
    live = {key.rsplit(".adapters.")[1] for key, p in base.adapter_parameters(model).items() if p.grad.any()}
    assert live == {f"{name}.up.weight"} | ({f"{name}.up.bias"} if name == "lka" else set())


def test_initial_distributions() -> None:
    def build(config: AdapterConfig) -> KernelAdapter:
        return config.build(BranchSite(SiteInfo("e", "branch", "x", 0, 400)), torch.Generator().manual_seed(0))

    lka, paper, dka = (
        build(LkaConfig(width=50)),
        build(LkaConfig(width=50, init="paper")),
        build(DkaConfig(init="paper")),
    )
    assert lka.down.weight.abs().max().item() == pytest.approx(400**-0.5, rel=1e-3)
    assert lka.kernels[0].abs().max().item() == pytest.approx(1 / 7, rel=1e-3)
    assert paper.down.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert paper.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not paper.down.bias.any()
    assert dka.up.weight.abs().max().item() == pytest.approx(16**-0.5, rel=1e-2)
    assert dka.kernels[0].std().item() == pytest.approx(1 / (51 * 3**0.5), rel=0.02)  # .0113
    assert dka.kernels[1].abs().max().item() == pytest.approx(1 / 5, rel=0.02)


def test_one_adapter_for_every_image_size(make_segmenter: Callable[..., nn.Module]) -> None:
    """Kernels are stored whole: at 4 x 4 tokens 7 x 7 taps of 51 x 51 are used, at 8 x 8 more of the same."""
    model = make_segmenter(adapters={"dka": {}})
    move(model)
    state = model.state_dict()
    with torch.no_grad():
        for size in (64, 128):
            other = make_segmenter(adapters={"dka": {}})
            other.load_state_dict(state)
            x = noise(1, 1, size, size, seed=5).sigmoid()
            assert torch.equal(other(x), model(x))


def test_dropout_belongs_to_training() -> None:
    adapter, x = single(LkaConfig(dropout=0.5)), tokens()
    adapter.train()
    torch.manual_seed(0)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lka", {"kernel_size": 6}, "kernel_size must be an odd integer, got 6"),
        ("lka", {"act": "none"}, "act must be one of pre, post, both, got 'none'"),
        ("lka", {"placement": "a"}, "placement must be one of parallel, output, after"),
        ("lka", {"dropout": 1.0}, "dropout must be in"),
        ("lka", {"bias": 1}, "bias must be true or false"),
        ("dka", {"width": 0}, "width must be"),
        ("dka", {"small_kernel": 53}, "small_kernel must be at most large_kernel 51, got 53"),
        ("dka", {"conv_backend": "cudnn"}, "conv_backend must be one of auto, direct, fft"),
        ("dka", {"kernel_size": 7}, "unknown key 'kernel_size'; did you mean 'small_kernel'"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_configs({name: settings})


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The whole kernel on contiguous channels-first memory."""
    y = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("backend", "size", "k", "biased"),
    [
        ("direct", (9, 9), 1, True),
        ("direct", (5, 12), 31, False),  # cropped to 9 x 23
        ("fft", (9, 9), 5, True),
        ("fft", (16, 4), 31, False),
        ("auto", (5, 12), 5, True),  # direct
        ("auto", (16, 16), 15, False),  # by FFT, since gradients are needed
    ],
)
def test_depthwise_forward_and_gradients(backend: str, size: tuple[int, int], k: int, biased: bool) -> None:
    x, weight = noise(2, *size, 3, seed=1), noise(3, 1, k, k, seed=2)
    bias, g = noise(3, seed=3) if biased else None, noise(2, *size, 3, seed=4)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = reference(*inputs, *([] if biased else [None]))
    gradients = torch.autograd.grad(expected, inputs, g.double())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        own = [t.detach().to(dtype).requires_grad_() for t in inputs]
        found = depthwise(*own, *([] if biased else [None]), backend)
        assert found.dtype == dtype
        pairs = [(found, expected), *zip(torch.autograd.grad(found, own, g.to(dtype)), gradients, strict=True)]
        for one, two in pairs:
            assert (one.double() - two).abs().max() <= tolerance * two.abs().max()


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_only_live_taps_get_a_gradient(backend: str) -> None:
    """On 14 x 14 a kernel of 51 is its central 27 x 27 (2 * 14 - 1), and the rest has gradient exactly zero."""
    x, weight = noise(1, 14, 14, 2, seed=1), noise(2, 1, 51, 51, seed=2).requires_grad_()
    y = depthwise(x, weight, None, backend)
    small = weight.detach()[..., 12:39, 12:39]
    assert torch.allclose(y, reference(x, small, None), atol=1e-3)
    assert torch.allclose(y, reference(x, weight.detach(), None), atol=1e-3)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight)
    assert gradient[..., 12:39, 12:39].ne(0).all()
    gradient[..., 12:39, 12:39] = 0
    assert gradient.eq(0).all()


def test_kernels_are_cropped_to_the_grid() -> None:
    kernels = torch.zeros(2, 1, 51, 51)
    assert crop_kernel(kernels, 14, 64).shape == (2, 1, 27, 51)
    assert crop_kernel(kernels, 1, 26).shape == (2, 1, 1, 51)


def test_the_fft_stays_in_fp32_under_autocast() -> None:
    x, weight = noise(1, 16, 16, 4, seed=1), noise(4, 1, 31, 31, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise(x, weight, None, "fft")
    assert torch.allclose(found, reference(x, weight, None), atol=1e-4)
    low = depthwise(x.bfloat16(), weight.bfloat16(), None, "fft")
    assert low.dtype == torch.bfloat16
    exact = reference(x.bfloat16().float(), weight.bfloat16().float(), None)
    assert torch.allclose(low.float(), exact, rtol=1 / 128, atol=1e-3)  # nothing but the final rounding
