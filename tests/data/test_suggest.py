# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from samda.data.datalists import DataList
from samda.data.inspect import DataReport
from samda.data.measure import CaseFacts
from samda.data.suggest import GRID, LARGEST_SIZE, suggest_task
from samda.errors import InputError
from samda.io import load_yaml
from samda.networks.pyramid_head import PyramidHeadConfig
from samda.task import Task


def case(name: str = "a", **changes: Any) -> CaseFacts:
    """A CT of 640 x 640 x 90 voxels of 0.8 x 0.8 x 3 mm with a body of 370 x 250 mm and an organ of 20 to 120 HU."""
    values: dict[str, Any] = {
        "shape": (640, 640, 90),
        "spacing_mm": (0.8, 0.8, 3.0),
        "sides_mm": (0.8, 0.8, 3.0),
        "orientation": "LPS",
        "channels": 1,
        "smallest": -1024.0,
        "largest": 1500.0,
        "quantiles": [[-1010.0, -900.0, 10.0, 40.0, 300.0]],
        "extent_mm": (370.0, 250.0, 270.0),
        "label_ids": {0: 1000, 3: 20, 1: 60},
        "widths_mm": {1: 60.0, 3: 20.0},
        "foreground": np.linspace(20, 120, 1001, dtype=np.float32)[:, None],
        "foreground_ids": np.ones(1001, int),
    }
    return CaseFacts(name, "training", ["a.nii.gz"], "l.nii.gz", **(values | changes))


def report(*cases: CaseFacts, **data: Any) -> DataReport:
    sections = {"training": [{"id": c.id, "image": c.image[0]} for c in cases], "validation": [], "test": []}
    values = {"cases": sections, "labels": None, "layout": "csv"} | data
    return DataReport(Path("My data"), DataList(**values), list(cases), [])


