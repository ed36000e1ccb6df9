# SPDX-License-Identifier: Apache-2.0
"""Attaching, freezing and switching: refusals leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from adapter_tools import OneLayer, move, noise

from samda.adapters import base
from samda.adapters.attach import build_configs
from samda.errors import AdapterError

Make = Callable[..., nn.Module]


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
        base.attach(model, build_configs(adapters))
    assert list(base.attached(model)) == ["lora"]
    assert set(model.state_dict()) == keys
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_an_adapter_without_a_site_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"'dka' finds none of its sites \(attn\.after, mlp\.after\) in this model"):
        base.attach(OneLayer(3, 4), build_configs({"dka": {}}))


def test_names_attach_the_defaults(make_segmenter: Make) -> None:
    by_name, by_config = make_segmenter(), make_segmenter()
    base.attach(by_name, ["lora", "sam_da"])
    base.attach(by_config, build_configs({"lora": {}, "sam_da": {}}))
    assert base.attached(by_name) == base.attached(by_config)
    states = [network.state_dict() for network in (by_name, by_config, make_segmenter(adapters=["lora", "sam_da"]))]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in state)


def test_merged_models_take_no_changes(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}})
    base.merge(model)
    with pytest.raises(AdapterError, match="call unmerge before attaching"):
        base.attach(model, build_configs({"norm": {}}))
    with pytest.raises(AdapterError, match="call unmerge before switching"):
        base.set_enabled(model, False)
    base.detach(model)  # unmerges by itself
    assert not base.is_merged(model)


@pytest.mark.parametrize("call", [base.detach, base.merge, base.adapter_parameters, base.regularization])
def test_unknown_names_are_refused(call: Callable, make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}, "norm": {}})
    with pytest.raises(AdapterError, match="no adapter 'salt' in this model; attached: lora, norm"):
        call(model, ["salt"])


def test_a_merge_that_is_not_finite_merges_nothing(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}, "dka": {}})
    parameters = base.adapter_parameters(model, ["lora"])
    last = list(parameters)[-1]
    with torch.no_grad():
        parameters[last].fill_(float("nan"))
    with pytest.raises(AdapterError, match=r"encoder\.1\.mlp\.fc2: merging gives values that are not finite"):
        base.merge(model)
    assert not base.is_merged(model)


def test_disabled_comes_back_after_an_exception(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}, "norm": {}})
    base.set_enabled(model, False, ["norm"])
    with pytest.raises(KeyError), base.disabled(model):
        assert not any(adapter.enabled for _, _, adapter in base.modules(model))
        raise KeyError
    assert {adapter.enabled for _, _, adapter in base.modules(model, ["lora"])} == {True}
    assert {adapter.enabled for _, _, adapter in base.modules(model, ["norm"])} == {False}


def test_an_adapter_that_is_off_is_not_merged(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}, "norm": {}})
    move(model)
    base.set_enabled(model, False, ["norm"])
    x = noise(1, 1, 64, 64, seed=5).sigmoid()
    before = model(x)
    assert base.merge(model) == ["lora"]
    assert torch.allclose(model(x), before, atol=1e-4)


def test_parameters_are_listed_once_and_apart(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}, "sam_da": {}})
    parts = [set(base.adapter_parameters(model, [name])) for name in ("lora", "sam_da")]
    head, frozen = set(model.head_params()), set(base.base_parameters(model))
    everything = [*parts[0], *parts[1], *head, *frozen]
    assert len(everything) == len(set(everything))
    assert set(everything) == {name for name, _ in model.named_parameters()}
    assert set(base.trainable_parameters(model)) == parts[0] | parts[1] | head
    adapter = next(adapter for _, _, adapter in base.modules(model))
    adapter.adapter_params().clear()  # a list of the caller's own
    assert adapter.adapter_params()


def test_adapters_join_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = OneLayer(300, 200)
    base.attach(model, build_configs({"salt": {}, "lora": {}}))
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    counts = base.count_parameters(model)
    assert (counts["salt"], counts["lora"]) == (2 * 50 + 2 * 4 * 150, 4 * 500)
