# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation of a trained model to scans of another site, without labels.

Names are imported lazily, because the command line reads the settings without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samda.adaptation.case import AdaptedCase as AdaptedCase
    from samda.adaptation.engine import Adaptation as Adaptation

_PLACES = {
    "case": ("AdaptedCase",),
    "engine": ("Adaptation",),
    "folder": ("AdaptRun", "adapt_folder"),
    "guard": ("REASONS", "Decision", "Evidence", "GuardSettings"),
    "job": ("check_run", "log_case", "run_adaptation"),
    "objectives": ("OBJECTIVES", "Objective", "build_objective", "check_settings"),
    "settings": ("AdaptationSettings",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'samda.adaptation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"samda.adaptation.{_MODULE_OF[name]}"), name)
