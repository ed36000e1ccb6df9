# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a whole prediction, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[2]
SHAPE, CLASSES = (320, 320, 80), 16


def test_memory_does_not_grow_with_classes_times_voxels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-900, 300, SHAPE[:2]).astype(np.int16)
    scan = tmp_path / "ct.nii"
    nib.save(nib.Nifti1Image(np.repeat(values[..., None], SHAPE[2], 2), np.diag([1.0, 1.0, 2.0, 1.0])), scan)
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--scan", str(scan), "--network", "cheap"]
    command += ["--classes", str(CLASSES), "--budget", "32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment)
    result = json.loads(run.stdout.splitlines()[-1])
    maps_gb = 4 * CLASSES * np.prod(SHAPE) / 1e9  # all probabilities at once: 0.52 GB
    assert result["peak_gb"] - result["before_gb"] < 0.7 * maps_gb
    assert nib.load(tmp_path / "labels" / "ct.nii.gz").shape == SHAPE
