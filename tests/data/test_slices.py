# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates
from volumes import AFFINES

from samda.data.slices import SliceGrid, center_channels, interpolation_matrix, with_neighbors
from samda.data.transforms import RandTissueContrastd, build_augmentation
from samda.errors import InputError, UsageError
from samda.task import Task

TASK = Task(classes=("background", "a", "b"), spacing=1.5, image_size=64)
AXES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}  # across, along rows, along columns
SHAPE, SPACING = (50, 38, 7), (1.1, 2.3, 5.0)
BOX = np.array([[6, 41], [3, 30], [0, 7]])


def task_along(axis: str, **changes) -> Task:
    return dataclasses.replace(TASK, axis=axis, **changes)


def smooth(shape=SHAPE, seed=0) -> torch.Tensor:
    values = np.random.default_rng(seed).random([n + 6 for n in shape])
    for axis in range(3):  # a moving mean of 7
        values = np.stack([values.take(range(i, i + 7), axis).mean(axis) for i in range(shape[axis])], axis)
    return torch.tensor(values[None], dtype=torch.float32)


def center_of(first: int, end: int) -> float:
    """The middle of the voxels `first` to `end - 1`, moved to the border between two voxels where it lies in one."""
    middle = (first + end - 1) / 2
    return middle if middle % 1 else middle + 0.5


def canvas_positions(grid: SliceGrid, axis: str, box=BOX, shape=SHAPE, spacing=SPACING):
    """Voxel index of every canvas row and column along its axis, by the definition of the canvas."""
    positions = []
    for volume_axis, pixels in zip(AXES[axis][1:], grid.canvas, strict=True):
        first, end = box[volume_axis]
        center_mm = spacing[volume_axis] * center_of(first, end)
        offsets_mm = [(pixels - 1) / 2 * TASK.spacing - k * TASK.spacing for k in range(pixels)]  # against the axis
        positions.append(np.array([(center_mm + offset) / spacing[volume_axis] for offset in offsets_mm]))
    return positions


@pytest.mark.parametrize(("axis", "spacing"), [("axial", 1.1 / 65), ("axial", 2.3 * 65), ("coronal", 5 * 71.0)])
def test_pixels_of_another_unit_are_refused(axis, spacing):
    with pytest.raises(InputError, match=r"pixels of .* mm .* voxels of .* mm"):
        SliceGrid(SHAPE, SPACING, BOX, task_along(axis, spacing=spacing))
    far = {"axial": 2.3 * 28, "coronal": 5 * 14.0}[axis]
    assert SliceGrid(SHAPE, SPACING, BOX, task_along(axis, spacing=far)).canvas == (64, 64)


# ------------------------------------------------------------------------------------------------- interpolation matrix


