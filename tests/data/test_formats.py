# SPDX-License-Identifier: Apache-2.0
"""Scans in memory become files for the time of reading, and nothing of the object changes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samda.data.formats import name_of, scan_path
from samda.data.readers import read_scan
from samda.errors import InputError

AFFINE = np.array([[0, -2.0, 0.1, 30], [2.5, 0, 0, -40], [0, 0, 5.0, 7], [0, 0, 0, 1]])


def test_a_path_is_itself(tmp_path: Path) -> None:
    with scan_path(str(tmp_path / "nowhere")) as path:
        assert path == str(tmp_path / "nowhere")


def test_an_object_is_a_file_while_it_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    image = nib.Nifti1Image(values, AFFINE)
    assert name_of(image) == "image"
    nib.save(image, tmp_path / "liver_0.nii.gz")
    with scan_path(image) as path:
        scan = read_scan(path)
    assert not Path(path).exists()
    assert np.array_equal(scan.array, values)
    assert np.allclose(scan.affine, image.affine)  # files store single precision
    assert image.get_filename() == str(tmp_path / "liver_0.nii.gz")
    assert name_of(image) == "liver_0"


def test_an_affine_changed_in_place_counts() -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), AFFINE)
    image.affine[:3, 3] += 100
    with scan_path(image) as path:
        assert np.allclose(read_scan(path).affine, AFFINE + np.outer([100, 100, 100, 0], [0, 0, 0, 1]))


def test_messages_name_the_object_and_not_the_file() -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.uint8), AFFINE)
    with pytest.raises(InputError, match=r"^the nibabel image 'image' ") as caught, scan_path(image) as path:
        read_scan(path)
    assert "samda-" not in str(caught.value)
