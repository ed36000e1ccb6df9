# SPDX-License-Identifier: Apache-2.0
"""What can be known of the settings of an adaptation without a model: names, keys and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from samda.adaptation.guard import GuardSettings
from samda.adaptation.objectives import Objective, build_objective
from samda.adaptation.views import make_views
from samda.adapters.scopes import check_scope
from samda.errors import UsageError, from_mapping

__all__ = ["check_settings"]

LEAST = {"steps": 0, "views": 1, "slices": 1, "batch_size": 1}  # whole numbers
POSITIVE = {"lr": "the learning rate (lr)", "time_limit_s": "time_limit_s"}  # name -> how a person reads it


def check_settings(settings: Mapping[str, Any]) -> tuple[Objective, GuardSettings]:
    """Refuse what no model could be adapted with: :class:`samda.adaptation.engine.Adaptation` asks it first, and
    whoever loads a model for it asks before that.

    Args:
        settings: arguments of :class:`samda.adaptation.engine.Adaptation`; what is missing or None is as there. Scans
            and models decide about `modality` and `keep_largest`; they are not looked at.

    Returns:
        The objective and the thresholds of the guard.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    objective = build_objective(settings.get("method", "default"), settings.get("objective"))
    guard = from_mapping(GuardSettings, settings.get("guard") or {}, "guard")
    check_scope(settings.get("scope", "decoder"))
    values = {"steps": objective.steps, "lr": objective.lr} | {k: v for k, v in settings.items() if v is not None}
    for name, least in LEAST.items():
        value = values.get(name, least)
        if not isinstance(value, Integral) or value < least:
            raise UsageError(f"{name} must be at least {least} and whole, got {value!r}")
    for name, words in POSITIVE.items():
        value = values.get(name, 1)
        if not isinstance(value, Real) or not 0 < float(value) < math.inf:  # nor NaN
            raise UsageError(f"{words} must be positive, got {value!r}")
    if values.get("keep", "best") not in ("best", "last"):
        raise UsageError(f"keep must be best or last, got {values['keep']!r}")
    # refuses unknown families now and not in the first case
    make_views(values.get("views", 1), 0, **{k: values[k] for k in ("families", "strength", "flips") if k in values})
    return objective, guard
