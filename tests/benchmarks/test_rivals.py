# SPDX-License-Identifier: Apache-2.0
"""Networks from scratch get the same cases; nothing of nnU-Net has to be installed for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from samda.inference import evaluate
from samda.task import Task


@pytest.fixture
def pictures(nuclei: Path, tmp_path: Path) -> Path:
    """A data list of two training and two test pictures."""
    from benchmarks.evidence.datasets import split, write_list

    return write_list("nuclei_stain", *split("nuclei_stain", nuclei, 2, 0), tmp_path / "list.json")


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """A data list of one training and one test volume of different sizes."""
    dice, cases = np.random.default_rng(0), []
    for name, shape in (("a", (20, 25, 18)), ("b", (17, 22, 20))):
        label = np.zeros(shape, np.uint8)
        label[4:12, 4:15, 4:14] = 1
        scan = dice.normal(0, 10, shape).astype(np.float32) + 100 * label
        for kind, array in (("image", scan), ("label", label)):
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / f"{name}_{kind}.nii.gz")
        paths = {kind: str(tmp_path / f"{name}_{kind}.nii.gz") for kind in ("image", "label")}
        cases.append({"id": name, "patient": name} | paths)
    content = {"labels": {"background": 0, "x": 1}, "training": cases[:1], "test": cases[1:]}
    (tmp_path / "volumes.json").write_text(json.dumps(content))
    return tmp_path / "volumes.json"


@pytest.mark.parametrize(("kind", "dimensions"), [("pictures", 2), ("volumes", 2), ("volumes", 3)])
def test_the_u_net_trains_for_its_budget(kind: str, dimensions: int, tmp_path: Path, request) -> None:
    from benchmarks.evidence.unet import train_unet

    data, classes = request.getfixturevalue(kind), ("background", "nucleus" if kind == "pictures" else "x")
    row = train_unet([data], tmp_path / "maps", classes, cpu_seconds=1.5, seed=0, dimensions=dimensions)
    assert row["steps"] >= 1 and row["cpu_seconds"] >= 1.5 and len(row["patch"]) == dimensions
    found = evaluate(tmp_path / "maps" / data.stem, data, Task(classes=classes), section="test")
    assert not found.failed and len(found.cases) == (2 if kind == "pictures" else 1), "maps lie on the scans' own grids"


def test_patches_and_batches() -> None:
    from benchmarks.evidence.unet import batch_of, patch_of

    items = [{"image": torch.zeros(1, *size)} for size in ((35, 51, 35), (30, 40, 47))]
    assert patch_of(items, 3) == (48, 64, 48) and batch_of((48, 64, 48)) == 2
    assert patch_of([{"image": torch.zeros(3, 999, 960)}], 2) == (256, 256) and batch_of((256, 256)) == 2
    assert batch_of((48, 64)) == 16


def test_every_class_has_its_share_of_the_patches() -> None:
    from benchmarks.evidence.unet import build_augmentation

    label = torch.zeros(1, 64, 64, dtype=torch.uint8)
    label[0, :4, :4], label[0, -4:, -4:] = 1, 2
    augmentation = build_augmentation((16, 16), 3)
    augmentation.set_random_state(seed=0)
    drawn = [augmentation({"image": torch.zeros(1, 64, 64), "label": label})[0]["label"] for _ in range(200)]
    for k in (1, 2):  # by chance a patch of 16 x 16 rarely shows a corner
        assert sum(bool((patch == k).any()) for patch in drawn) > 15
    assert all(patch.shape == (1, 16, 16) for patch in drawn)


def test_rate_falls_to_zero_with_the_budget() -> None:
    from benchmarks.evidence.unet import RATE, rate

    assert rate(0) == RATE and rate(0.5) == pytest.approx(RATE * 0.5**0.9) and rate(1) == rate(1.2) == 0


def test_nnunet_gets_exactly_the_training_cases(pictures: Path, volumes: Path, tmp_path: Path) -> None:
    from benchmarks.evidence.nnunet import write_dataset

    for data, names in ((pictures, {"stain_a", "stain_b"}), (volumes, {"a"})):
        folder = tmp_path / data.stem
        write_dataset(folder, json.loads(data.read_text("utf-8"))["training"], ("background", "x"))
        content = json.loads((folder / "dataset.json").read_text("utf-8"))
        channels = len(content["channel_names"])
        assert channels == (3 if data == pictures else 1) and content["labels"] == {"background": 0, "x": 1}
        assert content["numTraining"] == len(names) and content["file_ending"] == ".nii.gz"
        found = {path.name for path in (folder / "imagesTr").iterdir()}
        assert found == {f"{name}_{k:04d}.nii.gz" for name in names for k in range(channels)}
        assert {path.name for path in (folder / "labelsTr").iterdir()} == {f"{name}.nii.gz" for name in names}
    image: Any = nib.load(tmp_path / "list" / "imagesTr" / "stain_a_0000.nii.gz")
    label: Any = nib.load(tmp_path / "list" / "labelsTr" / "stain_a.nii.gz")
    assert image.shape == label.shape == (48, 40, 1) and np.array_equal(image.affine, label.affine)
    assert int(np.asarray(label.dataobj).sum()) == 16 * 20
