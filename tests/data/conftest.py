# SPDX-License-Identifier: Apache-2.0
"""The real example scans, fetched once through the only way there is, and cached."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from samda.examples import Examples, fetch_examples

sys.path.insert(0, str(Path(__file__).parent))  # for volumes.py, which these tests share


@pytest.fixture(scope="session")
def examples() -> Examples:
    return fetch_examples()
