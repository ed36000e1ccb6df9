# SPDX-License-Identifier: Apache-2.0
"""Adapt a trained model to the scans of another site, case by case, without labels."""

from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import AdaptRun, adapt_folder
from samda.adaptation.guard import REASONS, Decision, Evidence, GuardSettings
from samda.adaptation.objectives import OBJECTIVES, Objective, build_objective
from samda.adaptation.outcome import AdaptedCase
from samda.adaptation.settings import check_settings

__all__ = [
    "OBJECTIVES",
    "REASONS",
    "AdaptRun",
    "Adaptation",
    "AdaptedCase",
    "Decision",
    "Evidence",
    "GuardSettings",
    "Objective",
    "adapt_folder",
    "build_objective",
    "check_settings",
]
