# SPDX-License-Identifier: Apache-2.0
"""What every adapter must do, crossed with every adapter: a new one gets all of it by adding a row."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn as nn
from adapter_tools import move, noise

from samda.adapters import base
from samda.adapters.adapter_file import load_adapters, save_adapters
from samda.adapters.attach import attach, build_configs, detach
from samda.errors import AdapterError

# The tiny ViT: 2 blocks of width 32 (MLP 128), a decoder of 2 layers of width 256; head of 3 classes. By hand:
LINEARS = [(96, 32), (32, 32), (128, 32), (32, 128)]  # (out, in) of a block; k = 32 in each
HEAD = 3 * (256 + (256 * 256 + 256) * 2 + 256 * 32 + 32)


class Row(NamedTuple):
    """One adapter with settings, and what is known about it."""

    settings: dict[str, Any]
    count: int
    keys: set[str]  # of one module, in a file
    mergeable: bool = False
    head: str = "sam"


def salt_count(r_attention: int, r_mlp: int, d: int) -> int:
    return 2 * 2 * sum(2 * r + 2 * d * (32 - r) for r in (r_attention, r_mlp))


SALT_KEYS = {"scale", "shift", "left", "right", "signature"}
BOTTLENECK_KEYS = {"down.weight", "down.bias", "up.weight", "up.bias"}
SAM_DA_SIDE = [f"{layer}.{kind}" for layer in ("query", "key", "value", "out") for kind in ("weight", "bias")]
SAM_DA_SIDE += ["prompts", "gate", "residual"]
SAM_DA_COUNT = 4 * 256 * 128 + 3 * 128 + 256 + 256 * 256 + 2 * 256 + 1  # of one side of one layer


def sides(*names: str) -> set[str]:
    return {f"sides.{side}.{key}" for side in names for key in SAM_DA_SIDE}


ROWS = {
    "salt": Row({}, salt_count(24, 32, 4), SALT_KEYS, True),
    "salt-tail": Row({"type": "salt", "rank": 3, "r": 2}, salt_count(2, 2, 3), SALT_KEYS, True),
    "salt-linear": Row({"type": "salt", "r": 0.5, "activation": None}, salt_count(16, 16, 4), SALT_KEYS, True),
    "salt-all": Row({"type": "salt", "r": 1.0}, salt_count(32, 32, 4), SALT_KEYS, True),
    "salt-basis": Row(
        {"type": "salt", "r": 8, "save_basis": True}, salt_count(8, 8, 4), SALT_KEYS | {*"us", "vt"}, True
    ),
    "lora": Row({}, 2 * sum(4 * (i + o) for o, i in LINEARS), {"down", "up"}, True),
    "lora-scaled": Row(
        {"type": "lora", "rank": 2, "alpha": 8.0}, 2 * sum(2 * (i + o) for o, i in LINEARS), {"down", "up"}, True
    ),
    "lka": Row({}, 4 * (2 * 32 * 8 + 8 * 49 + 2 * 8 + 32), BOTTLENECK_KEYS | {"kernels.0", "biases.0"}),
    "lka-output": Row(
        {"type": "lka", "placement": "output", "act": "both", "bias": False, "kernel_size": 15, "conv_backend": "fft"},
        4 * (2 * 32 * 8 + 8 * 225),
        {"down.weight", "up.weight", "kernels.0"},
    ),
    "dka": Row({}, 4 * (2 * 32 * 16 + 2626 * 16), {"down.weight", "up.weight", "kernels.0", "kernels.1"}),
    "dka-parallel": Row(
        {"type": "dka", "placement": "parallel", "bias": True, "pre_act": True, "width": 4},
        4 * (2 * 32 * 4 + 2626 * 4 + 3 * 4 + 32),
        BOTTLENECK_KEYS | {"kernels.0", "kernels.1", "biases.0", "biases.1"},
    ),
    "sam_da": Row({}, 2 * SAM_DA_COUNT, sides("image")),
    "sam_da-token": Row({"type": "sam_da", "side": "token"}, 2 * SAM_DA_COUNT, sides("token")),
    "sam_da-both": Row({"type": "sam_da", "side": "both"}, 4 * SAM_DA_COUNT, sides("token", "image")),
    "ssf": Row({}, 2 * (32 + 32 + 256), {"scale", "shift"}, head="pyramid"),  # blocks 0 and 0, and the embedding
    "intensity": Row({}, 3, {"curve", "invert", "detail"}),
    "norm": Row({}, 2 * 2 * 2 * 32 + 9 * 2 * 256, {"scale", "shift"}, True),
    "norm-encoder": Row({"type": "norm", "where": "encoder"}, 2 * 2 * 2 * 32, {"scale", "shift"}, True),
    "bottleneck": Row({}, 4 * (2 * 32 * 8 + 8 + 32), BOTTLENECK_KEYS),
}
every = pytest.mark.parametrize("row", list(ROWS))
Build = Callable[..., nn.Module]
PLAIN: dict[tuple[str, str], nn.Module] = {}


@pytest.fixture
def build(make_segmenter: Callable[..., nn.Module], request: pytest.FixtureRequest) -> Build:
    """`build(adapters(row))`: a tiny segmenter with these adapters and the row's head, equal weights every time."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    head = ROWS[params["row"]].head if "row" in params else "sam"

    def make(adapters: dict[str, Any] | None = None, kind: str = "vit") -> nn.Module:
        if (kind, head) not in PLAIN:
            PLAIN[kind, head] = started(make_segmenter(kind, head=head))
        model = copy.deepcopy(PLAIN[kind, head])
        attach(model, build_configs(adapters or {}))
        return model

    return make


