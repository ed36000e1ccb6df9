# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest

from samda.errors import UsageError
from samda.training import check_config

REFERENCE: dict[str, Any] = {
    "epochs": 10,
    "rate": 0.1,
    "patience": 5,
    "seed": 0,
    "weight_decay": 0.1,
    "amp": True,
    "task": None,
    "name": "x",
    "device": "$torch.device('cpu')",
    "adapters": {"sam_da": {}},
    "train": {"sampler": {"_target_": "samda.training.SliceSampler", "foreground": "@f"}, "handlers": []},
}


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 3},
        {"rate": 1},
        {"epochs": 1, "patience": 0, "weight_decay": 0},
        {"epochs": "$2 * 5"},
        {"task": {"classes": ["a", "b"]}},
        {"adapters": {"salt": {"d": 4}}},
        {"device": "cpu"},
        {"_meta_": {}, "tracking_uri": "sqlite:///x"},
        {"train": {"sampler": {"_target_": "samda.training.SliceSampler", "seed": 3}}},
    ],
)
def test_valid_configs_pass(change: dict[str, Any]) -> None:
    check_config(REFERENCE | change, REFERENCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "config key 'epoch' is unknown; did you mean 'epochs'?"),
        ({"train": {"samplr": {}}}, "config key 'train::samplr' is unknown; did you mean 'sampler'?"),
        (
            {"train": {"sampler": {"_target_": "samda.training.SliceSampler", "empty_shar": 0.3}}},
            "config key 'train::sampler::empty_shar' is unknown; did you mean 'empty_share'?",
        ),
        ({"epochs": True}, "config key 'epochs' must be a whole number, got True"),
        ({"epochs": 1.5}, "config key 'epochs' must be a whole number, got 1.5"),
        ({"rate": "fast"}, "config key 'rate' must be a number, got 'fast'"),
        ({"amp": "false"}, "config key 'amp' must be true or false, got 'false'"),
        ({"adapters": ["salt"]}, "config key 'adapters' must be a mapping, got ['salt']"),
        ({"name": 3}, "config key 'name' must be text, got 3"),
        ({"epochs": 0}, "config key 'epochs' must be at least 1, got 0"),
        ({"seed": 2**63}, f"config key 'seed' must be at most {2**63 - 1}, got {2**63}"),
        ({"patience": -1}, "config key 'patience' must be at least 0, got -1"),
        ({"weight_decay": math.nan}, "config key 'weight_decay' must be at least 0, got nan"),
        ({"weight_decay": math.inf}, "config key 'weight_decay' must be at least 0, got inf"),
    ],
)
def test_wrong_keys_and_types_are_refused_by_their_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_config(REFERENCE | change, REFERENCE)
    assert str(error.value) == message
