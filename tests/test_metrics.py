# SPDX-License-Identifier: Apache-2.0
"""Scores against numbers worked out by hand, and against a brute-force calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion

from samda.errors import InputError
from samda.metrics import ClassScores, confusion_matrix, score_case, summarize, surface_scores


def volume(shape: tuple[int, ...], *boxes: tuple[slice, ...]) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    for k, box in enumerate(boxes, start=1):
        array[box] = k
    return array


def brute_force(
    prediction: np.ndarray, label: np.ndarray, spacing_mm: tuple, tolerance_mm: float
) -> tuple[float, float]:
    """HD95 and NSD from all pairs of surface voxels of the whole volume."""
    points = []
    for mask in (prediction, label):
        surface = mask & ~binary_erosion(np.pad(mask, 1))[(slice(1, -1),) * mask.ndim]
        points.append(np.argwhere(surface) * np.asarray(spacing_mm))
    pairs = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))
    distances = [pairs.min(1), pairs.min(0)]
    within = sum((d <= tolerance_mm + 1e-6).sum() for d in distances)
    return max(np.percentile(d, 95) for d in distances), within / sum(map(len, distances))


@pytest.mark.parametrize(("tolerance", "nsd"), [(1.0, 0.0), (2.0, 1.0), (3.0, 1.0)])
def test_two_voxels_two_millimeters_apart(tolerance: float, nsd: float) -> None:
    prediction, label = volume((5, 4, 3)), volume((5, 4, 3))
    prediction[1, 1, 1] = label[2, 1, 1] = 1
    (score,) = score_case(prediction, label, (2.0, 1.0, 0.5), 2, tolerance)
    assert score == ClassScores("both", 0.0, 0.0, 2.0, nsd, predicted_ml=0.001, label_ml=0.001)


@pytest.mark.parametrize(("tolerance", "nsd"), [(0.5, 36 / 56), (1.0, 40 / 56), (3.0, 1.0)])
def test_cubes_shifted_by_one_thick_voxel(tolerance: float, nsd: float) -> None:
    # 4 x 4 x 4 cubes one voxel (3 mm) apart along X. Of the 56 surface voxels of a cube, 16 of the far face are 3 mm
    # from the other surface, the 4 inner ones of the near face 1 mm (inside the other cube), the other 36 coincide
    inner = slice(2, 6)
    prediction = volume((9, 8, 8), (slice(2, 6), inner, inner))
    label = volume((9, 8, 8), (slice(3, 7), inner, inner))
    (score,) = score_case(prediction, label, (3.0, 1.0, 1.0), 2, tolerance)
    assert (score.dice, score.iou, score.hd95_mm) == (0.75, 0.6, 3.0)
    assert score.nsd == pytest.approx(nsd)
    assert (score.predicted_ml, score.label_ml) == pytest.approx((0.192, 0.192))


def test_hd95_interpolates_between_distances() -> None:
    # 20 distances of 0 and two of 10 mm: rank 0.95 * 21 = 19.95 lies between the 20th (0) and the 21st (10)
    label, prediction = volume((30, 20, 3)), volume((30, 20, 3))
    label[2:22, 4, 1] = prediction[2:22, 4, 1] = 1
    prediction[[2, 21], 14, 1] = 1
    (score,) = score_case(prediction, label, (1.0, 1.0, 4.0), 2, 3.0)
    assert score.hd95_mm == pytest.approx(9.5)
    assert score.nsd == pytest.approx(40 / 42)


def test_empty_structures() -> None:
    shape, spacing = (10, 20, 30), (1.0, 2.0, 0.5)
    box = (slice(1, 3), slice(2, 4), slice(5, 9))  # 16 voxels of 1 mm3
    prediction, label = volume(shape), volume(shape)
    label[box], prediction[tuple(slice(s.start + 3, s.stop + 3) for s in box)] = 1, 2
    missed, extra, absent = score_case(prediction, label, spacing, 4, 3.0)
    diagonal = math.sqrt(10**2 + 40**2 + 15**2)
    assert missed == ClassScores("missed", 0.0, 0.0, pytest.approx(diagonal), 0.0, predicted_ml=0.0, label_ml=0.016)
    assert extra == ClassScores("extra", 0.0, 0.0, pytest.approx(diagonal), 0.0, predicted_ml=0.016, label_ml=0.0)
    assert absent.status == "absent"
    assert all(math.isnan(v) for v in (absent.dice, absent.iou, absent.hd95_mm, absent.nsd))
    assert (absent.predicted_ml, absent.label_ml) == (0.0, 0.0)


def test_equal_maps_are_perfect() -> None:
    label = volume((9, 8, 7), (slice(1, 5), slice(2, 6), slice(0, 7)), (slice(6, 8), slice(2, 3), slice(3, 4)))
    for score in score_case(label.copy(), label, (0.7, 1.1, 5.0), 3, 0.0):
        assert (score.status, score.dice, score.iou, score.hd95_mm, score.nsd) == ("both", 1.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_cropping_to_the_structure_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, spacing, tolerance = (14, 12, 9), (0.8, 1.7, 3.0), 2.0
    prediction, label = volume(shape), volume(shape)
    for array in (prediction, label):  # boxes at the border of the volume and away from it
        for _ in range(3):
            low = rng.integers(0, [9, 8, 5])
            array[tuple(slice(a, a + n) for a, n in zip(low, rng.integers(2, 6, 3), strict=True))] = 1
    (score,) = score_case(prediction, label, spacing, 2, tolerance)
    hd95, nsd = brute_force(prediction == 1, label == 1, spacing, tolerance)
    assert score.hd95_mm == pytest.approx(hd95, rel=1e-5)
    assert score.nsd == pytest.approx(nsd)
    full = [np.stack([a != 1, a == 1])[None] for a in (prediction, label)]
    tensors = [torch.from_numpy(a) for a in full]
    monai_hd95 = compute_hausdorff_distance(*tensors, percentile=95, spacing=list(spacing))
    monai_nsd = compute_surface_dice(*tensors, class_thresholds=[tolerance], spacing=list(spacing))
    assert score.hd95_mm == pytest.approx(float(monai_hd95), rel=1e-5)
    assert score.nsd == pytest.approx(float(monai_nsd))
    assert (hd95, nsd) == pytest.approx(surface_scores(prediction == 1, label == 1, spacing, tolerance), rel=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_measured_in_its_plane(axis: int) -> None:
    # 6 x 6 squares shifted by one pixel of 2 mm: 20 edge pixels each; in three dimensions every pixel would be surface
    flat = [volume((12, 10), (slice(2, 8), slice(2, 8))), volume((12, 10), (slice(3, 9), slice(2, 8)))]
    prediction, label = (np.expand_dims(a, axis) for a in flat)
    spacing = list(np.insert([2.0, 1.0], axis, 7.0))
    (score,) = score_case(prediction, label, spacing, 2, 1.0)
    expected = brute_force(flat[0] == 1, flat[1] == 1, (2.0, 1.0), 1.0)
    assert (score.hd95_mm, score.nsd) == pytest.approx(expected)
    assert score.hd95_mm == 2.0
    assert score.nsd == pytest.approx(
        12 / 20
    )  # 10 coincide, 2 of the near edge are 1 mm away, 2 of it and 6 of the far edge 2 mm


def test_confusion_counts_every_voxel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samda.metrics.CHUNK", 25)  # several slabs, the last one smaller
    rng = np.random.default_rng(0)
    prediction, label = (np.asfortranarray(rng.integers(0, 3, (4, 5, 7)).astype(np.uint8)) for _ in range(2))
    counts = confusion_matrix(prediction, label, 3)
    for true in range(3):
        for predicted in range(3):
            assert counts[true, predicted] == ((label == true) & (prediction == predicted)).sum()
    assert counts.sum() == 140


def test_means_leave_out_absent_structures_and_say_how_many_remain() -> None:
    def score(status: str, value: float) -> ClassScores:
        return ClassScores(status, value, value, value, value, 0.0, 0.0)

    nan = math.nan
    cases = [
        [score("both", 0.8), score("absent", nan), score("absent", nan)],
        [score("missed", 0.0), score("absent", nan), score("extra", 0.0)],
        [score("both", 0.7), score("absent", nan), score("both", 0.5)],
    ]
    summary = summarize(cases, ["liver", "spleen", "aorta"])
    liver, spleen, aorta = (summary["classes"][name] for name in ("liver", "spleen", "aorta"))
    assert liver["dice"] == pytest.approx({"mean": 0.5, "std": math.sqrt(0.19), "median": 0.7, "n": 3})
    assert math.isnan(spleen["dice"]["mean"]) and spleen["dice"]["n"] == 0
    assert (aorta["nsd"]["mean"], aorta["nsd"]["n"]) == (0.25, 2)
    assert [(e["missed"], e["extra"], e["absent"]) for e in (liver, spleen, aorta)] == [(1, 0, 0), (0, 0, 3), (0, 1, 1)]
    assert (summary["all"]["dice"]["mean"], summary["all"]["dice"]["n"]) == (0.375, 2)
    assert [summary["all"][what] for what in ("missed", "extra", "absent")] == [1, 1, 4]


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (np.zeros((4, 5, 7), np.uint8), "4 x 5 x 7.*4 x 5 x 6.*one grid"),
        (np.full((4, 5, 6), 3, np.uint8), "prediction contains 3"),
        (np.full((4, 5, 6), -1, np.int16), "prediction contains -1"),
        (np.zeros((4, 5, 6), np.float32), "float32"),
    ],
)
def test_refuses_what_is_no_label_map(prediction: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_case(prediction, np.zeros((4, 5, 6), np.uint8), (1, 1, 1), 3, 3.0)
