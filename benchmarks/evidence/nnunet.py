# SPDX-License-Identifier: Apache-2.0
"""nnU-Net v2 itself, from its own package and by its own commands, on the same slices and in the same CPU time.

The training slices become one volume (nnU-Net's 2D configuration trains on its slices) and so do the scored ones, at
the grid and in the intensities that samda's network sees. nnU-Net plans, preprocesses, augments, trains and predicts;
only the length of the training is ours (`nnunet_trainer/cpu_budget.py`). It lives in an environment of its own, which
is made on the first call (`nnunet.txt`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from .apart import HERE, Exam, NotRun, interpreter, run_there

__all__ = ["read_volume", "train_nnunet", "write_dataset", "write_volume"]

CHANNEL = "CT"  # nnU-Net's name of the modality, which decides how intensities are normalized
ID, NAME = 1, "Dataset001_Slices"
PIXEL_MM, SLICE_MM = 1.0, 10.0  # of the volumes; slices far apart, so that their axis is the one that 2D leaves out
TRAINERS = {True: "CpuBudgetTrainer", False: "CpuBudgetTrainerNoMirroring"}
MINUTES = 20  # wall time of each command, on top of the budget


def train_nnunet(exam: Exam, cpu_seconds: float, seed: int, mirroring: bool = True) -> dict[str, Any]:
    """Train nnU-Net's 2D configuration on some slices until the CPU time is spent; score others.

    Args:
        exam: the slices.
        cpu_seconds: CPU time of the training steps, with nnU-Net's augmentation; planning, preprocessing and prediction
            do not count.
        seed: of weights, sampling and augmentation.
        mirroring: as nnU-Net does by default, in training and prediction; False is its trainer without.

    Returns:
        {"status": "run", "dice": per foreground class, "mean", "steps", "parameters", "batch_size", "patch_size",
        "cpu_seconds", "losses", "mirroring"}, or {"status": "not run", "reason": why}.
    """
    try:
        python = interpreter("nnunet")
        with tempfile.TemporaryDirectory() as folder:
            predicted, budget = _run(python, Path(folder), exam, cpu_seconds, seed, mirroring)
    except NotRun as error:
        return {"status": "not run", "reason": str(error)}
    return {"status": "run", **exam.scores(predicted), **budget, "mirroring": mirroring}


def _run(
    python: Path, folder: Path, exam: Exam, cpu_seconds: float, seed: int, mirroring: bool
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Predicted class indices (N, H, W) of the scored slices, and what the trainer counted."""
    write_dataset(folder / "raw" / NAME, exam)
    write_volume(exam.images[exam.test, 0], folder / "scored" / "test_0000.nii.gz")
    surroundings = {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_extTrainer": str(HERE / "nnunet_trainer"),
        "nnUNet_n_proc_DA": "1",  # the planner cannot do with 0
        "nnUNet_def_n_proc": "1",
        "SAMDA_CPU_SECONDS": str(cpu_seconds),
        "SAMDA_SEED": str(seed),
    }
    trainer, wait = TRAINERS[mirroring], 60 * MINUTES
    prepare = ["-d", str(ID), "-c", "2d", "-np", "1", "-npfp", "1", "--verify_dataset_integrity"]
    run_there([python.with_name("nnUNetv2_plan_and_preprocess"), *prepare], wait, **surroundings)
    surroundings["nnUNet_n_proc_DA"] = "0"  # augmentation in the process whose CPU time is counted
    learn = [str(ID), "2d", "all", "-tr", trainer, "-device", "cpu"]
    run_there([python.with_name("nnUNetv2_train"), *learn], wait + 5 * cpu_seconds, **surroundings)
    predict = ["-i", folder / "scored", "-o", folder / "predicted", "-d", str(ID), "-c", "2d", "-f", "all"]
    predict += ["-tr", trainer, "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar"]
    run_there([python.with_name("nnUNetv2_predict"), *predict], wait, **surroundings)
    counted = folder / "results" / NAME / f"{trainer}__nnUNetPlans__2d" / "fold_all" / "budget.json"
    return read_volume(folder / "predicted" / "test.nii.gz").long(), json.loads(counted.read_text(encoding="utf-8"))


def write_dataset(folder: Path, exam: Exam) -> None:
    """nnU-Net's raw data set of one case that holds exactly the slices that train, in their order in the scan.

    Args:
        folder: where it goes, `.../DatasetXXX_NAME`.
        exam: the slices.
    """
    chosen = sorted(exam.train)
    write_volume(exam.images[chosen, 0], folder / "imagesTr" / "train_0000.nii.gz")
    write_volume(exam.labels[chosen, 0], folder / "labelsTr" / "train.nii.gz")
    names = {"background": 0} | {f"class_{k}": k for k in range(1, exam.num_classes)}
    content = {"channel_names": {"0": CHANNEL}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_volume(slices: torch.Tensor, file: Path) -> None:
    """Slices (N, H, W) as a NIfTI volume (W, H, N): whole numbers as uint8, others as float32."""
    values = slices.permute(2, 1, 0).numpy()
    values = values.astype(np.float32 if slices.is_floating_point() else np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([PIXEL_MM, PIXEL_MM, SLICE_MM, 1.0])), file)


def read_volume(file: Path) -> torch.Tensor:
    """The slices (N, H, W) of a volume that :func:`write_volume` or nnU-Net wrote, in the file's own type."""
    image: Any = nib.load(file)
    return torch.from_numpy(np.asarray(image.dataobj).transpose(2, 1, 0).copy())
