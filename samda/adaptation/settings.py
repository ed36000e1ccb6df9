# SPDX-License-Identifier: Apache-2.0
"""What can be known of the settings of an adaptation without a model: names, keys and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from samda.adaptation.guard import GuardSettings
from samda.adaptation.objectives import Objective, build_objective
from samda.adaptation.views import FAMILIES, make_views
from samda.adapters.attach import check_scope
from samda.errors import UsageError, check_keys, from_mapping, is_finite

DEFAULTS: dict[str, Any] = {  # of Adaptation; what else it takes is None where it is not given
    "method": "default",
    "scope": "decoder",
    "views": 8,
    "families": FAMILIES,
    "strength": 1.0,
    "flips": False,
    "slices": 12,
    "seed": 0,
    "keep": "best",
    "batch_size": 8,
    "memory_mb": 2048.0,
}
OPTIONAL = ("steps", "lr", "objective", "guard", "time_limit_s", "modality", "keep_largest")
LEAST = {"steps": 0, "views": 1, "slices": 1, "batch_size": 1, "seed": 0}  # whole numbers
POSITIVE = {"lr": "the learning rate (lr)", "time_limit_s": "time_limit_s"}  # name -> how a person reads it
MOST = {"strength": 10.0, "memory_mb": math.inf}  # numbers from 0; stronger views overflow


def check_settings(settings: Mapping[str, Any]) -> tuple[Objective, GuardSettings, dict[str, Any]]:
    """Refuse what no model could be adapted with: :class:`samda.adaptation.engine.Adaptation` asks it first, and
    whoever loads a model for it asks before that.

    Args:
        settings: arguments of :class:`samda.adaptation.engine.Adaptation`; what is missing or None is as there. Scans
            and models decide about `modality` and `keep_largest`; they are not looked at.

    Returns:
        The objective, the thresholds of the guard, and all settings that are not None, defaults included, in one
        spelling: scopes in the order of :data:`samda.adapters.attach.SCOPES`, families as a tuple.

    Raises:
        UsageError: an unknown key or name, or a value of the wrong type or out of range.
    """
    check_keys(settings, (*DEFAULTS, *OPTIONAL), "settings of the adaptation")
    values = DEFAULTS | {key: value for key, value in settings.items() if value is not None}
    objective = build_objective(values["method"], values.get("objective"))
    guard = from_mapping(GuardSettings, values.get("guard", {}), "guard")
    values["scope"] = "+".join(check_scope(values["scope"]))
    values = {"steps": objective.steps, "lr": objective.lr} | values
    for name, least in LEAST.items():
        value = values[name]
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} must be at least {least} and whole, got {value!r}")
    for name, words in POSITIVE.items():
        value = values.get(name, 1)
        if not is_finite(value) or value <= 0:
            raise UsageError(f"{words} must be positive, got {value!r}")
    for name, most in MOST.items():
        value = values[name]
        if not is_finite(value) or not 0 <= value <= most:
            limit = "at least 0" if most == math.inf else f"from 0 to {most:g}"
            raise UsageError(f"{name} must be a number {limit}, got {value!r}")
    if not isinstance(values["flips"], bool):
        raise UsageError(f"flips must be true or false, got {values['flips']!r}")
    if values["keep"] not in ("best", "last"):
        raise UsageError(f"keep must be best or last, got {values['keep']!r}")
    values["families"] = _families(values["families"])
    # refuses unknown families now and not in the first case
    make_views(values["views"], 0, values["families"])
    return objective, guard, values


def _families(value: Any) -> tuple[str, ...]:
    """The kinds of views; one may come without its list."""
    families = [value] if isinstance(value, str) else value
    if not isinstance(families, Sequence) or not all(isinstance(family, str) for family in families):
        raise UsageError(f"families must be a list of {', '.join(FAMILIES)}, got {value!r}")
    return tuple(families)