def test_a_ct() -> None:
    suggestion = suggest_task(report(case("a"), case("b"), case("c")))
    task = suggestion.task
    assert (task.name, task.classes) == ("segmentation", ("background", "class_1", "class_3"))
    assert task.labels == {"class_1": (1,), "class_3": (3,)}
    assert task.modality == "CT" and "3 of 3 scans have values below -500" in suggestion.reasons["modality"]
    assert (task.spacing, task.image_size, task.axis) == (2.0, 192, "axial")  # 20 / 5 / 2, and 1.02 * 370 mm
    assert task.window == (-130.0, 270.0)  # the middle 99 % are 20.5 to 119.5: 400 HU around 70
    assert task.in_channels == 1 and task.nsd_tolerance == 3


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\x00", "\x1b[2J"])
def test_names_in_comments_stay_comments(end: str) -> None:
    hostile = f"T1{end}spacing: 99.0{end}#"
    suggestion = suggest_task(report(case(), channels=(hostile,)))
    text = suggestion.to_yaml([f"A task for {hostile}"])
    assert Task.from_dict(yaml.safe_load(text)) == suggestion.task
    assert suggestion.task.spacing == 2.0 and "\x1b" not in text


def test_the_file_is_a_task_with_its_reasons(tmp_path: Path) -> None:
    odd = {"background": (0,), "no: liver": (1,), "1": (2, 4)}
    suggestion = suggest_task(report(case(), labels=odd))
    (tmp_path / "task.yaml").write_text(suggestion.to_yaml(["first", "", "third"]), encoding="utf-8")
    assert Task.from_file(tmp_path / "task.yaml") == suggestion.task
    lines = (tmp_path / "task.yaml").read_text("utf-8").splitlines()
    assert lines[:4] == ["# first", "#", "# third", "name: segmentation"]
    assert "spacing: 2.95 # mm per pixel of a slice; the scans have 0.8, no: liver is 60 wide" in "\n".join(lines)
    assert yaml.safe_load("\n".join(lines))["labels"] == {"no: liver": 1, "1": [2, 4]}


def test_classes_as_the_data_set_names_them_unless_they_overlap() -> None:
    named = {"background": (0,), "spleen": (3,), "liver": (1,), "never seen": (9,)}
    assert suggest_task(report(case(), labels=named)).task.classes == ("background", "liver", "spleen", "never seen")
    regions = {"background": (0,), "whole": (1, 3), "core": (3,)}
    assert suggest_task(report(case(), labels=regions)).task.labels == {"class_1": (1,), "class_3": (3,)}
    one = case(label_ids={0: 5, 255: 7})
    assert suggest_task(report(one)).task.labels == {"foreground": (255,)}
    with pytest.raises(InputError, match="id above 0"):
        suggest_task(report(case(label_ids={0: 5})))
    with pytest.raises(InputError, match="no case with a readable image and label"):
        suggest_task(report(case(shape=None)))


@pytest.mark.parametrize(
    ("changes", "data", "modality", "reason"),
    [
        ({"smallest": -3.0}, {}, "MR", "guess: 1 of 1 scans"),
        ({"smallest": -3.0}, {"channels": ("CT",)}, "CT", "the data set names its channels CT"),
        ({}, {"channels": ("T2", "ADC")}, "MR", "T2, ADC; percentiles serve whatever is not CT"),
        ({}, {"channels": ("CT", "PET")}, "MR", "CT, PET; percentiles"),
        ({"smallest": -3.0}, {"channels": ("0",)}, "MR", "guess"),
        ({"dicom": "MR"}, {}, "MR", "1 of 1 series state MR"),
        ({"dicom": "PT"}, {}, "MR", "state PT; percentiles"),
        ({"picture": True}, {"channels": ("CT",)}, "image", "2-D images"),
    ],
)
def test_modality(changes: dict[str, Any], data: dict[str, Any], modality: str, reason: str) -> None:
    suggestion = suggest_task(report(case(**changes), **data))
    assert suggestion.task.modality == modality
    assert reason in suggestion.reasons["modality"]


@pytest.mark.parametrize(
    ("side", "width", "extent", "spacing", "size"),
    [
        (1.0, 20.0, 373.0, 2.0, 192),  # a fifth of the width on two pixels
        (1.0, 28.0, 373.0, 2.8, 144),
        (1.0, 80.0, 373.0, 2.98, 128),  # no fewer pixels where the voxels are finer: 380.46 mm / 128
        (3.0, 20.0, 373.0, 2.0, 192),
        (5.0, 20.0, 373.0, 2.5, 160),  # the voxels are coarser than a fifth
        (1.0, 7.0, 52.0, 0.5, 112),  # a crop: two pixels are the voxel, more would show nothing
        (0.8, 5.0, 373.0, 1.49, 256),  # 0.5 would suit; the bound of the cost
        (0.01, 0.02, 2.0, 0.00797, 256),
    ],
)
def test_field_of_view(side: float, width: float, extent: float, spacing: float, size: int) -> None:
    one = case(sides_mm=(side, side, side), extent_mm=(extent, extent / 2, 9999.0), widths_mm={1: 200.0, 3: width})
    suggestion = suggest_task(report(one))
    task = suggestion.task
    assert (task.spacing, task.image_size) == (spacing, size)
    assert task.spacing * task.image_size >= extent
    assert ("256 pixels bound the cost" in suggestion.reasons["spacing"]) == (size == LARGEST_SIZE)


def test_widths_are_those_of_most_cases_and_of_classes_of_the_task() -> None:
    cases = [case(str(i), widths_mm={1: 60.0, 3: width}) for i, width in enumerate((2.0, 20.0, 30.0, 40.0, 50.0))]
    assert suggest_task(report(*cases, case("d", widths_mm={}))).task.spacing == 2.0
    named = {"background": (0,), "liver": (1,)}  # the narrow structure is no class
    assert suggest_task(report(*cases, labels=named)).task.spacing == 2.95
    suggestion = suggest_task(report(case(widths_mm={})))  # nothing was measured: as fine as the voxels, in bounds
    assert (suggestion.task.spacing, suggestion.task.image_size) == (1.48, 256)


def test_a_small_crop_is_seen_as_a_whole() -> None:
    crop = case(shape=(50, 34, 30), sides_mm=(1.0, 1.0, 1.0), extent_mm=(34.0, 44.0, 30.0), widths_mm={1: 8.0})
    assert suggest_task(report(crop)).task.image_size == 112  # 51 mm at 0.5 mm
    table = dataclasses.replace(crop, extent_mm=(34.0, 36.0, 30.0))
    assert suggest_task(report(table)).task.image_size == 80


def test_pictures_of_small_things_are_tiled_at_the_usual_size() -> None:
    """Three pictures of 256 pixels and one of 1024: padding all to the largest would cost 16 times as much."""
    sizes = (256.0, 256.0, 256.0, 1024.0)
    for width, expected in (
        (10.0, (0.517, 496)),  # half of a voxel, but for a row of padding
        (15.0, (0.64, 400)),  # 15 / 12 / 2, but for a row of padding
        (40.0, (1.68, 544)),  # 909 pixels, the 95th percentile
        (100.0, (3.55, 256)),  # 4.17 would do, but 256 pixels are cheap for one slice
    ):
        pictures = [
            case(str(i), picture=True, sides_mm=(1, 1, 1), extent_mm=(size, size, 1.0), widths_mm={1: width})
            for i, size in enumerate(sizes)
        ]
        task = suggest_task(report(*pictures, labels={"nucleus": (1,)})).task
        assert (task.spacing, task.image_size) == expected


@pytest.mark.parametrize(
    ("sides", "widths", "size"),
    [
        ((565, 565, 999, 999), (4.0, 4.2, 7.2, 7.4), 391.0),  # two cameras, vessels of the same share
        ((565, 584, 580, 565), (4.0, 8.0, 2.0, 4.0), 286.25),  # one camera
        ((256, 256, 512, 1024), (12.0, 14.0, 13.0, 12.0), None),  # mosaics
        ((256, 1024), (0.0, 0.0), 320.0),  # nothing was measured
    ],
)
def test_pictures_of_any_size_show_a_field_where_widths_follow_it(
    sides: tuple[float, ...], widths: tuple[float, ...], size: float | None
) -> None:
    pictures = [
        case(
            str(i),
            picture=True,
            sides_mm=(1, 1, 1),
            extent_mm=(side, side / 2, 1.0),
            widths_mm={1: width} if width else {},
        )
        for i, (side, width) in enumerate(zip(sides, widths, strict=True))
    ]
    suggestion = suggest_task(report(*pictures, labels={"vessel": (1,)}))
    assert suggestion.task.picture_size == size
    assert ("picture_size:" in suggestion.to_yaml()) == (size is not None)


def test_the_grid_is_that_of_the_class_head() -> None:
    assert PyramidHeadConfig().stride == GRID


def test_sagittal_slices() -> None:
    spine = case(sides_mm=(4.0, 0.7, 0.7), extent_mm=(60.0, 150.0, 170.0), smallest=0.0)
    suggestion = suggest_task(report(spine))
    assert suggestion.task.axis == "sagittal"
    assert (suggestion.task.spacing, suggestion.task.image_size) == (1.36, 128)  # 1.02 * 170 / 128 = 1.355
    assert "slice spacing of 4 mm" in suggestion.reasons["axis"]


def test_windows_are_wide_enough_to_see_and_hold_the_foreground() -> None:
    lungs = case(foreground=np.linspace(-950, -50, 1001, dtype=np.float32)[:, None])
    assert suggest_task(report(lungs)).task.window == (-950.0, -50.0)
    others = np.concatenate([np.linspace(20, 120, 1001), np.full(1000, 3000.0)]).astype(np.float32)[:, None]
    ids = np.repeat([1, 7], [1001, 1000])
    named = report(case(foreground=others, foreground_ids=ids), labels={"background": (0,), "liver": (1,)})
    assert suggest_task(named).task.window == (-130.0, 270.0)  # the bones are of no class
    nothing = case(foreground=np.zeros((0, 1), np.float32), foreground_ids=np.zeros(0, int))
    assert suggest_task(report(nothing)).task.window == (-160.0, 240.0)


def test_color_pictures() -> None:
    picture = case(
        picture=True, channels=3, sides_mm=(1, 1, 1), extent_mm=(1024.0, 768.0, 1.0), label_ids={0: 1, 255: 2}
    )
    task = suggest_task(report(picture)).task
    assert (task.in_channels, task.spacing, task.image_size) == (3, 1.34, 768)
    assert task.nsd_tolerance == 2 and task.context == 0


def test_mirrored_pictures_where_structures_lie_on_both_sides() -> None:
    """A structure off the middle by more than chance, or one that names a side, is not mirrored; nor is a volume."""
    sides = {"picture": True, "sides_mm": (1, 1, 1), "extent_mm": (256.0, 256.0, 1.0), "widths_mm": {1: 30.0, 3: 30.0}}
    scattered, off = (0.2, -0.15, 0.1, -0.2), (0.12, 0.15, 0.1, 0.2)

    def found(first: tuple[float, ...], second: tuple[float, ...], **changes: Any) -> bool:
        pairs = enumerate(zip(first, second, strict=True))
        cases = [case(str(i), **sides | {"offsets": {1: a, 3: b}} | changes) for i, (a, b) in pairs]
        suggestion = suggest_task(report(*cases, labels={"a": (1,), "b": (3,)}))
        assert ("mirror: true # all structures lie" in suggestion.to_yaml()) == suggestion.task.mirror
        return suggestion.task.mirror

    assert found(scattered, scattered) and found((0.02,), (-0.03,))
    assert not found(scattered, off) and not found((0.04,), (0.0,))
    assert not found(scattered, scattered, picture=False)
    lateral = case(**sides | {"offsets": {1: 0.0, 3: 0.0}})
    assert not suggest_task(report(lateral, labels={"eye_left": (1,), "b": (3,)})).task.mirror


def test_three_axes_of_small_volumes_of_cubes() -> None:
    """A crop of 1 mm; not flat voxels, nor a large scan, nor classes that name a side."""
    crop = {"sides_mm": (1.0, 1.0, 1.0), "extent_mm": (35.0, 51.0, 60.0), "widths_mm": {1: 7.0}, "smallest": 0.0}

    def found(label: str = "anterior", **changes: Any) -> Task:
        suggestion = suggest_task(report(case(**crop | changes), labels={label: (1,)}))
        assert ("axes: all # voxels are nearly cubes" in suggestion.to_yaml()) == (suggestion.task.axes == "all")
        return suggestion.task

    every, one = found(), found(label="hippocampus_left")
    assert (every.axes, one.axes) == ("all", "one")
    assert every.image_size * every.spacing >= 60 > one.image_size * one.spacing, "coronal slices are 60 mm high"
    assert found(sides_mm=(1.0, 1.0, 1.6)).axes == "one"
    assert found(extent_mm=(130.0, 130.0, 130.0)).axes == "one"


def test_neighbors_of_close_slices() -> None:
    for apart, channels, context in ((2.0, 1, 1), (2.5, 1, 0), (1.0, 2, 0)):
        suggestion = suggest_task(report(case(sides_mm=(1.5, 1.5, apart), channels=channels)))
        assert suggestion.task.context == context
        assert (f"context: 1 # slices are {apart:g} mm apart" in suggestion.to_yaml()) == bool(context)


def test_a_name_that_looks_like_a_number_stays_a_text() -> None:
    suggestion = suggest_task(report(case(), labels={"1e3": (1,), "0x1F": (2,), "yes": (3,)}))
    values = load_yaml(suggestion.to_yaml())
    assert values["classes"] == ["background", "1e3", "0x1F", "yes"]
    assert Task.from_dict(values) == suggestion.task


def test_gray_values_are_no_labels() -> None:
    for most, picture in ((150, False), (32, True)):
        known = case(picture=picture, label_ids=dict.fromkeys(range(most + 1), 5))
        assert suggest_task(report(known)).task.num_classes == most + 1
        gray = dataclasses.replace(known, label_ids=dict.fromkeys(range(most + 2), 5))
        with pytest.raises(InputError, match=f"hold {most + 1} different ids, as gray values do"):
            suggest_task(report(gray))
