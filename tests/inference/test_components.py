# SPDX-License-Identifier: Apache-2.0
"""The largest piece of a class, and that every way to a label map keeps it alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from samda.data.transforms import build_preprocessing
from samda.errors import UsageError
from samda.inference.postprocessing import build_postprocessing, keep_largest, override
from samda.inference.predict import Predictor
from samda.task import Task


def specks(labels: np.ndarray) -> np.ndarray:
    """The map with a stray piece of each of the two classes."""
    result = labels.copy()
    result[-5:-2, 1:4, -2:] = 1  # 18 voxels
    result[1:3, -4:-2, :2] = 2  # 8 voxels
    return result


def largest_by_hand(labels: np.ndarray, k: int) -> np.ndarray:
    pieces, count = ndimage.label(labels == k, np.ones((3, 3, 3)))
    sizes = [(pieces == i).sum() for i in range(1, count + 1)]
    return pieces == 1 + int(np.argmax(sizes))


def test_stray_pieces_go_and_the_rest_stays() -> None:
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[0:2, 0:2, 0:2] = 1  # 8 voxels
    labels[2, 2, 2] = 1  # touches them at a corner: belongs to them
    labels[5, 4, 3] = 1  # far away
    labels[4:6, 0, 0] = 2  # 2 voxels
    labels[4, 4, 0] = 2  # 1 voxel
    kept = keep_largest(labels, [1])
    assert (kept == 1).sum() == 9 and kept[2, 2, 2] == 1 and kept[5, 4, 3] == 0
    assert (kept == 2).sum() == 3, "the other class is left alone"
    both = keep_largest(labels, [1, 2])
    assert [(both == k).sum() for k in (0, 1, 2)] == [120 - 11, 9, 2]
    assert both.dtype == np.uint8 and labels[5, 4, 3] == 1, "what came in is not written to"


def test_pieces_are_taken_across_slices() -> None:
    """Two rods of 3 x 10 and a plate of 4 x 4 in one slice: in 3-D the rod is the larger one."""
    labels = np.zeros((9, 9, 10), np.uint8)
    labels[1, 1:4, :] = 1
    labels[4:8, 4:8, 5] = 1
    kept = keep_largest(labels, [1])
    assert (kept == 1).sum() == 30 and not kept[4:8].any()


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_largest_of_random_pieces(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = (ndimage.gaussian_filter(random.normal(size=(20, 18, 9)), 1.5) > 0.05).astype(np.uint8) * 3
    labels[:, 9:][labels[:, 9:] > 0] = 2
    kept = keep_largest(labels, [2, 3])
    for k in (2, 3):
        assert np.array_equal(kept == k, largest_by_hand(labels, k))


def test_nothing_to_do_gives_the_array_itself() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    assert keep_largest(labels, [1, 2]) is labels and keep_largest(labels, []) is labels
    labels[1:3, 1:3] = 1
    assert keep_largest(labels, [1, 2]) is labels


def test_names_all_and_none() -> None:
    task = Task(classes=("background", "liver", "spleen"), keep_largest=("spleen",))
    assert task.largest_only == (2,) and override(task, None) == task
    assert override(task, "all").largest_only == override(task, True).largest_only == (1, 2)
    assert override(task, "none").largest_only == override(task, False).largest_only == ()
    assert override(task, "liver, spleen").largest_only == (1, 2) and override(task, ["liver"]).largest_only == (1,)
    with pytest.raises(UsageError, match=r"keep_largest .*'livr'.* did you mean 'liver"):
        override(task, "livr")
    with pytest.raises(UsageError, match="empty name"):
        override(task, "liver,")


def test_predict_and_bundle_keep_the_same(
    phantom: SimpleNamespace, band_network: Callable, band_task: Task, tmp_path: Path
) -> None:
    """Against scipy's labeling; the scan is stored in another axis order than the slices have."""
    affine = np.array([[0, -1.0, 0, 30], [1.0, 0, 0, -20], [0, 0, -3.0, 9], [0, 0, 0, 1]])
    true = specks(phantom.truth((36, 44, 9)))
    path = phantom.write(tmp_path / "scan.nii.gz", true, affine)
    plain = Predictor(band_network, band_task).predict(path).labels
    assert np.array_equal(plain, true)
    expected = np.zeros_like(true)
    for k in (1, 2):
        expected[largest_by_hand(true, k)] = k
    assert 0 < (expected != true).sum() == 26
    every = Predictor(band_network, override(band_task, "all")).predict(path, probabilities=True)
    assert np.array_equal(every.labels, expected)
    assert np.array_equal(every.probabilities.argmax(0), true), "probabilities stay as the network gives them"
    dark = Predictor(band_network, override(band_task, "dark")).predict(path).labels
    assert np.array_equal(dark == 2, expected == 2) and np.array_equal(dark == 1, true == 1)

    preprocessing = build_preprocessing(band_task, labels=False)
    data: dict[str, Any] = preprocessing({"image": str(path)})
    labels, _ = Predictor(band_network, band_task).inferer.segment(data["image"][None], band_network)
    for chosen, wanted in ((True, expected), (None, true), (["dark"], dark)):
        folder = tmp_path / f"bundle_{chosen}"
        steps = build_postprocessing(band_task, preprocessing, folder, keep_largest=chosen)
        steps({**data, "pred": MetaTensor(labels[0]).copy_meta_from(data["image"])})
        assert np.array_equal(np.asarray(nib.load(folder / "scan.nii.gz").dataobj), wanted)


def test_a_class_that_is_in_one_piece_stays_bit_for_bit(
    phantom: SimpleNamespace, band_network: Callable, band_task: Task, tmp_path: Path
) -> None:
    path = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((36, 44, 9)), np.diag([1.0, 1.0, 3.0, 1.0]))
    a, b = (Predictor(band_network, override(band_task, what)).predict(path) for what in (None, "all"))
    assert np.array_equal(a.labels, b.labels) and a.labels.dtype == b.labels.dtype
    assert torch.equal(torch.from_numpy(a.labels), torch.from_numpy(phantom.truth((36, 44, 9))))
