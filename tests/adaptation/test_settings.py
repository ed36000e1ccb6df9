# SPDX-License-Identifier: Apache-2.0
"""Settings of an adaptation: their defaults, and what None and a single name mean. Refusals: tests/cli."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest

from samda.adaptation import OBJECTIVES, Adaptation, AdaptationSettings, GuardSettings, check_settings
from samda.adaptation.settings import METHODS, SCOPES
from samda.adapters.attach import SCOPES as KNOWN_SCOPES
from samda.errors import UsageError
from samda.views import FAMILIES

DEFAULTS = {field.name: field.default for field in dataclasses.fields(AdaptationSettings)}


def test_the_settings_need_no_pytorch_and_name_what_there_is() -> None:
    code = "import sys, samda.adaptation.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert tuple(OBJECTIVES) == METHODS and KNOWN_SCOPES == SCOPES
    assert METHODS[-1] == DEFAULTS["method"]  # as the help says


def test_none_takes_the_default() -> None:
    found, objective = check_settings(dict.fromkeys(DEFAULTS))
    assert (objective, found.thresholds) == (OBJECTIVES["default"](), GuardSettings())
    assert vars(found) == DEFAULTS | {"steps": 4, "lr": 6e-4, "families": FAMILIES} == vars(check_settings({})[0])


def test_an_adaptation_resolves_what_it_is_given(make_adaptation: Callable[..., Adaptation]) -> None:
    plain = make_adaptation()
    assert make_adaptation(**dict.fromkeys(k for k in DEFAULTS if k not in ("views", "slices", "steps"))).config == (
        plain.config
    )
    other = make_adaptation(families="gamma", memory_mb=None, views=None, batch_size=None, scope="decoder+gate")
    assert (other.settings.memory_mb, other.settings.batch_size, other.inferer.batch_size) == (64.0, 8, 8)
    assert other.config == plain.config | {"families": ["gamma"], "views": 6, "scope": "gate+decoder"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vews": 3}, "'vews'.*'views'"),
        ({"method": "tentt"}, "'tentt'.*'tent'"),
        ({"scope": "decodr"}, "'decodr'.*'decoder'"),
        ({"keep": "worst"}, "keep.*'worst'"),
        ({"views": 0}, "views.*at least 1.*0"),
        ({"slices": 0}, "slices.*at least 1.*0"),
        ({"steps": -1}, "steps.*at least 0.*-1"),
        ({"objective": {"steps": -1}}, "steps.*at least 0.*-1"),
        ({"lr": 0.0}, r"\(lr\).*0\.0"),
        ({"lr": float("nan")}, r"\(lr\).*nan"),
        ({"batch_size": "x"}, "batch_size.*'x'"),
        ({"time_limit_s": "x"}, "time_limit_s.*'x'"),
        ({"time_limit_s": 0}, "time_limit_s.*0"),
        ({"families": ("gama",)}, "'gama'.*'gamma'"),
        ({"families": []}, "6 views.*family"),
        ({"guard": {"tolerence": 1}}, "'tolerence'.*'tolerance'"),
        ({"objective": {"aling": 1}}, "'aling'.*'align'"),
        ({"objective": {"anchor": 0.0, "align": 1.0}}, "'anchor' was removed"),  # records of samda 0.1
        ({"method": "tpt"}, "'tpt' was removed.*tent, memo, sam_da"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_settings(settings)


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
