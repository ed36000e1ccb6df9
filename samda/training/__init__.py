# SPDX-License-Identifier: Apache-2.0
"""Training: small builders that the bundle's train.json and the command line share, under names that stay."""

from __future__ import annotations

from samda.training.cases import build_task, dataset_labels, label_gaps, labeled_cases, training_cases
from samda.training.checkpoint import Checkpoint, Resume, SaveCheckpoint
from samda.training.config_check import check_config, check_overrides
from samda.training.datasets import RenewViews, SliceDataset, build_dataset, prepare_batch
from samda.training.ddp import PaddedDataset, RankSampler, WholeBatchLoss, batch_share, distribute
from samda.training.finish import save_training
from samda.training.handlers import CaseDice, Progress, RecordEpoch, TrainingRecord, ValidationProgress
from samda.training.loss import DiceCELoss
from samda.training.optim import (
    BackToTraining,
    ClipGradients,
    ParameterAverage,
    PenalizedLoss,
    build_optimizer,
    build_schedule,
    parameter_groups,
)
from samda.training.pace import Attach, Ended, Pace
from samda.training.parent import SoftTargets, parent_share, read_parent, start_from
from samda.training.run import train
from samda.training.sampler import JoinValidation, SliceSampler, Validate
from samda.training.tracking import MLflow, TensorBoard
