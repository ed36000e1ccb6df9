# SPDX-License-Identifier: Apache-2.0
"""`benchmarks` is importable from the root of the repository; a small data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks`, from the root of the repository."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def nuclei(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of data sets with four pictures of `nuclei_stain`, of which two may train and two are held out."""
    from benchmarks.evidence import datasets

    dice, root = np.random.default_rng(0), tmp_path / "data"
    for name in ("images", "masks"):
        (root / "nuclei_stain" / name).mkdir(parents=True)
    for case in "abcd":
        mask = np.zeros((40, 48), np.uint8)
        mask[8:24, 10:30] = 1
        image = np.stack([dice.integers(0, 60, mask.shape) + 120 * mask] * 3, -1).astype(np.uint8)
        image[..., 1] //= 2  # a color
        Image.fromarray(image).save(root / "nuclei_stain" / "images" / f"stain_{case}.png")
        Image.fromarray(mask).save(root / "nuclei_stain" / "masks" / f"stain_{case}.png")
    split = {"test": ["stain_c", "stain_d"], "train": ["stain_a", "stain_b"], "first": [["stain_b", "stain_a"]]}
    monkeypatch.setitem(datasets.SPLITS, "nuclei_stain", split)
    return root
