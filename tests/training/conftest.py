# SPDX-License-Identifier: Apache-2.0
"""The tests of training and bundle share `tiny_scans.py` and a trained model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from samda.io import packaged
from samda.networks.backbones import ViTConfig
from samda.task import Task

sys.path.insert(0, str(Path(__file__).parent))

from tiny_scans import TASK, tiny_keys, write_case, write_datalist


@pytest.fixture(scope="session")
def task() -> Task:
    """Two organs, 64 pixels of 4 mm."""
    return Task.from_dict(TASK)


@pytest.fixture(name="write_case")
def _write_case(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes a case: `write_case("a", seed=1, empty=False, shape=(40, 36, 8))`."""
    return partial(write_case, tmp_path)


@pytest.fixture(scope="session")
def datalist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training cases, one for validation, one for testing."""
    return write_datalist(tmp_path_factory.mktemp("scans"))


@pytest.fixture
def keys(tiny_vit_config: ViTConfig, tiny_weights: Path) -> dict[str, Any]:
    """Keys of train.json for a training of a second or two."""
    return tiny_keys(tiny_vit_config, tiny_weights)


@pytest.fixture(scope="session")
def model(
    tmp_path_factory: pytest.TempPathFactory, datalist: Path, tiny_vit_config: ViTConfig, tiny_weights: Path
) -> Path:
    """A model folder, trained by the command line of MONAI from a folder that is neither bundle nor checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "task.yaml").write_text(json.dumps(TASK))
    bundle = packaged("bundles", "sam_segmentation")
    files = [str(bundle / "configs" / "train.json"), str(packaged("configs", "adapters", "sam_da.yaml"))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    keys = {"bundle_root": bundle, "dataset_dir": datalist, "output_dir": "model", "task": "task.yaml"}
    keys |= {"backbone": tiny_vit_config.to_json(), "weights": tiny_weights, "epochs": 12, "views": 2, "device": "cpu"}
    for key, value in keys.items():
        command += [f"--{key}", str(value)]
    root = str(Path(__file__).parents[2])  # for a checkout that is not installed
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr
    assert "samda.training.handlers - INFO - epoch 12/12: loss" in done.stderr
    return folder / "model"
