# SPDX-License-Identifier: Apache-2.0
"""Adapting to a nibabel image is adapting to the file that nibabel saves of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samda.adaptation.engine import Adaptation
from samda.inference.predict import Predictor
from samda.networks.segmenter import SamSegmenter
from tests.adaptation.conftest import TASK


@pytest.mark.parametrize("changes", [{}, {"mirror": True}, {"axes": "all"}])
def test_the_source_map_is_that_of_predict(
    changes: dict, scans: Path, network: SamSegmenter, trained: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    """With every pass that the task asks for, also after the parameters moved and came back; grids are made once."""
    path, task = scans / "images" / "case2.nii.gz", dataclasses.replace(TASK, **changes)
    expected = Predictor(network, task).predict(path)
    adaptation = Adaptation(network, task, trained[1], views=2, slices=2, steps=1)
    case = adaptation.prepare(path)
    caplog.clear()
    again = adaptation.predict(case, {name: p.detach().clone() for name, p in adaptation.parameters.items()})
    assert not caplog.records  # of slices too thick for `axes`, which `prepare` told
    assert np.array_equal(adaptation.adapt(path).source, expected.labels) and expected.labels.any()
    assert np.array_equal(again.labels, case.source.labels)


@pytest.mark.parametrize("turned", [False, True])
def test_the_result_is_that_of_the_file(
    turned: bool, scans: Path, tmp_path: Path, make_adaptation: Callable[..., Adaptation]
) -> None:
    image = nib.load(scans / "images" / "case2.nii.gz")
    values = np.asarray(image.dataobj) + 120  # another scanner, so that something moves
    affine = image.affine
    if turned:  # the same scan in another order of its axes
        values, affine = values.transpose(1, 2, 0), affine[:, [1, 2, 0, 3]]
    image = nib.Nifti1Image(values, affine)
    image.set_qform(None, 0)
    nib.save(nib.Nifti1Image(image.dataobj, image.affine, image.header), tmp_path / "scan.nii")
    expected = make_adaptation(guard={"skip_agreement": 2.0}).adapt(tmp_path / "scan.nii")
    found = make_adaptation(guard={"skip_agreement": 2.0}).adapt(image)

    assert found.record["input_sha256"] == expected.record["input_sha256"]
    assert found.record["labels_sha256"] == expected.record["labels_sha256"]
    assert found.record["reason"] == expected.record["reason"]
    assert found.record["loss"] == expected.record["loss"] and len(found.record["loss"]) > 1
    assert np.array_equal(found.labels, expected.labels) and found.labels.any()
    assert np.array_equal(found.uncertainty, expected.uncertainty)
    assert (found.case, expected.case) == ("image", "scan")
    assert found.scan is image
    for result in (found.image, expected.image):
        assert np.array_equal(np.asarray(result.dataobj), found.labels)
        assert np.array_equal(result.affine, image.affine)
        assert result.shape == image.shape
        assert (int(result.header["qform_code"]), int(result.header["sform_code"])) == (0, 2)
