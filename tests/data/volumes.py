# SPDX-License-Identifier: Apache-2.0
"""Small scans written on the fly: three different side lengths, so that no two axes can be confused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (10, 14, 6)


def oblique(spacing=(1.5, 0.8, 4.0), angles=(0.2, -0.15, 0.1), origin=(-31.0, 17.0, 250.0)) -> np.ndarray:
    """An affine of rotated axes with three different voxel sides."""
    a, b, c = angles
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = z @ y @ x @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


AFFINES = {
    "ras": np.array([[2.0, 0, 0, 5], [0, 0.7, 0, -8], [0, 0, 3, 11], [0, 0, 0, 1]]),
    "lps": np.array([[-2.0, 0, 0, 5], [0, -0.7, 0, -8], [0, 0, 3, 11], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, -3.0, 40], [2.0, 0, 0, -9], [0, -0.7, 0, 30], [0, 0, 0, 1]]),
    "oblique": oblique(),
    "oblique flipped": oblique() @ np.diag([-1, 1, -1, 1.0]),
}


def numbered(shape=SHAPE) -> np.ndarray:
    """Every voxel its own number, from -100."""
    return (np.arange(np.prod(shape)).reshape(shape) - 100).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray, sform: int = 1, qform: int = 1) -> str:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return str(path)


def world(affine: np.ndarray, voxel) -> np.ndarray:
    return affine[:3, :3] @ np.asarray(voxel, float) + affine[:3, 3]
