# SPDX-License-Identifier: Apache-2.0
"""nnU-Net's trainer with a budget of CPU time instead of epochs; nnU-Net finds it through `nnUNet_extTrainer`.

Runs in nnU-Net's own environment. Everything but the length is nnU-Net's: plan, network, loss, optimizer, augmentation,
sampling. The rate falls polynomially with the share of the budget that is spent, once a step instead of once an epoch.
Budget, threads and seed come from the environment: SAMDA_CPU_SECONDS, OMP_NUM_THREADS, SAMDA_SEED.
"""

import os
import random
import time

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, save_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class CpuBudgetTrainer(nnUNetTrainer):
    """Trains until the CPU time is spent, then writes `budget.json` beside the checkpoint."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the command takes all cores
        seed = int(os.environ["SAMDA_SEED"])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (nnU-Net draws from it)
        torch.manual_seed(seed)
        super().__init__(plans, configuration, fold, dataset_json, device)

    def run_training(self):
        """Steps until the budget is spent; no validation, the last weights are kept."""
        budget = float(os.environ["SAMDA_CPU_SECONDS"])
        self.on_train_start()
        self.network.train()
        steps, start, losses = 0, time.process_time(), []
        while (spent := time.process_time() - start) < budget:
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (1 - spent / budget) ** 0.9
            losses.append(float(self.train_step(next(self.dataloader_train))["loss"]))
            steps += 1
        self.current_epoch = 1
        self.on_train_end()
        save_json(
            {
                "steps": steps,
                "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
                "batch_size": self.configuration_manager.batch_size,
                "patch_size": [int(side) for side in self.configuration_manager.patch_size],
                "cpu_seconds": round(spent, 1),
                "losses": [round(loss, 4) for loss in losses],
            },
            join(self.output_folder, "budget.json"),
        )

    def perform_actual_validation(self, save_probabilities=False):
        """Nothing: what is scored are slices that nnU-Net does not know."""

    def plot_network_architecture(self):
        """Nothing: it needs graphviz's programs."""


class CpuBudgetTrainerNoMirroring(CpuBudgetTrainer):
    """The same without mirroring, as nnUNetTrainerNoMirroring: for organs that are told apart by their side."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy, initial, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy, initial, None
