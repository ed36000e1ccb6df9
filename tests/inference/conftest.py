# SPDX-License-Identifier: Apache-2.0
"""Phantom scans whose right answer is known at every voxel, and a network that reads it off the intensities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn as nn

from samda.task import Task

# HU -> [0, 1] by the window -200 to 200: class 0 at 0.5, class 1 at 0.9, class 2 at 0.2. No value between 0.5 and one
# of the others belongs to the third, so interpolation never invents a class; 0 (beyond the volume) is background, too.
HU = (0, 160, -120)


class BandNetwork(nn.Module):
    """Sharp logits of three classes from the intensity of each pixel; records the shapes it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(200.0))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        x = x[:, :1]
        high, low = x - 0.7, torch.minimum(0.35 - x, x - 0.05)
        return self.scale * torch.cat([-torch.maximum(high, low), high, low], 1)


@pytest.fixture
def band_network() -> BandNetwork:
    """The network that finds the phantom's classes."""
    return BandNetwork()


@pytest.fixture
def band_task() -> Task:
    """Its task: slices of 64 pixels of 1 mm."""
    return Task(name="bands", classes=("background", "bright", "dark"), window=(-200, 200), spacing=1.0, image_size=64)


def truth(shape: tuple[int, int, int]) -> np.ndarray:
    """Two boxes of different size, off center along every axis: no flip or axis swap maps them onto themselves."""
    labels = np.zeros(shape, np.uint8)
    x, y, z = shape
    labels[x // 8 : x // 2, y // 2 : y - y // 8, : (z + 1) // 2] = 1
    labels[x // 2 + x // 8 : x - x // 8, y // 8 : y // 3, z // 3 :] = 2
    return labels


def write_scan(path: Path, labels: np.ndarray, affine: np.ndarray, codes: tuple[int, int] = (1, 1)) -> Path:
    """Write a CT whose intensities show `labels`; codes: of qform and sform."""
    image = nib.Nifti1Image(np.asarray(HU, np.int16)[labels], affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header["descrip"] = b"Jane Doe"
    nib.save(image, path)
    return path


def oblique(spacing_mm: tuple[float, float, float], degrees: float = 20.0, flips: tuple = (1, 1, 1)) -> np.ndarray:
    """An affine rotated about two axes, with an offset."""
    a, b = np.deg2rad([degrees, degrees / 2])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(np.asarray(spacing_mm) * flips)
    affine[:3, 3] = (-31.5, 12.25, 104.75)
    return affine


@pytest.fixture
def small_sam(make_segmenter: Callable[..., nn.Module]) -> nn.Module:
    """A tiny SAM whose three classes differ, as after a training."""
    network = make_segmenter().eval()
    generator = torch.Generator().manual_seed(7)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name in network.head_params():
            parameters[name] += 0.5 * torch.randn(parameters[name].shape, generator=generator)
    return network


@pytest.fixture
def phantom() -> SimpleNamespace:
    """Builders of phantom scans: `truth`, `write` and `oblique`."""
    return SimpleNamespace(truth=truth, write=write_scan, oblique=oblique)