@torch.no_grad()
def started(model: nn.Module) -> nn.Module:
    """Where the class head starts at zero, noise: with logits of zero, no adapter would have an effect."""
    for index, name in enumerate(model.head_params()):
        parameter = model.get_parameter(name)
        if not parameter.any():
            parameter.copy_(noise(*parameter.shape, seed=index))
    return model


def adapters(row: str) -> dict[str, Any]:
    return {row.replace("-", "_"): {"type": row.split("-")[0]} | ROWS[row].settings}


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return noise(2, 1, 64, 48, seed=5).sigmoid().to(dtype)


@torch.no_grad()
def answer(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return model(image(dtype))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Within `tolerance` of the largest expected value."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@every
def test_the_start_is_the_base_bit_for_bit(row: str, build: Build) -> None:
    plain, adapted = build(), build(adapters(row))
    assert torch.equal(answer(adapted), answer(plain))
    x = image().requires_grad_()  # attention takes another path where gradients are needed, and so do some adapters
    assert torch.equal(adapted(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(adapted), answer(plain))


@every
def test_a_step_moves_only_what_is_declared(row: str, build: Build) -> None:
    model = build(adapters(row))
    declared = set(base.adapter_parameters(model)) | set(model.head_params())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == declared
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # what a zero blocks in the first step moves in the second
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in declared if before[name].numel()}


@every
def test_count_and_keys(row: str, build: Build, tmp_path: Path) -> None:
    model = build(adapters(row))
    (name,) = adapters(row)
    counts = base.count_parameters(model)
    assert counts[name] == ROWS[row].count
    head = HEAD if ROWS[row].head == "sam" else base.count_parameters(build())["head"]
    assert counts["head"] == head
    assert counts["trainable"] == ROWS[row].count + head
    assert counts["base"] == sum(p.numel() for p in model.parameters()) - counts["trainable"]
    stored = {key.split(f".adapters.{name}.")[1] for key in model.state_dict() if ".adapters." in key}
    assert stored == ROWS[row].keys


@every
def test_files_and_state_dicts_bring_everything_back(row: str, build: Build, tmp_path: Path) -> None:
    model = build(adapters(row))
    move(model)
    save_adapters(model, tmp_path)
    loaded, strict = build(adapters(row)), build(adapters(row))
    load_adapters(loaded, tmp_path)
    strict.load_state_dict(model.state_dict())
    assert torch.equal(answer(loaded), answer(model))
    assert torch.equal(answer(strict), answer(model))
    assert not close(answer(loaded), answer(build()), 1e-4)


@every
def test_merging(row: str, build: Build) -> None:
    model = build(adapters(row))
    move(model)
    (name,) = adapters(row)
    before, weights = answer(model), {key: p.clone() for key, p in model.named_parameters()}
    if not ROWS[row].mergeable:
        with pytest.raises(AdapterError, match="cannot be merged"):
            base.merge(model, [name])
        assert not base.is_merged(model)
    for _ in range(2):
        assert base.merge(model) == ([name] if ROWS[row].mergeable else [])
        assert close(answer(model), before, 1e-5)
    assert all(torch.equal(weights[key], p) for key, p in model.named_parameters())
    base.unmerge(model)
    assert not base.is_merged(model)
    assert torch.equal(answer(model), before)


@every
def test_switched_off_it_is_the_base(row: str, build: Build) -> None:
    plain, model = answer(build()), build(adapters(row))
    move(model)
    moved = answer(model)
    assert not close(moved, plain, 1e-4)
    with base.disabled(model):
        assert torch.equal(answer(model), plain)
    assert torch.equal(answer(model), moved)
    base.merge(model)
    with base.disabled(model):
        assert torch.equal(answer(model), plain)
    assert close(answer(model), moved, 1e-5)
    base.unmerge(model)
    with base.disabled(model, list(base.attached(model))):
        assert torch.equal(answer(model), plain)
    assert torch.equal(answer(model), moved)
    detach(model)
    assert torch.equal(answer(model), plain)
    assert set(model.state_dict()) == set(build().state_dict())


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_reduced_precision(row: str, dtype: torch.dtype, tolerance: float, build: Build) -> None:
    model = build(adapters(row))
    move(model)
    expected = answer(model)
    with torch.autocast("cpu", dtype):
        mixed = answer(model).float()
    assert close(mixed, expected, tolerance)
    base.merge(model)
    model.to(dtype)
    assert close(answer(model, dtype).float(), expected, tolerance)
    base.unmerge(model)
    assert close(answer(model, dtype).float(), expected, tolerance)


@every
def test_every_tensor_follows_the_network(row: str, build: Build) -> None:
    model = build(adapters(row))
    move(model)
    expected = answer(model)
    model.double()
    assert {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} == {torch.float64}
    assert close(answer(model, torch.float64).float(), expected, 1e-5)
    late = build()
    late.double()
    attach(late, base.attached(model))  # adapters take the type of the network that they join
    assert answer(late, torch.float64).dtype == torch.float64


@every
def test_copies_are_equal_and_independent(row: str, build: Build) -> None:
    model = build(adapters(row))
    move(model)
    expected = answer(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(answer(twin), expected)
        assert base.attached(twin) == base.attached(model)
        move(twin)
        assert not torch.equal(answer(twin), expected)
        assert torch.equal(answer(model), expected)


@every
def test_building_leaves_the_global_generators_alone(row: str, build: Build) -> None:
    model = build()
    configs = base.attached(build(adapters(row)))
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    attach(model, configs)
    assert torch.equal(torch.get_rng_state(), expected)


@every
def test_equal_layers_start_differently_and_equal_seeds_alike(row: str, build: Build) -> None:
    def start(**settings: int) -> dict[str, torch.Tensor]:
        (name,), (values,) = adapters(row), adapters(row).values()
        return dict(base.adapter_parameters(build({name: values | settings})))

    first, again, other = start(), start(), start(seed=1)
    random = [name for name, p in first.items() if p.numel() and p.any()]
    assert bool(random) == (row not in ("ssf", "intensity", "norm", "norm-encoder", "salt-all"))
    for name in random:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        for twin in random:
            if twin != name and first[twin].shape == first[name].shape:
                assert not torch.equal(first[twin], first[name]), (twin, name)


@every
def test_a_tiny_vit_takes_it_too(row: str, build: Build) -> None:
    plain, model = answer(build(kind="tiny_vit")), build(adapters(row), "tiny_vit")
    assert torch.equal(answer(model), plain)
    move(model)
    moved = answer(model)
    assert not close(moved, plain, 1e-4)
    base.merge(model)
    assert close(answer(model), moved, 1e-5)


def test_adapters_combine(build: Build, tmp_path: Path) -> None:
    together = {"salt": {"rank": 2}, "dka": {"width": 4}, "sam_da": {}, "norm": {}, "lora": {}, "lka": {}}
    plain, model = build(), build(together)
    assert torch.equal(answer(model), answer(plain))
    move(model)
    before = answer(model)
    save_adapters(model, tmp_path)
    loaded = build(together)
    load_adapters(loaded, tmp_path)
    assert torch.equal(answer(loaded), before)
    with pytest.raises(AdapterError, match="merge also"):
        base.merge(model, ["salt"])
    assert base.merge(model) == ["salt", "norm", "lora"]
    assert close(answer(model), before, 1e-5)
    detach(model, ["salt", "lora", "lka", "norm"])
    assert list(base.attached(model)) == ["dka", "sam_da"]
    assert not torch.equal(answer(model), answer(plain))
    detach(model)
    assert torch.equal(answer(model), answer(plain))


def test_two_salts_add_up(build: Build) -> None:
    model = build({"salt": {}, "other": {"type": "salt", "r": 3}})
    move(model)
    before = answer(model)
    base.merge(model)
    assert close(answer(model), before, 1e-5)
