# SPDX-License-Identifier: Apache-2.0
"""A large scan fits into a small computer."""

from __future__ import annotations

import gzip
import subprocess
import sys

import nibabel as nib
import numpy as np

MEASURE = """
import pathlib, resource, sys
from samda.data.slices import SliceGrid
from samda.task import Task
from samda.data.transforms import build_preprocessing
task = Task()
volume = build_preprocessing(task, labels=False)({"image": sys.argv[1]})["image"]
grid = SliceGrid.from_volume(volume, volume.affine, task)
grid.extract(volume, slice(0, 8))
assert grid.num_slices == 600, grid.num_slices
status = pathlib.Path("/proc/self/status")
if status.exists():  # Linux counts what the parent held at the fork into ru_maxrss, but not here
    print(int(status.read_text("utf-8").split("VmHWM:")[1].split()[0]) / 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_a_large_ct_stays_below_2500_megabytes(tmp_path):
    """512 x 512 x 600 int16 are 315 MB in the file and 630 MB as float32."""
    path = tmp_path / "large.nii.gz"
    plane = np.full((512, 512), -1000, np.int16)
    plane[100:400, 150:380] = 40
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.diag([-0.8, -0.8, 1.0, 1.0])).header
    header.set_data_shape((512, 512, 600))
    header["magic"], header["vox_offset"] = b"n+1", 352
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + b"\0\0\0\0")
        for _ in range(600):
            file.write(plane.tobytes("F"))
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2500
    path.unlink()
