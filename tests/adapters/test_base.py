# SPDX-License-Identifier: Apache-2.0
"""Switching, merging and listing what belongs to adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from adapter_tools import move, noise

from samda.adapters import base
from samda.adapters.attach import attach, build_configs, detach
from samda.errors import AdapterError

Make = Callable[..., nn.Module]


def test_merged_models_take_no_changes(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}})
    base.merge(model)
    with pytest.raises(AdapterError, match="call unmerge before attaching"):
        attach(model, build_configs({"norm": {}}))
    detach(model)  # unmerges by itself
    assert not base.is_merged(model)


@pytest.mark.parametrize("call", [detach, base.merge, base.adapter_parameters, base.regularization])
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
    def states() -> dict[str, bool]:
        return {path.rpartition(".")[2]: adapter.enabled for path, _, adapter in base.modules(model)}

    model = make_segmenter(adapters={"lora": {}, "norm": {}})
    with base.disabled(model, ["norm"]):
        assert states() == {"lora": True, "norm": False}
        with pytest.raises(KeyError), base.disabled(model):
            assert states() == {"lora": False, "norm": False}
            raise KeyError
        assert states() == {"lora": True, "norm": False}
    assert states() == {"lora": True, "norm": True}


def test_an_adapter_that_is_off_is_not_merged(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"lora": {}, "norm": {}})
    move(model)
    x = noise(1, 1, 64, 64, seed=5).sigmoid()
    with base.disabled(model, ["norm"]):
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