def test_matrix_by_hand():
    found = interpolation_matrix(np.array([0.0, 0.25, 2.0, -0.4, 2.5, -0.6, 2.6]), 3)
    expected = [[1, 0, 0], [0.75, 0.25, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_shrinking_matrix_averages():
    # half width 2 at sample 2: weights 1/2, 1, 1/2 at 1, 2, 3 (0 at 0 and 4), divided by 2
    found = interpolation_matrix(np.array([2.0, 0.0]), 5, width=2.0)
    np.testing.assert_allclose(found.numpy(), [[0, 0.25, 0.5, 0.25, 0], [2 / 3, 1 / 3, 0, 0, 0]], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("axis", AXES)
def test_rows_and_columns_run_as_on_a_light_box(axis):
    """A marked voxel near the right, anterior, superior corner is at the top, on the side that the convention says."""
    volume = torch.zeros((1, *SHAPE))
    volume[0, 40, 30, 5] = 1  # RAS: large x is right, large y is anterior, large z is superior
    grid = SliceGrid(SHAPE, SPACING, np.array([[0, n] for n in SHAPE]), task_along(axis))
    across = AXES[axis][0]
    plane = grid.extract(volume, (40, 30, 5)[across])[0, 0]
    row, column = np.unravel_index(plane.argmax(), plane.shape)
    middle = {"x": 24.5, "y": 18.5, "z": 3.5}
    sizes = dict(zip("xyz", SPACING, strict=True))
    along_rows, along_columns = {"axial": "yx", "coronal": "zx", "sagittal": "zy"}[axis]
    voxel = {"x": 40, "y": 30, "z": 5}
    # distance (pixels of 1.5 mm) from the middle of the canvas, towards the top and the left
    assert row == pytest.approx(31.5 - (voxel[along_rows] - middle[along_rows]) * sizes[along_rows] / 1.5, abs=0.51)
    assert column == pytest.approx(
        31.5 - (voxel[along_columns] - middle[along_columns]) * sizes[along_columns] / 1.5, abs=0.51
    )
    assert row < 31.5
    assert column < 31.5


@pytest.mark.parametrize("axis", AXES)
def test_extraction_equals_linear_interpolation(axis):
    """Where nothing shrinks, the canvas is the linear interpolation of the plane."""
    volume = smooth()
    spacing = (1.7, 2.3, 5.0)  # all coarser than 1.5 mm: no anti-aliasing
    grid = SliceGrid(SHAPE, spacing, BOX, task_along(axis))
    across, *plane_axes = AXES[axis]
    rows, columns = canvas_positions(grid, axis, spacing=spacing)
    index = 3
    plane = np.moveaxis(volume[0].numpy(), (across, *plane_axes), (0, 1, 2))[index]
    expected = map_coordinates(plane, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")
    outside = np.add.outer(*[(p < -0.5) | (p > n - 0.5) for p, n in zip((rows, columns), plane.shape, strict=True)])
    found = grid.extract(volume, index)[0, 0].numpy()
    np.testing.assert_allclose(found, np.where(outside, 0, expected), atol=1e-5)
    assert outside.any()


def test_shrinking_extraction_keeps_the_mean_of_fine_stripes():
    stripes = torch.zeros((1, 200, 120, 2))
    stripes[:, ::2] = 1  # period 2 x 0.5 mm, far finer than a pixel of 1.5 mm
    grid = SliceGrid((200, 120, 2), (0.5, 0.5, 3.0), np.array([[0, 200], [0, 120], [0, 2]]), TASK)
    found = grid.extract(stripes, 0)[0, 0]
    inside = found[20:44, 12:68]  # the volume has 60 mm along the 64 rows and 100 mm along the 80 columns
    assert 0.35 < inside.min() < inside.max() < 0.65


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("spacing", [SPACING, (0.7, 0.9, 2.0), (3.0, 3.0, 3.0)])
def test_restore_equals_linear_interpolation(axis, spacing):
    grid = SliceGrid(SHAPE, spacing, BOX, task_along(axis))
    maps = torch.nn.functional.avg_pool2d(
        torch.rand((2, 3, *grid.canvas), generator=torch.Generator().manual_seed(0)), 5, 1, 2
    )
    found = grid.restore(maps)
    across, *plane_axes = AXES[axis]
    size = list(SHAPE)
    size[across] = 2
    assert found.shape == (3, *size)
    coordinates, covered, widths = [], [], []
    for volume_axis, pixels in zip(plane_axes, grid.canvas, strict=True):
        center = center_of(*BOX[volume_axis])
        pixel = (pixels - 1) / 2 - (np.arange(SHAPE[volume_axis]) - center) * spacing[volume_axis] / TASK.spacing
        coordinates.append(pixel)
        covered.append((pixel >= -0.5) & (pixel <= pixels - 0.5))
        widths.append(spacing[volume_axis] / TASK.spacing)
    inside = np.logical_and.outer(*covered)
    for n in range(2):
        for k in range(3):
            plane = np.moveaxis(found[k].numpy(), (across, *plane_axes), (0, 1, 2))[n]
            if max(widths) <= 1:  # the volume is finer than the canvas: plain interpolation
                expected = map_coordinates(
                    maps[n, k].numpy(), np.meshgrid(*coordinates, indexing="ij"), order=1, mode="nearest"
                )
                np.testing.assert_allclose(plane[inside], expected[inside], atol=1e-5)
            np.testing.assert_array_equal(plane[~inside], 1.0 if k == 0 else 0.0)


@pytest.mark.parametrize("axis", ["axial", "coronal"])
def test_a_mirrored_grid_reverses_columns_and_restores_them(axis):
    """Inputs are those of the grid from the other side, and its maps return to the same voxels, but for rounding."""
    grid, volume = SliceGrid(SHAPE, SPACING, BOX, task_along(axis)), smooth()
    mirrored = grid.mirrored()
    inputs = grid.inputs(volume, range(grid.num_slices))
    torch.testing.assert_close(mirrored.inputs(volume, range(grid.num_slices)), inputs.flip(-1), rtol=0, atol=1e-6)
    maps = torch.rand(grid.num_slices, 3, *grid.canvas, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mirrored.restore(maps.flip(-1)), grid.restore(maps), rtol=0, atol=1e-6)
    assert torch.equal(grid.inputs(volume, range(grid.num_slices)), inputs), "the grid itself stays"


def test_restored_probabilities_sum_to_one_everywhere():
    grid = SliceGrid((120, 90, 4), (1.3, 0.8, 4.0), np.array([[40, 80], [30, 60], [0, 4]]), TASK)
    maps = torch.softmax(torch.randn((4, 3, *grid.canvas), generator=torch.Generator().manual_seed(0)), dim=1)
    found = grid.restore(maps)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(120, 90, 4))
    # 64 pixels of 1.5 mm are 96 mm; the volume has 156 mm along x, so its ends are not covered
    assert (found[0, 0] == 1).all()
    assert (found[1:, 0] == 0).all()
    assert grid.restore(maps - 5, outside=-2.0)[0, 0, 0, 0] == -2.0


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (1.5, 1.5, 1.5), (2.0, 3.1, 6.0)])
def test_labels_survive_the_round_trip(axis, spacing):
    """Blocks of labels, cut to slices and put back, are the same, where the scan is no finer than the task."""
    label = torch.zeros((1, *SHAPE), dtype=torch.uint8)
    label[0, 10:24, 8:20, 1:5] = 1
    label[0, 24:38, 8:26, 2:6] = 2
    grid = SliceGrid(SHAPE, spacing, np.array([[0, n] for n in SHAPE]), task_along(axis))
    slices = grid.extract_labels(label, slice(None))
    onehot = torch.nn.functional.one_hot(slices.long(), 3).permute(0, 3, 1, 2)
    assert torch.equal(grid.restore(onehot.float()).argmax(0).to(label.dtype), label[0])


def test_image_survives_the_round_trip_at_equal_spacing():
    volume = smooth()
    grid = SliceGrid(SHAPE, (1.5, 1.5, 5.0), np.array([[0, 50], [0, 38], [0, 7]]), TASK)
    restored = grid.restore(grid.extract(volume, slice(None)))
    torch.testing.assert_close(restored, volume, atol=1e-5, rtol=0)


def test_extracted_labels_take_the_larger_share():
    """A fine label, shrunk by three: each canvas pixel takes the class that fills most of it."""
    label = torch.zeros((1, 96, 96, 1), dtype=torch.uint8)
    label[0, 33:60, 30:63] = 1
    label[0, 39:48, 42:51] = 2
    grid = SliceGrid((96, 96, 1), (0.5, 0.5, 1.0), np.array([[0, 96], [0, 96], [0, 1]]), TASK)
    found = grid.extract_labels(label, 0)[0]
    assert found.dtype == torch.uint8
    # along x: pixels of three voxels from 0 to 95 against the axis, 16 pixels of padding before them
    columns = np.flatnonzero((found > 0).any(0))
    rows = np.flatnonzero((found > 0).any(1))
    assert [columns.min(), columns.max()] == [16 + (96 - 60) // 3, 16 + (96 - 33) // 3 - 1]
    assert [rows.min(), rows.max()] == [16 + (96 - 63) // 3, 16 + (96 - 30) // 3 - 1]
    assert (found == 2).sum() == 9
    assert found[0, 0] == 0


# --------------------------------------------------------------------------------------------------- canvas and windows


@pytest.mark.parametrize(("extent", "canvas"), [(30, 64), (64, 64), (65, 80), (80, 80), (100, 112)])
def test_canvas_grows_in_steps_of_16_with_the_body(extent, canvas):
    shape = (400, 50, 3)
    grid = SliceGrid(shape, (1.5, 1.5, 1.0), np.array([[90, 90 + extent], [0, 50], [0, 3]]), TASK)
    assert grid.canvas == (64, canvas)


def test_canvas_is_centered_on_the_body():
    volume = torch.zeros((1, 100, 90, 1))
    volume[0, 70:90, 10:20] = 1
    grid = SliceGrid.from_volume(volume, (1.5, 1.5, 1.5), TASK)
    plane = grid.extract(volume, 0)[0, 0]
    rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
    # the box is found on a grid of 2 voxels
    assert rows.mean() == pytest.approx(31.5, abs=1)
    assert columns.mean() == pytest.approx(31.5, abs=1)
    assert plane.sum() == 200


def test_a_volume_smaller_than_the_field_of_view_is_padded_with_zeros():
    volume = torch.ones((1, 20, 10, 2))
    grid = SliceGrid.from_volume(volume, (1.5, 1.5, 1.5), TASK)
    plane = grid.extract(volume, 1)[0, 0]
    assert plane.sum() == pytest.approx(200)
    assert set(plane.unique().tolist()) == {0.0, 1.0}


# -------------------------------------------------------------------------------------------------------- use of it all


@pytest.mark.parametrize("name", AFFINES)
def test_affine_and_spacing_mean_the_same(name):
    volume = smooth((20, 24, 6))
    affine = AFFINES[name]
    sizes = tuple(float(np.sqrt((affine[:3, i] ** 2).sum())) for i in range(3))
    by_affine = SliceGrid.from_volume(volume, torch.tensor(affine), TASK)
    by_spacing = SliceGrid.from_volume(volume, sizes, TASK)
    assert by_affine.spacing_mm == pytest.approx(by_spacing.spacing_mm)
    torch.testing.assert_close(by_affine.extract(volume, [1, 4]), by_spacing.extract(volume, [1, 4]))


@pytest.mark.parametrize("axis", AXES)
def test_any_choice_of_slices(axis):
    volume = torch.cat([smooth(), smooth(seed=1)])
    grid = SliceGrid(SHAPE, SPACING, BOX, task_along(axis))
    assert grid.num_slices == SHAPE[AXES[axis][0]]
    every = grid.extract(volume, slice(None))
    assert every.shape == (grid.num_slices, 2, *grid.canvas)
    for index in (slice(2, 5), [2, 3, 4], range(2, 5), torch.tensor([2, 3, 4])):
        torch.testing.assert_close(grid.extract(volume, index), every[2:5])
    torch.testing.assert_close(grid.extract(volume, [6, 0, 3]), every[[6, 0, 3]])
    torch.testing.assert_close(grid.extract(volume, 4), every[4:5])
    assert len(grid.extract(volume, [])) == 0


def test_two_slices_only():
    volume = smooth((40, 30, 2))
    grid = SliceGrid.from_volume(volume, (2.0, 2.0, 8.0), task_along("axial"))
    assert grid.num_slices == 2
    assert grid.restore(torch.ones((2, 3, *grid.canvas))).shape == (3, 40, 30, 2)


def test_plain_tensors_come_out_of_metatensors():
    volume = MetaTensor(smooth())
    grid = SliceGrid.from_volume(volume, SPACING, TASK)
    assert type(grid.extract(volume, [0, 1])) is torch.Tensor
    torch.testing.assert_close(grid.extract(volume, 0), grid.extract(volume.as_tensor(), 0))


def test_only_the_chosen_slices_are_touched():
    volume = torch.full((1, *SHAPE), float("nan"))
    volume[..., 2:4] = 0.5
    grid = SliceGrid(SHAPE, SPACING, BOX, TASK)
    assert grid.extract(volume, [2, 3]).isfinite().all()


def test_wrong_shapes_are_refused():
    grid = SliceGrid(SHAPE, SPACING, BOX, TASK)
    with pytest.raises(InputError, match="made for a volume of"):
        grid.extract(torch.zeros((1, 50, 38, 8)), 0)
    with pytest.raises(InputError, match="maps must be"):
        grid.restore(torch.zeros((1, 3, 64, 32)))
    with pytest.raises(InputError, match="4, 4"):
        SliceGrid.from_volume(smooth(), (1.0, 2.0), TASK)
    with pytest.raises(InputError, match="C, X, Y, Z"):
        SliceGrid.from_volume(torch.zeros((4, 5, 6)), SPACING, TASK)


CONTEXT = Task(classes=("background", "a", "b"), spacing=1.5, image_size=64, context=1)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_channels_are_the_slice_below_itself_and_above(axis: str) -> None:
    volume = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(1))
    task = dataclasses.replace(CONTEXT, axis=axis)
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
    task = dataclasses.replace(CONTEXT, context=0)
    grid = SliceGrid(SHAPE, SPACING, BOX, task)
    assert torch.equal(grid.inputs(volume, [3, 1]), grid.extract(volume, [3, 1]))
    assert task.network_channels == 1 and CONTEXT.network_channels == 3
    slices = grid.inputs(volume, [3, 1])
    assert torch.equal(center_channels(slices, task), slices)
    colors = Task(modality="image", in_channels=3)
    assert colors.network_channels == 3 and center_channels(torch.zeros(2, 3, 4, 4), colors).shape[1] == 3


def test_one_slice_is_its_own_neighbor() -> None:
    volume = torch.rand((1, 50, 38, 1), generator=torch.Generator().manual_seed(1))
    grid = SliceGrid((50, 38, 1), SPACING, np.array([[6, 41], [3, 30], [0, 1]]), CONTEXT)
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
        ({"mirror": 1}, "mirror must be true or false, got 1"),
        ({"mirror": True, "axis": "sagittal"}, "mirror needs slices that show left and right"),
        ({"mirror": True, "classes": ["background", "kidney_left"]}, "mirror does not suit the class 'kidney_left'"),
        ({"mirror": True, "classes": ["background", "R lung"]}, "mirror does not suit the class 'R lung'"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Task.from_dict(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_new_keys_survive_json_and_are_written_only_where_used() -> None:
    task = dataclasses.replace(CONTEXT, keep_largest=["b"], mirror=True)
    assert task.largest_only == (2,) and dataclasses.replace(CONTEXT, keep_largest=True).largest_only == (1, 2)
    for one in (task, dataclasses.replace(CONTEXT, keep_largest=True), Task()):
        assert Task.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert not {"context", "keep_largest", "mirror"} & set(Task().to_dict()), "an older model's file stays as it is"
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
    augmentation = build_augmentation(CONTEXT)
    quiet = 0
    for seed in range(30):
        augmentation.set_random_state(seed=seed)
        item = augmentation({"image": x.clone(), "label": label.clone()})
        assert torch.equal(item["label"][0], item["label"][1]) and torch.equal(item["label"][2], item["label"][1])
        apart = float((item["image"][0] - item["image"][1]).abs().max())
        quiet += apart < 1e-5
        assert apart < 1e-5 or float((item["image"][0] - item["image"][1]).mean().abs()) < 0.02
    assert quiet >= 10


def test_half_of_the_slices_are_mirrored_where_the_task_says_so() -> None:
    """Of a slice with one bright side, scaled and shifted a little, the side is still to be seen."""
    image, label = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[..., 8:28], label[..., 8:28] = 1, 1

    def sides(mirror: bool) -> list[bool]:
        augmentation = build_augmentation(Task(image_size=64, mirror=mirror), strength=0.2)
        found = []
        for seed in range(40):
            item = augmentation.set_random_state(seed=seed)({"image": image.clone(), "label": label.clone()})
            assert bool(item["image"][..., 32:].mean() > item["image"][..., :32].mean()) == bool(
                item["label"][..., 32:].float().mean() > item["label"][..., :32].float().mean()
            )
            found.append(bool(item["label"][..., 32:].any() and not item["label"][..., 12:20].any()))
        return found

    assert not any(sides(False)) and 10 < sum(sides(True)) < 30


def test_pictures_of_one_field_look_alike_whatever_their_pixels() -> None:
    task = Task(modality="image", spacing=4.0, picture_size=128.0, image_size=64)
    small = torch.nn.functional.interpolate(torch.rand(1, 1, 16, 24), size=(64, 96), mode="bilinear")[0, ..., None]
    large = torch.nn.functional.interpolate(small[None, ..., 0], scale_factor=3, mode="nearest")[0, ..., None]
    slices, grids = [], []
    for picture in (small, large):
        grids.append(SliceGrid.from_volume(picture, torch.eye(4), task))
        slices.append(grids[-1].inputs(picture, 0)[0, 0])
    torch.testing.assert_close(slices[0][3:-3, 3:-3], slices[1][3:-3, 3:-3], atol=0.03, rtol=0)
    assert grids[0].spacing_mm[:2] == pytest.approx((2, 2))
    assert tuple(grids[1].restore(torch.rand(1, 2, 64, 64)).shape) == (2, 192, 288, 1)
    with pytest.raises(UsageError, match="picture_size is for 2-D images"):
        Task(modality="MR", picture_size=256.0)
