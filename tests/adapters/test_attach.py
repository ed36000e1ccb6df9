# SPDX-License-Identifier: Apache-2.0
"""Settings become configs, adapters attach to a network, and scopes choose among its parameters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn as nn
import yaml
from adapter_tools import OneLayer

import samda
from samda.adapters import ADAPTERS, LkaConfig, SaltConfig, base
from samda.adapters.attach import attach, build_configs, fold, scope_parameters
from samda.errors import AdapterError, UsageError
from samda.io import packaged

Make = Callable[..., nn.Module]
NAMES = ["salt", "lora", "lka", "dka", "sam_da", "ssf", "intensity", "norm", "bottleneck", "head", "decoder", "full"]


def test_names() -> None:
    assert list(ADAPTERS) == NAMES
    assert all(config.name == name for name, config in ADAPTERS.items())


@pytest.mark.parametrize("name", NAMES)
def test_defaults_survive_json(name: str) -> None:
    config = build_configs({name: {}})[name]
    assert type(config) is ADAPTERS[name]
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["type"] == name
    assert build_configs({"other": stored})["other"] == config


def test_names_and_types() -> None:
    built = SaltConfig(rank=8)
    configs = build_configs(
        {"first": built, "wide": {"type": "lka", "kernel_size": 15}, "salt": {"layers": ["mlp.fc1"]}}
    )
    assert configs["first"] is built
    assert configs["wide"] == LkaConfig(kernel_size=15)
    assert configs["salt"].layers == ("mlp.fc1",)
    assert list(configs) == ["first", "wide", "salt"]


def test_numbers_of_numpy_are_numbers() -> None:
    config = build_configs({"salt": {"rank": np.int64(3), "r": np.float32(0.5), "seed": np.uint8(7)}})["salt"]
    assert config == SaltConfig(rank=3, r=0.5, seed=7)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict() | {"layers": list(config.layers)}


def test_names_alone_take_the_defaults() -> None:
    assert build_configs("salt") == build_configs(["salt"]) == {"salt": SaltConfig()}
    assert list(build_configs(["sam_da", "lka"])) == ["sam_da", "lka"]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_overlay_of_that_name_has_the_same_settings(name: str) -> None:
    overlay = yaml.safe_load(packaged("configs", "adapters", f"{name}.yaml").read_text("utf-8"))
    assert build_configs(overlay["adapters"]) == build_configs(name)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"slat": {}}, "there is no adapter 'slat'; did you mean 'salt'?"),
        ({"mine": {"type": "samda"}}, "there is no adapter 'samda'; did you mean 'sam_da'?"),
        ({"mine": {"type": ["lka"]}}, "there is no adapter ['lka']; did you mean 'lka'?"),
        ({"mine": {}}, "there is no adapter 'mine'; choose from bottleneck, decoder, dka"),
        ({"dka": {"widht": 4}}, "adapter 'dka': unknown key 'widht'; did you mean 'width'?"),
        ({"dka": None}, "settings must be a mapping, got None; write {} for the defaults"),
        ({"dka": 16}, "settings must be a mapping, got 16"),
        (["salt", "slat"], "there is no adapter 'slat'; did you mean 'salt'?"),
        ("flagship", "there is no adapter 'flagship'; choose from bottleneck"),
        (7, "adapters must be names or a mapping of name to settings, got 7"),
    ],
)
def test_settings_are_refused(adapters: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_configs(adapters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"lora": {}}, "adapter 'lora' is already attached; detach it first or choose another name"),
        ({"a.b": {"type": "norm"}}, "adapter name 'a.b' cannot be used"),
        ({"values": {"type": "norm"}}, "adapter name 'values' cannot be used"),  # a method of ModuleDict
        ({"training": {"type": "norm"}}, "adapter name 'training' cannot be used"),
        ({"base": {"type": "norm"}}, "adapter name 'base' cannot be used"),
        ({"norm": {}, "full": {}}, "'full' trains the base weights that 'lora' builds on"),
    ],
)
def test_refusals_leave_the_model_unchanged(adapters: dict, message: str, make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}})
    keys, trained = set(model.state_dict()), set(base.trainable_parameters(model))
    with pytest.raises(AdapterError, match=message):
        attach(model, build_configs(adapters))
    assert list(base.attached(model)) == ["lora"]
    assert set(model.state_dict()) == keys
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_an_adapter_without_a_site_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"'dka' finds none of its sites \(attn\.after, mlp\.after\) in this model"):
        attach(OneLayer(3, 4), build_configs({"dka": {}}))


def test_names_attach_the_defaults(make_segmenter: Make) -> None:
    by_name, by_config = make_segmenter(), make_segmenter()
    attach(by_name, ["lora", "sam_da"])
    attach(by_config, build_configs({"lora": {}, "sam_da": {}}))
    assert base.attached(by_name) == base.attached(by_config)
    states = [network.state_dict() for network in (by_name, by_config, make_segmenter(adapters=["lora", "sam_da"]))]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in state)


def test_config_classes_are_public(make_segmenter: Make) -> None:
    kinds = {name: getattr(samda, config.__name__) for name, config in ADAPTERS.items()}
    assert kinds == ADAPTERS
    network = make_segmenter(adapters={"salt": samda.SaltConfig(rank=2), "wide": samda.LkaConfig(kernel_size=15)})
    assert base.attached(network) == {"salt": SaltConfig(rank=2), "wide": LkaConfig(kernel_size=15)}
    with samda.disabled(network):
        assert not any(adapter.enabled for _, _, adapter in base.modules(network))
    samda.attach(network, {"norm": samda.NormConfig(where="decoder")})
    assert base.changes_encoder(network)
    assert not base.changes_encoder(network, base.adapter_parameters(network, ["norm"]))


def test_adapters_join_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = OneLayer(300, 200)
    attach(model, build_configs({"salt": {}, "lora": {}}))
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    counts = base.count_parameters(model)
    assert (counts["salt"], counts["lora"]) == (2 * 50 + 2 * 4 * 150, 4 * 500)


EVERYTHING = {"salt": {"rank": 2}, "sam_da": {"side": "both"}, "norm": {}, "decoder": {}}


def own(model: nn.Module, *names: str) -> set[str]:
    return set(base.adapter_parameters(model, names))


def test_scopes_are_what_adapters_declare(make_segmenter: Make) -> None:
    model = make_segmenter(adapters=EVERYTHING)
    encoder_norms = {name for name in own(model, "norm") if name.startswith("image_encoder.")}
    assert set(scope_parameters(model, "decoder")) == own(model, "sam_da")
    assert set(scope_parameters(model, "norm")) == own(model, "norm")
    assert set(scope_parameters(model, "encoder")) == own(model, "salt") | encoder_norms
    assert set(scope_parameters(model, "decoder+encoder")) == own(model, "sam_da", "salt") | encoder_norms
    gate = scope_parameters(model, "gate")
    assert set(gate) < own(model, "sam_da")
    assert sum(p.numel() for p in gate.values()) == 2 * 131_074  # both sides
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in gate.items())


def test_sizes(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"sam_da": {}, "lka": {}})

    def size(scope: str) -> int:
        return sum(p.numel() for p in scope_parameters(model, scope).values())

    lka = 4 * (2 * 32 * 8 + 8 * 49 + 2 * 8 + 32)
    assert (size("gate"), size("decoder"), size("decoder+encoder")) == (131_074, 395_522, 395_522 + lka)


@pytest.mark.parametrize(
    ("adapters", "scope", "message"),
    [
        ({"salt": {}}, "decoder", "this model has no parameters in scope 'decoder'; it has: encoder$"),
        ({"sam_da": {}}, "decoder+encoder", "no parameters in scope 'encoder'; it has: gate, decoder$"),
        ({"norm": {"where": "decoder"}}, "gate", "it has: norm$"),
        ({"head": {}}, "decoder", "it has: none"),
        ({"sam_da": {}}, "all", "there is no scope 'all'; choose from decoder, encoder, gate, intensity, norm, ssf"),
        ({"sam_da": {}}, "decoder+encodr", "there is no scope 'encodr'; did you mean 'encoder'"),
        ({"sam_da": {}}, "", "there is no scope ''"),
    ],
)
def test_empty_and_unknown_scopes_are_refused(adapters: dict, scope: str, message: str, make_segmenter: Make) -> None:
    with pytest.raises((AdapterError, UsageError), match=message):
        scope_parameters(make_segmenter(adapters=adapters), scope)


def test_what_merges_goes_into_the_weights_and_modules_stay(make_segmenter: Make) -> None:
    network = make_segmenter(adapters={"salt": {"rank": 2}, "lora": {}, "norm": {}, "dka": {"large_kernel": 5}})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.trainable_parameters(network).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        image = torch.rand(2, 1, 64, 64, generator=generator)
        expected, plain = network(image), copy.deepcopy(network)
        fold(network)
        assert torch.allclose(network(image), expected, atol=1e-4 * float(expected.abs().max()))
    left = {path.rpartition(".")[2] for path, _, _ in base.modules(network)}
    assert left == {"dka"}
    weight, before = (n.image_encoder.blocks[0].attn.qkv.weight for n in (network, plain))
    site = plain.image_encoder.blocks[0].attn.qkv
    deltas = [adapter.delta() for adapter in site.active()]
    assert torch.allclose(weight, before + sum(deltas), atol=1e-6)
    assert len(deltas) == 2 and not torch.equal(weight, before)
    assert list(base.attached(network)) == ["salt", "lora", "norm", "dka"]
