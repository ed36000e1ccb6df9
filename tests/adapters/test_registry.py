# SPDX-License-Identifier: Apache-2.0
"""From plain settings to configs and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from samda.adapters import ADAPTERS, LkaConfig, SaltConfig, build_configs
from samda.errors import UsageError
from samda.io import packaged

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


def test_numbers_of_numpy_are_numbers() -> None:
    config = build_configs({"salt": {"rank": np.int64(3), "r": np.float32(0.5), "seed": np.uint8(7)}})["salt"]
    assert config == SaltConfig(rank=3, r=0.5, seed=7)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict() | {"layers": list(config.layers)}


def test_names_alone_take_the_defaults() -> None:
    assert build_configs("salt") == build_configs(["salt"]) == {"salt": SaltConfig()}
    assert list(build_configs(["sam_da", "lka"])) == ["sam_da", "lka"]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_overlay_of_that_name_has_the_same_settings(name: str) -> None:
    overlay = yaml.safe_load(packaged("configs", "adapters", f"{name}.yaml").read_text())
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
def test_refusals(adapters: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_configs(adapters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
