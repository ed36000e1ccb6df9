# SPDX-License-Identifier: Apache-2.0
"""A data set of one real scan, and a model trained on it for a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import samda

sys.path.insert(0, str(Path(__file__).resolve().parent))

from environments import surroundings


@pytest.fixture(scope="session")
def scan() -> Path:
    """The scan of patient A at low resolution."""
    return Path(samda.fetch_examples()["A_small"].image)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data list of this scan."""
    example = samda.fetch_examples()["A_small"]
    path = tmp_path_factory.mktemp("data") / "dataset.json"
    case = {"id": "a", "image": str(example.image), "label": str(example.label)}
    path.write_text(json.dumps({"training": [case]}))
    return path


@pytest.fixture(scope="session")
def model(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose label maps hold organs."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    train = ["train", "-d", dataset, "-o", folder, "--task", "abdomen_ct", "--epochs", "120", "--device", "cpu"]
    more = ["--set", "views=1", "--set", "val_interval=20", "--tracking", "none", "--quiet"]
    command = [sys.executable, "-m", "samda", *map(str, train), *more]
    subprocess.run(command, check=True, env=surroundings(), timeout=1800)
    return folder
