# SPDX-License-Identifier: Apache-2.0
"""The public face: a trained model as one object that predicts, adapts and is saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import samda

OLD = Path(__file__).parent / "models" / "written_by_0_1_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two versions, of which "clinic-a" is active, and with its base weights inside."""
    place = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(OLD / "adapted", place)
    base = load_file(OLD / "base" / "decoder.safetensors") | load_file(OLD / "base" / "tiny_vit.safetensors")
    save_file(base, place / "base.safetensors")
    return place


@pytest.fixture
def scan() -> nib.Nifti1Image:
    x, y, z = np.indices((40, 36, 4))
    values = np.where((x >= 3) & (x < 37) & (y >= 3) & (y < 33), -50, -900) + (7 * x + 13 * y + 29 * z) % 200
    return nib.Nifti1Image(values.astype(np.int16), np.diag([4.2, 3.9, 5.0, 1.0]))


def test_predict_adapt_save(folder: Path, scan: nib.Nifti1Image, tmp_path: Path) -> None:
    model = samda.load(folder)
    assert model.version == "clinic-a" and model.task.num_classes == 3
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    prediction = model.predict(scan, probabilities=True, batch_size=2)
    assert prediction.image.shape == scan.shape and prediction.probabilities.shape == (3, *scan.shape)
    adapted = model.adapt(scan, views=2, slices=2, steps=1)
    assert adapted.record["model_version"] == "clinic-a"
    assert np.array_equal(adapted.source, prediction.labels)
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())

    model.save(tmp_path / "new" / "copy", with_base=True)
    copy = samda.load(tmp_path / "new" / "copy")
    assert (copy.version, copy.task, copy.record) == ("source", model.task, model.record)
    assert np.array_equal(copy.predict(scan).labels, prediction.labels)


def test_versions_and_modality(folder: Path, scan: nib.Nifti1Image) -> None:
    assert samda.load(folder, version="source").version == "source"
    with pytest.raises(samda.UsageError, match="clinic-b"):
        samda.load(folder, version="clinic-b")
    model = samda.load(folder)
    assert model.task.modality == "CT"
    with pytest.raises(samda.UsageError, match="PET"):
        model.predict(scan, modality="PET")
    assert model.predict(scan, modality="MR", keep_largest=True).labels.shape == scan.shape
