# SPDX-License-Identifier: Apache-2.0
"""Settings of an adaptation: their defaults, and what None and a single name mean. Refusals: tests/cli."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from samda.adaptation.engine import Adaptation
from samda.adaptation.guard import GuardSettings
from samda.adaptation.objectives import OBJECTIVES
from samda.adaptation.settings import DEFAULTS, OPTIONAL, check_settings
from samda.errors import UsageError


def test_the_defaults_are_those_of_the_signature() -> None:
    defaults = {key: value.default for key, value in inspect.signature(Adaptation).parameters.items()}
    own = ("network", "task", "record", "device", "version")  # the model, and what decides nothing
    expected = {key: value for key, value in defaults.items() if key not in own}
    assert expected == DEFAULTS | dict.fromkeys(OPTIONAL)


def test_none_takes_the_default() -> None:
    objective, guard, values = check_settings(dict.fromkeys([*DEFAULTS, *OPTIONAL]))
    assert (objective, guard) == (OBJECTIVES["default"](), GuardSettings())
    assert values == DEFAULTS | {"steps": 8, "lr": 3e-4} == check_settings({})[2]


def test_an_adaptation_resolves_what_it_is_given(make_adaptation: Callable[..., Adaptation]) -> None:
    plain = make_adaptation()
    assert make_adaptation(**dict.fromkeys(k for k in DEFAULTS if k not in ("views", "slices"))).config == plain.config
    other = make_adaptation(families="gamma", memory_mb=None, views=None, batch_size=None, scope="decoder+gate")
    assert (other.memory_mb, other.batch_size, other.inferer.batch_size) == (2048.0, 8, 8)
    assert other.config == plain.config | {"families": ["gamma"], "views": 8, "scope": "gate+decoder"}


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"settings of the adaptation: unknown key 'vews'; did you mean 'views'\?"):
        check_settings({"vews": 3})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_number_of_an_objective_is_checked(name: str) -> None:
    for key, value in OBJECTIVES[name]().settings().items():
        if isinstance(value, float):
            for wrong in ("x", None, True, float("nan"), float("inf"), 10**400, -0.5):
                with pytest.raises(UsageError, match=f"^method '{name}': {key} must .*, got "):
                    OBJECTIVES[name](**{key: wrong})


def test_every_threshold_of_the_guard_is_checked() -> None:
    for key in GuardSettings().to_dict():
        for wrong in ("x", None, True, float("nan"), float("-inf")):
            with pytest.raises(UsageError, match=f"^guard: {key} must be a finite number, got .*; the default is "):
                GuardSettings(**{key: wrong})
