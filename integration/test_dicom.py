# SPDX-License-Identifier: Apache-2.0
"""DICOM output of a real series (JPEG 2000), judged by programs of others: dciodvfy, and pydicom-seg as reader.

dciodvfy is part of Debian's dicom3tools (`apt-get install dicom3tools`); its version of 2022 does not know Label Map
Segmentation Storage.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from environments import environment, surroundings

import samda
from samda.data.readers import read_label, read_scan
from samda.inference.dicom_out import SEGMENTATIONS, write_dicom
from samda.inference.evaluate import score_files
from samda.task import name_id

KINDS = (*SEGMENTATIONS, "rtstruct")
READ = """
import sys
import numpy as np, pydicom, pydicom_seg
found = pydicom_seg.MultiClassReader().read(pydicom.dcmread(sys.argv[1]))
np.savez(sys.argv[2], data=found.data, origin=found.origin, spacing=found.spacing)
"""


@pytest.fixture(scope="module")
def patient() -> samda.examples.Example:
    """Patient B: 20 slices, whose identifiers of study and series were emptied."""
    return samda.fetch_examples()["B"]


@pytest.fixture(scope="module")
def classes(patient: samda.examples.Example) -> np.ndarray:
    """Class indices on the grid of the series, whose rows run the other way than those of the label's NIfTI."""
    ids = np.asarray(nib.load(patient.label).dataobj)[:, ::-1]
    found = np.zeros(ids.shape, np.uint8)
    for k, name in enumerate(patient.task.classes):
        found[np.isin(ids, (patient.task.labels or {}).get(name, ()))] = k
    return found


@pytest.fixture(scope="module")
def files(
    patient: samda.examples.Example, classes: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dicom")
    return {kind: write_dicom(kind, folder / f"{kind}.dcm", classes, patient.task, patient.image) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_series_comes_back(
    patient: samda.examples.Example, classes: np.ndarray, files: dict[str, Path], kind: str
) -> None:
    names = np.array([0, *(name_id(name) for name in patient.task.classes[1:])])
    scan = read_label(files[kind], patient.image)
    assert int((scan.array != names[classes]).sum()) == 0
    np.testing.assert_allclose(scan.affine, read_scan(patient.image).affine, atol=1e-6)
    scores = score_files(files[kind], patient.label, patient.task, 3.0)
    assert {score.dice for score in scores if score.dice == score.dice} == {1.0}


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_dciodvfy_finds_no_error(files: dict[str, Path], kind: str) -> None:
    assert shutil.which("dciodvfy"), "dciodvfy is missing: apt-get install dicom3tools"
    done = subprocess.run(["dciodvfy", str(files[kind])], capture_output=True, encoding="utf-8", timeout=300)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line in ("Segmentation", "RTStructureSet") for line in lines)  # it knows what it looks at
    assert not [line for line in lines if line.startswith(("Error", "Abort"))]


def test_an_independent_reader_finds_the_same_voxels(
    classes: np.ndarray, files: dict[str, Path], patient: samda.examples.Example, tmp_path: Path
) -> None:
    python = environment("pydicom_seg")
    command = [str(python), "-c", READ, str(files["dicom-seg"]), str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, env=surroundings(), timeout=600)
    found = np.load(tmp_path / "found.npz")
    affine = read_scan(patient.image).affine
    first = np.rint(np.linalg.solve(affine, [*(found["origin"] * (-1, -1, 1)), 1]))[:3].astype(int)
    np.testing.assert_allclose(found["spacing"], np.abs(np.diag(affine))[:3], atol=1e-4)
    numbers = np.zeros(patient.task.num_classes, int)
    numbers[np.unique(classes)[1:]] = np.arange(1, len(np.unique(classes)))  # empty classes are left out
    whole = np.zeros(classes.shape, int)
    shape = found["data"].shape[::-1]
    whole[tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))] = found["data"].transpose(2, 1, 0)
    assert int((whole != numbers[classes]).sum()) == 0
