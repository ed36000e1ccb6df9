# SPDX-License-Identifier: Apache-2.0
"""Neighboring slices as channels: from the task over the grid to augmentation, compared slice by slice."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from samda.data.slices import SliceGrid, center_channels, with_neighbors
from samda.data.transforms import RandTissueContrastd, build_augmentation
from samda.errors import UsageError
from samda.task import Task

TASK = Task(classes=("background", "a", "b"), spacing=1.5, image_size=64, context=1)
SHAPE, SPACING = (50, 38, 7), (1.1, 2.3, 5.0)
BOX = np.array([[6, 41], [3, 30], [0, 7]])


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_channels_are_the_slice_below_itself_and_above(axis: str) -> None:
    volume = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(1))
    task = dataclasses.replace(TASK, axis=axis)
    grid = SliceGrid(SHAPE, SPACING, BOX, task)
    plain = grid.extract(volume, slice(None))[:, 0]
    n = grid.num_slices
    found = grid.inputs(volume, slice(None))
    assert found.shape == (n, 3, *grid.canvas)
    for i in range(n):  # the ends repeat themselves
        expected = torch.stack([plain[max(i - 1, 0)], plain[i], plain[min(i + 1, n - 1)]])
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-6)
    for index in ([5, 0, 3], 4, slice(2, 5), range(3), []):
        chosen = [index] if isinstance(index, int) else list(range(n))[index] if isinstance(index, slice) else index
        torch.testing.assert_close(grid.inputs(volume, index), found[list(chosen)], rtol=0, atol=1e-6)
    assert torch.equal(center_channels(found, task), found[:, 1:2])


def test_without_context_nothing_changes() -> None:
    volume = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(1))
    task = dataclasses.replace(TASK, context=0)
    grid = SliceGrid(SHAPE, SPACING, BOX, task)
    assert torch.equal(grid.inputs(volume, [3, 1]), grid.extract(volume, [3, 1]))
    assert task.network_channels == 1 and TASK.network_channels == 3
    slices = grid.inputs(volume, [3, 1])
    assert torch.equal(center_channels(slices, task), slices)
    colors = Task(modality="image", in_channels=3)
    assert colors.network_channels == 3 and center_channels(torch.zeros(2, 3, 4, 4), colors).shape[1] == 3


def test_one_slice_is_its_own_neighbor() -> None:
    volume = torch.rand((1, 50, 38, 1), generator=torch.Generator().manual_seed(1))
    grid = SliceGrid((50, 38, 1), SPACING, np.array([[6, 41], [3, 30], [0, 1]]), TASK)
    found = grid.inputs(volume, 0)
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 2], found[:, 1])
    assert with_neighbors(range(2, 5), 2, 5) == [(2, 2, 3), (2, 3, 4), (3, 4, 4)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 2}, "context must be one of 0, 1, got 2"),
        ({"context": -1}, "got -1"),
        ({"context": 1.5}, "context must be a whole number, got 1.5"),
        ({"keep_largest": 1}, "keep_largest must be true, false or names of classes, got 1"),
        ({"context": "1"}, "context must be a number, got '1'"),
        ({"context": 1, "in_channels": 3}, "context 1 needs in_channels 1"),
        ({"context": 1, "modality": "image"}, "context 1 needs a volume"),
        ({"keep_largest": ["liver"]}, "keep_largest names 'liver'"),
        ({"keep_largest": "background"}, "keep_largest names 'background'"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Task.from_dict(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_new_keys_survive_json_and_are_written_only_where_used() -> None:
    task = dataclasses.replace(TASK, keep_largest=["b"])
    assert task.largest_only == (2,) and dataclasses.replace(TASK, keep_largest=True).largest_only == (1, 2)
    for one in (task, dataclasses.replace(TASK, keep_largest=True), Task()):
        assert Task.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert not {"context", "keep_largest"} & set(Task().to_dict()), "an older model's file stays as it is"
    assert task.to_dict()["keep_largest"] == ["b"] and task.to_dict()["context"] == 1


def test_tissue_contrast_shifts_an_organ_alike_in_every_slice_where_it_lies_there() -> None:
    image = torch.full((3, 40, 60), 0.5)
    label = torch.zeros(3, 40, 60, dtype=torch.uint8)
    for channel, start in enumerate((6, 20, 34)):  # the organ moves from slice to slice
        label[channel, 12:28, start : start + 14] = 1
    for seed in range(10):
        transform = RandTissueContrastd(1.0, 0.0, 0.2).set_random_state(seed=seed)
        shift = transform({"image": image, "label": label})["image"].numpy() - 0.5
        middles = [shift[channel, 20, start + 7] for channel, start in enumerate((6, 20, 34))]
        assert np.ptp(middles) < 1e-6 and 0.001 < abs(middles[0]) <= 0.2
        assert abs(shift[0, 20, 41]) < 1e-6 and abs(shift[2, 20, 13]) < 1e-6, "not where only a neighbor has it"
        alone = RandTissueContrastd(1.0, 0.0, 0.2).set_random_state(seed=seed)
        single = alone({"image": image[1:2], "label": label[1:2]})["image"].numpy() - 0.5
        np.testing.assert_allclose(single[0], shift[1], atol=1e-6)


def test_augmentation_moves_all_channels_alike() -> None:
    """Three equal channels stay equal, but for the noise, which every slice has of its own."""
    x = torch.rand((1, 64, 64), generator=torch.Generator().manual_seed(2)).repeat(3, 1, 1)
    label = (x > 0.7).to(torch.uint8)
    augmentation = build_augmentation(TASK)
    quiet = 0
    for seed in range(30):
        augmentation.set_random_state(seed=seed)
        item = augmentation({"image": x.clone(), "label": label.clone()})
        assert torch.equal(item["label"][0], item["label"][1]) and torch.equal(item["label"][2], item["label"][1])
        apart = float((item["image"][0] - item["image"][1]).abs().max())
        quiet += apart < 1e-5
        assert apart < 1e-5 or float((item["image"][0] - item["image"][1]).mean().abs()) < 0.02
    assert quiet >= 10
