# SPDX-License-Identifier: Apache-2.0
"""The tests of training and bundle share `tiny_scans.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from samda.data.task import Task
from samda.networks.backbones import ViTConfig

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
