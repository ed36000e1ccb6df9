# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from samda.data.body import body_box, body_mask, body_threshold, coarse
from samda.data.readers import read_scan
from samda.task import Task

CT = Task()
SPACING = np.array([2.0, 2.0, 5.0])


def phantom(lung: float = -850.0) -> np.ndarray:
    """HU: an ellipse of tissue with two lungs, on a table of two thin shells; 100 x 90 x 8 voxels of 2, 2, 5 mm."""
    x, y = np.meshgrid(np.arange(100), np.arange(90), indexing="ij")
    plane = np.full((100, 90), -1000.0)
    plane[((x - 48) / 35) ** 2 + ((y - 50) / 22) ** 2 <= 1] = 40  # x 13..83, y 28..72
    for center in (32, 64):
        plane[((x - center) / 12) ** 2 + ((y - 50) / 14) ** 2 <= 1] = lung
    plane[5:95, 26:28] = 60  # table: 4 mm, directly at the back
    plane[5:95, 10:12] = 60
    return np.repeat(plane[:, :, None], 8, axis=2)


def scaled(volume: np.ndarray, task: Task) -> np.ndarray:
    low, high = task.window
    return np.clip((volume - low) / (high - low), 0, 1)


@pytest.mark.parametrize("window", [(-160.0, 240.0), (-1000.0, 400.0), (0.0, 80.0)])
def test_box_of_the_body_without_table_and_with_lungs(window):
    task = dataclasses.replace(CT, window=window)
    noise = np.random.default_rng(0).normal(0, 15, (100, 90, 8))
    box = body_box(scaled(phantom() + noise, task), SPACING, task)
    # strides of 2, 2, 1 (4, 4, 5 mm): at most one stride beyond the body on either side
    assert np.abs(box - [[13, 84], [28, 73], [0, 8]]).max() <= 2


def test_mask_holds_the_lungs():
    values, strides = coarse(phantom(), SPACING)
    assert list(strides) == [2, 2, 1]
    mask = body_mask(values, SPACING * strides, -200.0)
    assert mask[16, 25].all()  # the middle of a lung
    assert not mask[:, 5].any()  # the lower shell of the table
    ellipse = np.pi * 35 * 22 * 8
    assert mask.sum() * 4 == pytest.approx(ellipse, rel=0.05)


def test_a_body_that_the_scan_cuts_keeps_its_extent():
    volume = phantom(lung=40)[20:70, :, :2]  # cut on both sides, two slices thick
    box = body_box(scaled(volume, CT), SPACING, CT)
    assert list(box[0]) == [0, 50]
    assert list(box[2]) == [0, 2]


def test_thin_objects_only_are_taken_as_they_are():
    volume = np.zeros((40, 40, 3))
    volume[10:12, 5:30] = 1.0
    box = body_box(volume, np.array([4.0, 4.0, 4.0]), CT)
    np.testing.assert_array_equal(box, [[10, 12], [5, 30], [0, 3]])


def test_nothing_above_the_threshold_is_the_whole_volume():
    np.testing.assert_array_equal(body_box(np.zeros((8, 9, 3)), SPACING, CT), [[0, 8], [0, 9], [0, 3]])


def test_a_picture_is_all_body():
    task = dataclasses.replace(CT, modality="image")
    volume = np.zeros((30, 20, 1))
    volume[5:9, 5:9] = 1
    np.testing.assert_array_equal(body_box(volume, np.ones(3), task), [[0, 30], [0, 20], [0, 1]])


def test_thresholds():
    assert body_threshold(np.zeros(1), CT, scaled=False) == -200
    assert body_threshold(np.zeros(1), CT, scaled=True) == 0.02  # the window starts above the skin
    chest = dataclasses.replace(CT, window=(-1000.0, 400.0))
    assert body_threshold(np.zeros(1), chest, scaled=True) == pytest.approx(800 / 1400)
    mr = dataclasses.replace(CT, modality="MR")
    assert body_threshold(np.arange(101.0), mr, scaled=False) == pytest.approx(0.15 * 99)


def test_coarse_grid_never_skips_a_whole_axis():
    values, strides = coarse(np.arange(2 * 3 * 40).reshape(2, 3, 40), np.array([0.5, 0.5, 0.5]))
    assert list(strides) == [2, 3, 8]
    assert values.shape == (1, 1, 5)


@pytest.mark.parametrize(
    ("name", "extent"),
    # along x and y in mm, read off the scans: patient B with the arms beside the trunk, so wider than 384 mm
    [("A", (366, 282)), ("A_small", (345, 267)), ("B", (488, 254)), ("M", (345, 264)), ("slicerio", (381, 286))],
)
def test_real_bodies(examples, name, extent):
    example = examples[name]
    scan = read_scan(example.image)
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    volume = scan.array.astype(float)
    task = example.task
    if task.modality == "CT":
        volume = scaled(volume, task)
    box = body_box(volume, spacing, task)
    size = (box[:, 1] - box[:, 0]) * spacing
    assert np.abs(size[:2] - extent).max() <= 8.5
