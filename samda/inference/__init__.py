# SPDX-License-Identifier: Apache-2.0
"""Inference: prediction of label maps, evaluation, and effective receptive fields."""

from __future__ import annotations

from samda.inference.evaluate import evaluate, score_cases
from samda.inference.folder import CaseEvaluator, predict_folder
from samda.inference.postprocessing import SaveLabelMapd, build_postprocessing
from samda.inference.predict import Prediction, Predictor
from samda.inference.volume import VolumeInferer
from samda.receptive_field import ErfMap, area_ratios, body_slices, measure_erf

__all__ = [
    "CaseEvaluator",
    "ErfMap",
    "Prediction",
    "Predictor",
    "SaveLabelMapd",
    "VolumeInferer",
    "area_ratios",
    "body_slices",
    "build_postprocessing",
    "evaluate",
    "measure_erf",
    "predict_folder",
    "score_cases",
]
