# SPDX-License-Identifier: Apache-2.0
"""From plain settings to configs and back."""

from __future__ import annotations

import json

import pytest

from samda.adapters import ADAPTERS, LkaConfig, SaltConfig, build_configs
from samda.errors import UsageError

NAMES = ["salt", "lora", "lka", "dka", "sam_da", "norm", "bottleneck", "head", "decoder", "full"]


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


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"slat": {}}, "there is no adapter 'slat'; did you mean 'salt'?"),
        ({"mine": {"type": "samda"}}, "there is no adapter 'samda'; did you mean 'sam_da'?"),
        ({"mine": {}}, "there is no adapter 'mine'; choose from bottleneck, decoder, dka"),
        ({"dka": {"widht": 4}}, "adapter 'dka': unknown key 'widht'; did you mean 'width'?"),
        ({"dka": None}, "settings must be a mapping, got None; write {} for the defaults"),
        ({"dka": 16}, "settings must be a mapping, got 16"),
        (["salt"], "adapters must be a mapping of name to settings, got list"),
    ],
)
def test_refusals(adapters: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_configs(adapters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
