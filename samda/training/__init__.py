# SPDX-License-Identifier: Apache-2.0
"""Training: small builders that the bundle's train.json and the command line share."""

from __future__ import annotations

from samda.training.cases import build_task, dataset_labels, labeled_cases, training_cases
from samda.training.checkpoint import Checkpoint, Resume, SaveCheckpoint
from samda.training.config_check import check_config, check_overrides
from samda.training.datasets import SliceDataset, SliceSampler, build_dataset, prepare_batch
from samda.training.ddp import PaddedDataset, RankSampler, WholeBatchLoss, batch_share, distribute
from samda.training.finish import save_training
from samda.training.handlers import CaseDice, MLflow, Progress, RecordEpoch, TensorBoard, TrainingRecord
from samda.training.loss import DiceCELoss
from samda.training.optim import PenalizedLoss, build_optimizer, build_schedule, parameter_groups
from samda.training.run import train

__all__ = [
    "CaseDice",
    "Checkpoint",
    "DiceCELoss",
    "MLflow",
    "PaddedDataset",
    "PenalizedLoss",
    "Progress",
    "RankSampler",
    "RecordEpoch",
    "Resume",
    "SaveCheckpoint",
    "SliceDataset",
    "SliceSampler",
    "TensorBoard",
    "TrainingRecord",
    "WholeBatchLoss",
    "batch_share",
    "build_dataset",
    "build_optimizer",
    "build_schedule",
    "build_task",
    "check_config",
    "check_overrides",
    "dataset_labels",
    "distribute",
    "labeled_cases",
    "parameter_groups",
    "prepare_batch",
    "save_training",
    "train",
    "training_cases",
]
