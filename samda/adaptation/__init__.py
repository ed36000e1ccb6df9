# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation of a trained model to scans of another site, without labels.

Names are imported lazily, because the command line reads the settings without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samda.adaptation.engine import Adaptation, AdaptedCase
    from samda.adaptation.folder import AdaptRun, adapt_folder
    from samda.adaptation.guard import REASONS, Decision, Evidence, GuardSettings
    from samda.adaptation.job import check_run, log_case, run_adaptation
    from samda.adaptation.objectives import OBJECTIVES, Objective, build_objective, check_settings
    from samda.adaptation.settings import AdaptationSettings

_PLACES = {
    "engine": ("AdaptedCase", "Adaptation"),
    "folder": ("AdaptRun", "adapt_folder"),
    "guard": ("REASONS", "Decision", "Evidence", "GuardSettings"),
    "job": ("check_run", "log_case", "run_adaptation"),
    "objectives": ("OBJECTIVES", "Objective", "build_objective", "check_settings"),
    "settings": ("AdaptationSettings",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "OBJECTIVES",
    "REASONS",
    "AdaptRun",
    "Adaptation",
    "AdaptationSettings",
    "AdaptedCase",
    "Decision",
    "Evidence",
    "GuardSettings",
    "Objective",
    "adapt_folder",
    "build_objective",
    "check_run",
    "check_settings",
    "log_case",
    "run_adaptation",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'samda.adaptation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"samda.adaptation.{_MODULE_OF[name]}"), name)
