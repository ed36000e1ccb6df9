# SPDX-License-Identifier: Apache-2.0
"""A nibabel image is predicted as its file is, and the result lies on its grid, header and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from samda.errors import InputError
from samda.inference.predict import Prediction, Predictor
from samda.task import Task

SHAPE = (40, 32, 6)
SHEARED = np.array([[1.2, 0.1, 0, -30], [0, 0.9, 0.3, 4], [0.05, 0, 4, 17], [0, 0, 0, 1]])
TURNED = np.array([[0, 0, -4.0, 9], [-0.9, 0, 0, 40], [0, 1.2, 0, -8], [0, 0, 0, 1]])  # axes permuted and flipped


@pytest.fixture
def predictor(band_network: torch.nn.Module, band_task: Task) -> Predictor:
    return Predictor(band_network, band_task)


def codes(image: nib.Nifti1Image, qform: int, sform: int) -> nib.Nifti1Image:
    image.set_qform(image.affine, qform)
    image.set_sform(image.affine, sform)
    return image


IMAGES: dict[str, Callable[[np.ndarray, SimpleNamespace], nib.Nifti1Image]] = {
    "oblique, flipped": lambda v, p: codes(nib.Nifti1Image(v, p.oblique((1.2, 0.9, 4), flips=(-1, 1, 1))), 1, 4),
    "sheared": lambda v, p: nib.Nifti1Image(v, SHEARED),
    "axes permuted": lambda v, p: codes(nib.Nifti1Image(v, TURNED), 0, 1),
    "qform only": lambda v, p: codes(nib.Nifti1Image(v, p.oblique((1.2, 0.9, 4))), 1, 0),
    "another pose in the qform": lambda v, p: codes(nib.Nifti1Image(v, np.diag([1.2, 0.9, 4, 1])), 2, 0),
    "NIfTI-2": lambda v, p: nib.Nifti2Image(v, p.oblique((1.2, 0.9, 4))),
    "a pair of files": lambda v, p: nib.Nifti1Pair(v, p.oblique((1.2, 0.9, 4))),
    "a fourth axis": lambda v, p: nib.Nifti1Image(v[..., None], p.oblique((1.2, 0.9, 4))),
    "float64": lambda v, p: nib.Nifti1Image(v.astype(float), p.oblique((1.2, 0.9, 4))),
}


def header_of(image: nib.Nifti1Image, tmp_path: Path) -> bytes:
    nib.save(image, tmp_path / "header.nii")
    return nib.load(tmp_path / "header.nii").header.binaryblock


@pytest.mark.parametrize("kind", IMAGES)
def test_the_result_is_that_of_the_file(
    kind: str, tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor
) -> None:
    values = np.random.default_rng(1).normal(0, 60, SHAPE).round().astype(np.int16) + 40
    image = IMAGES[kind](values, phantom)
    nib.save(image, tmp_path / "scan.nii.gz")
    expected = predictor.predict(tmp_path / "scan.nii.gz")
    stored = nib.load(expected.save(tmp_path / "of_file"))

    image = IMAGES[kind](values, phantom)  # one that was never saved
    found = predictor.predict(image)
    assert (found.case, found.scan) == ("image", image)
    assert len(np.unique(found.labels)) == 3
    assert np.array_equal(found.labels, expected.labels)
    assert np.allclose(found.image.affine, image.affine)  # headers store single precision
    assert np.array_equal(found.image.affine, stored.affine)
    assert np.array_equal(np.asarray(found.image.dataobj), np.asarray(stored.dataobj))
    assert found.image.shape == image.shape
    for result in (found.image, expected.image, nib.load(found.save(tmp_path / "of_object"))):
        assert header_of(result, tmp_path) == stored.header.binaryblock
    assert image.get_filename() is None or kind == "a pair of files"


def test_other_formats_of_nibabel(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    affine = phantom.oblique((1.2, 0.9, 4))
    values = np.asarray((0, 160, -120), np.float32)[phantom.truth(SHAPE)]
    found = predictor.predict(nib.MGHImage(values, affine))
    assert np.array_equal(found.labels, predictor.predict(nib.Nifti1Image(values, affine)).labels)
    assert np.allclose(found.image.affine, affine, atol=1e-4)  # MGH stores single precision
    assert found.image.get_sform(coded=True)[1] == 1


def test_a_case_may_hold_an_object(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    image = nib.Nifti1Image(phantom.truth(SHAPE).astype(np.int16), np.eye(4))
    found = predictor.predict({"id": "p7", "image": image, "label": "nowhere"})
    assert isinstance(found, Prediction) and found.case == "p7"
    assert found.save(tmp_path / "out") == tmp_path / "out" / "p7.nii.gz"


def test_what_is_refused_is_named(predictor: Predictor) -> None:
    with pytest.raises(InputError, match=r"the nibabel image 'image' .*channel"):
        predictor.predict(nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.int16), np.eye(4)))
