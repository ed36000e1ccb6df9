# SPDX-License-Identifier: Apache-2.0
"""nnU-Net v2 itself, from its own package and by its own commands, on the same cases and in the same CPU time.

nnU-Net plans, preprocesses, augments, trains and predicts; only the length of the training is ours
(`nnunet_trainer/cpu_budget.py`). It lives in an environment of its own, which is made on the first call (`nnunet.txt`).
Volumes are linked; pictures become NIfTI files of one slice in the work folder, a file a channel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from samda.data import read_scan
from samda.inference import Prediction
from samda.io import write_json

from .apart import HERE, interpreter, run_there

ID, NAME = 1, "Dataset001_Evidence"
TRAINER = "CpuBudgetTrainerNoMirroring"  # sides differ: left and right eyes, front and back of the hippocampus
MINUTES = 60  # wall time of each command, on top of the budget


def train_nnunet(
    lists: Sequence[Path], folder: Path, classes: tuple[str, ...], cpu_seconds: float, seed: int, configuration: str
) -> dict[str, Any]:
    """Train a configuration on the first list until the CPU time is spent; write label maps of all test cases.

    Args:
        lists: data lists; the test section of each goes to `folder`/predictions/ and its name.
        folder: work folder.
        classes: background first.
        cpu_seconds: of the training steps, with nnU-Net's augmentation; planning and preprocessing do not count.
        seed: of weights, sampling and augmentation.
        configuration: "2d" or "3d_fullres".

    Returns:
        {"cpu_seconds", "steps", "parameters", "batch_size", "patch_size", "losses"}

    Raises:
        NotRun: a command failed.
    """
    python = interpreter("nnunet")
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in lists]
    write_dataset(folder / "raw" / NAME, contents[0]["training"], classes)
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
    wait = 60 * MINUTES
    prepare = ["-d", ID, "-c", configuration, "-np", 1, "-npfp", 1, "--verify_dataset_integrity"]
    run_there([python.with_name("nnUNetv2_plan_and_preprocess"), *prepare], wait, **surroundings)
    surroundings["nnUNet_n_proc_DA"] = "0"  # augmentation in the process whose CPU time is counted
    learn = [ID, configuration, "all", "-tr", TRAINER, "-device", "cpu"]
    run_there([python.with_name("nnUNetv2_train"), *learn], wait + 10 * cpu_seconds, **surroundings)
    for file, content in zip(lists, contents, strict=True):
        source, target, output = (folder / name / file.stem for name in ("scans", "maps", "predictions"))
        for case in content["test"]:
            write_case(case, source)
        predict = ["-i", source, "-o", target, "-d", ID, "-c", configuration, "-f", "all", "-tr", TRAINER]
        predict += ["-device", "cpu", "-npp", 1, "-nps", 1, "--disable_progress_bar"]
        run_there([python.with_name("nnUNetv2_predict"), *predict], wait, **surroundings)
        for case in content["test"]:
            labels = np.asarray(nib.load(target / f"{case['id']}.nii.gz").dataobj).astype(np.uint8)
            affine = read_scan(case["image"], None).affine
            Prediction(case["id"], labels, affine, classes, Path(case["image"])).save(output)
    counted = folder / "results" / NAME / f"{TRAINER}__nnUNetPlans__{configuration}" / "fold_all" / "budget.json"
    row = json.loads(counted.read_text(encoding="utf-8"))
    return row | {"losses": row["losses"][-1:]}


def write_dataset(folder: Path, cases: Sequence[dict[str, str]], classes: tuple[str, ...]) -> None:
    """nnU-Net's raw data set of the training cases: `imagesTr`, `labelsTr` and `dataset.json`."""
    channels = max(write_case(case, folder / "imagesTr", folder / "labelsTr") for case in cases)
    names = {str(k): f"channel {k}" for k in range(channels)}  # no name that nnU-Net knows: each scan is standardized
    labels = {name: k for k, name in enumerate(classes)}
    content = {"channel_names": names, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", content)


def write_case(case: dict[str, str], images: Path, labels: Path | None = None) -> int:
    """Link or convert a case; how many channels it has."""
    images.mkdir(parents=True, exist_ok=True)
    files = [(case["image"], images, "_{:04d}")]
    if labels is not None:
        labels.mkdir(parents=True, exist_ok=True)
        files.append((case["label"], labels, ""))
    counts = []
    for path, folder, suffix in files:
        if path.endswith(".nii.gz"):
            (folder / f"{case['id']}{suffix.format(0)}.nii.gz").symlink_to(path)
            counts.append(1)
            continue
        scan = read_scan(path, None)
        array = scan.array if scan.array.ndim == 4 else scan.array[..., None]
        for k in range(array.shape[-1]):
            plain = nib.Nifti1Image(np.ascontiguousarray(array[..., k].astype(np.uint8)), scan.affine)
            nib.save(plain, folder / f"{case['id']}{suffix.format(k)}.nii.gz")
        counts.append(array.shape[-1])
    return counts[0]
