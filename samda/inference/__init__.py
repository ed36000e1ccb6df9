# SPDX-License-Identifier: Apache-2.0
"""Inference: scans to label maps on their own grids, and label maps to scores."""

from __future__ import annotations

from samda.inference.evaluate import evaluate
from samda.inference.postprocessing import SaveLabelMapd, build_postprocessing
from samda.inference.predict import Prediction, Predictor, find_cases, predict_folder
from samda.inference.volume import VolumeInferer

__all__ = [
    "Prediction",
    "Predictor",
    "SaveLabelMapd",
    "VolumeInferer",
    "build_postprocessing",
    "evaluate",
    "find_cases",
    "predict_folder",
]
