# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from samda.data.datalists import DataList
from samda.data.inspect import DataReport
from samda.data.measure import LARGEST_BOX, CaseFacts, structure_widths
from samda.data.slices import SliceGrid
from samda.data.suggest import suggest_task


def widths(label: np.ndarray, sides_mm: tuple[float, float, float] = (1, 1, 1)) -> dict[int, float]:
    return structure_widths(label, sides_mm, {int(i) for i in np.unique(label)})


@pytest.mark.parametrize("diameter", [9, 21, 40])
@pytest.mark.parametrize("side", [1.0, 0.7])
def test_a_disc_is_as_wide_as_its_diameter(diameter: int, side: float) -> None:
    x, y = np.ogrid[:64, :64]
    disc = (x - 31.5) ** 2 + (y - 30) ** 2 <= (diameter / 2) ** 2
    label = np.repeat(disc[:, :, None], 5, axis=2).astype(np.uint8) * 7
    assert widths(label, (side, side, side))[7] == pytest.approx(side * diameter, abs=2 * side)


@pytest.mark.parametrize("width", [1, 3, 4, 9])
@pytest.mark.parametrize("angle", [0.0, 30.0, 45.0])
def test_a_line_is_as_wide_as_it_is_across(width: int, angle: float) -> None:
    a = np.deg2rad(angle)
    x, y = np.ogrid[:120, :120]
    across = np.abs((x - 60) * np.cos(a) + (y - 60) * np.sin(a))
    line = across <= width / 2
    assert widths(line[:, :, None].astype(np.int16))[1] == pytest.approx(width, abs=1.5)


def test_of_a_tree_the_caliber_and_frayed_borders_do_not_count() -> None:
    random = np.random.default_rng(0)
    tree = np.zeros((200, 200, 1), np.uint8)
    tree[:, 98:103] = 1  # 5 wide
    for row in range(10, 190, 20):
        tree[row : row + 3, 20:180] = 1  # 3 wide
    assert widths(tree)[1] == pytest.approx(3, abs=0.5)
    x, y = np.ogrid[:100, :100]
    disc = ((x - 50) ** 2 + (y - 50) ** 2 <= 30**2)[:, :, None]
    border = disc ^ ndimage.binary_dilation(disc, iterations=2)
    frayed = (disc | (border & (random.random(disc.shape) < 0.5))).astype(np.uint8)
    assert widths(frayed)[1] == pytest.approx(60, abs=4)


def test_slices_are_those_across_the_coarsest_axis_and_ids_are_told_apart() -> None:
    label = np.zeros((6, 40, 50), np.float32)
    label[:, 10:21, 5:45] = 300
    label[2, 30:35, 5:45] = 4
    label[0, 0, 0] = -2
    found = widths(label, (4.0, 1.0, 1.0))
    assert set(found) == {4, 300}, "neither background nor ids below 0"
    assert found[300] == pytest.approx(11) and found[4] == pytest.approx(5)
    assert widths(label)[300] == pytest.approx(5)  # axial: the plane of x and y, 6 voxels wide


def test_a_huge_structure_is_measured_in_its_middle() -> None:
    label = np.zeros((LARGEST_BOX + 500, 40, 1), np.uint8)
    label[:, 10:31] = 1
    assert widths(label)[1] == pytest.approx(21)
    assert widths(np.zeros((8, 8, 8), np.uint8)) == {}


def test_a_thin_vessel_stays_connected_at_the_suggested_spacing() -> None:
    """Lines of one to four pixels in a picture of 999, and the spacing that `samda check` suggests for it."""
    x, y = np.ogrid[:999, :960]
    for width in (1, 2, 3, 4):
        picture = (np.abs((x - 500) - 0.3 * (y - 480) - 40 * np.sin(y / 60)) <= width / 2)[:, :, None].astype(np.uint8)
        case = CaseFacts("a", "training", ["a.png"], "l.png", (999, 960, 1), (1, 1, 1), "RAS", 1, True)
        case = dataclasses.replace(case, extent_mm=(999, 960, 1), sides_mm=(1, 1, 1), label_ids={0: 1, 1: 1})
        case.widths_mm = structure_widths(picture, (1, 1, 1), (0, 1))
        data = DataList({"training": [], "validation": [], "test": []}, None, "csv")
        suggestion = suggest_task(DataReport(Path("a"), data, [case], []))
        grid_box = np.array([[0, 999], [0, 960], [0, 1]])
        grid = SliceGrid((999, 960, 1), (1, 1, 1), grid_box, suggestion.task)
        found = grid.extract_labels(torch.from_numpy(picture)[None], 0)[0]
        _, number = ndimage.label(found, np.ones((3, 3)))
        assert number == 1 or "may vanish in places" in suggestion.reasons["spacing"]
        fine = dataclasses.replace(suggestion.task, spacing=case.widths_mm[1])
        grid = SliceGrid(grid.shape, grid.spacing_mm, grid_box, fine)
        found = grid.extract_labels(torch.from_numpy(picture)[None], 0)
        assert ndimage.label(found[0], np.ones((3, 3)))[1] == 1
