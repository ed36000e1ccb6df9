# SPDX-License-Identifier: Apache-2.0
"""The adapter tests share `adapter_tools.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
