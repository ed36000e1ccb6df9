# SPDX-License-Identifier: Apache-2.0
"""Tiny CT scans written on the fly: two organs in a body, three different side lengths and voxel sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from samda.networks.backbones import BackboneConfig

CLASSES = ("background", "liver", "spleen")
TASK = {"name": "tiny", "classes": list(CLASSES), "spacing": 4.0, "image_size": 64}
AFFINE = np.diag([4.2, 3.9, 5.0, 1.0])


def write_case(
    folder: Path, name: str, seed: int = 0, empty: bool = False, shape: tuple[int, int, int] = (40, 36, 8)
) -> dict[str, Any]:
    """Write image and label of one case; the first and the last slice hold no organ, with `empty` none does."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    x, y = random.integers(8, 14, 2)
    label[x : x + 8, y : y + 10, 1:-1] = 1
    label[x + 12 : x + 18, y + 2 : y + 9, 1:-1] = 2
    image = np.full(shape, -900.0)
    image[3:-3, 3:-3] = -50
    image += 120 * (label == 1) + 260 * (label == 2) + random.normal(0, 5, shape)
    paths = {"image": folder / f"{name}.nii.gz", "label": folder / f"{name}_label.nii.gz"}
    nib.save(nib.Nifti1Image(image.astype(np.int16), AFFINE), paths["image"])
    nib.save(nib.Nifti1Image(label * (not empty), AFFINE), paths["label"])
    return {"id": name} | {key: str(path) for key, path in paths.items()}


def write_datalist(folder: Path) -> Path:
    """A datalist of two training cases, one validation case and one test case; its labels name the classes."""
    cases = [write_case(folder, name, seed) for seed, name in enumerate("abcd")]
    for case in cases:
        case |= {key: Path(case[key]).name for key in ("image", "label")}
    sections = {"training": cases[:2], "validation": cases[2:3], "test": cases[3:]}
    path = folder / "datalist.json"
    path.write_text(json.dumps({"labels": {str(k): name for k, name in enumerate(CLASSES)}} | sections))
    return path


def tiny_keys(config: BackboneConfig, weights: Path) -> dict[str, Any]:
    """Keys of train.json for a training of a second or two."""
    return {"backbone": config.to_json(), "weights": str(weights), "epochs": 2, "views": 2, "batch_size": 4}
