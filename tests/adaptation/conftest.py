# SPDX-License-Identifier: Apache-2.0
"""A tiny model that really segments: two ellipsoids in noise, trained in seconds, with its source statistics."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samda.adaptation.engine import Adaptation
from samda.data.slices import SliceGrid
from samda.data.transforms import build_preprocessing
from samda.models.folder import save_model
from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import SliceStatistics, feature_statistics
from samda.task import Task
from tests.conftest import TINY_TINYVIT

TASK = Task(name="blobs", classes=("background", "liver", "spleen"), window=(0.0, 1000.0), spacing=2.0, image_size=64)
# a guard that accepts whatever changed
ALWAYS = {
    "skip_agreement": 2.0,
    "tolerance": 1.0,
    "improvement": -2.0,
    "plausible": 1.0,
    "volume_factor": 1e9,
    "vanished": 0.0,
    "drift_factor": 1e9,
}
SHAPE = (52, 44, 9)  # 2 mm, RAS


def scan(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU-like values (X, Y, Z) and labels: a body of 350, a bright liver on the right, a dark spleen on the left."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")

    def ellipsoid(center: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        middle = np.array(center) + rng.uniform(-1, 1, 3)
        return sum(((a - m) / r) ** 2 for a, m, r in zip((x, y, z), middle, radii, strict=True)) < 1

    labels = np.zeros(SHAPE, np.uint8)
    image = np.full(SHAPE, -200.0)
    image[((x - 26) / 24) ** 2 + ((y - 22) / 20) ** 2 < 1] = 350
    for k, place, value in ((1, ((34, 22, 4), (9, 11, 6)), 750), (2, ((15, 18, 4), (6, 7, 5)), 120)):
        mask = ellipsoid(*place)
        labels[mask], image[mask] = k, value
    return (image + rng.normal(0, 20, SHAPE)).astype(np.float32), labels


def save(path: Path, values: np.ndarray) -> Path:
    """Save as NIfTI at 2 mm with an origin and form codes of its own."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-50, -40, 10)
    image = nib.Nifti1Image(values, affine)
    image.header.set_qform(affine, code=1)
    image.header.set_sform(affine, code=2)
    nib.save(image, path)
    return path


def slices_of(path: Path, label: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices (n, 1, 64, 64) and labels (n, 64, 64) of a saved scan."""
    task = Task.from_dict(TASK.to_dict() | {"labels": {"liver": [1], "spleen": [2]}})
    data = build_preprocessing(task, labels=True)({"image": str(path), "label": str(label)})
    grid = SliceGrid.from_volume(data["image"], data["image"].affine, TASK)
    every = range(grid.num_slices)
    return grid.extract(data["image"], every), grid.extract_labels(data["label"], every)


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with scans 0 to 3: two to train on, two of the same kind."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for seed in range(4):
        image, labels = scan(seed)
        save(folder / "images" / f"case{seed}.nii.gz", image)
        save(folder / "labels" / f"case{seed}.nii.gz", labels)
    return folder


@pytest.fixture(scope="session")
def trained(scans: Path, tiny_tinyvit_weights: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trained tensors, and the record with source statistics."""
    network = build(tiny_tinyvit_weights)
    statistics, embeddings, targets = SliceStatistics(TASK), [], []
    for seed in range(2):
        images, labels = slices_of(*(scans / kind / f"case{seed}.nii.gz" for kind in ("images", "labels")))
        statistics.update(images, labels)
        with torch.no_grad():
            embeddings.append(network.encode(images)["embedding"])
        targets.append(labels.long())
    embedding, target = torch.cat(embeddings), torch.cat(targets)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        loss = F.cross_entropy(network({"embedding": embedding}), target, torch.tensor([1.0, 3.0, 3.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shown = [{"pyramid": {"embedding": e}, "label": y[None]} for e, y in zip(embedding, target, strict=True) if y.any()]
    known = statistics.to_dict() | feature_statistics(network, TASK, shown, range(len(shown)))
    return {k: v.clone() for k, v in network.state_dict().items()}, {"statistics": known}


def build(weights: Path, **adapters: Any) -> SamSegmenter:
    """The tiny network with SAM-DA and what else is named."""
    return SamSegmenter(TINY_TINYVIT, num_classes=3, weights=weights, adapters={"sam_da": {}} | adapters)


@pytest.fixture
def network(tiny_tinyvit_weights: Path, trained: tuple[dict[str, torch.Tensor], dict]) -> SamSegmenter:
    """The trained tiny network, fresh for every test."""
    result = build(tiny_tinyvit_weights)
    result.load_state_dict(trained[0])
    return result.eval()


@pytest.fixture
def make_adaptation(network: SamSegmenter, trained: tuple[dict, dict[str, Any]]) -> Callable[..., Adaptation]:
    """Builds an adaptation of the trained tiny network: small and quick unless asked."""

    def make(**settings: Any) -> Adaptation:
        return Adaptation(network, TASK, trained[1], **({"views": 4, "slices": 4, "steps": 3} | settings))

    return make


@pytest.fixture(scope="session")
def saved(tiny_tinyvit_weights: Path, trained: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained network as a model folder that needs nothing beside it."""
    network = build(tiny_tinyvit_weights)
    network.load_state_dict(trained[0])
    folder = tmp_path_factory.mktemp("saved") / "model"
    task = Task.from_dict(TASK.to_dict() | {"labels": {"liver": [1], "spleen": [2]}})
    save_model(network, folder, task, trained[1], with_base=True)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model folder for one test."""
    return shutil.copytree(saved, tmp_path / "model")
