# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field: areas of maps that are known, gradients against finite differences, and the slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from samda.adapters import adapter_parameters, attach
from samda.data.datalists import find_cases
from samda.errors import InputError, UsageError
from samda.networks.segmenter import SamSegmenter
from samda.receptive_field import (
    SCALES,
    TAPS,
    area_ratios,
    body_slices,
    check_same_slices,
    measure_erf,
    pixel_influence,
    rescale,
)
from samda.task import Task

# ---------------------------------------------------------------------------------------------------------------- areas


def gaussian(size: int, sigma: float, height: float = 1.0) -> np.ndarray:
    far = (np.arange(size) - size // 2) ** 2
    return height * np.exp(-(far[:, None] + far[None]) / (2 * sigma**2))


def delta(size: int) -> np.ndarray:
    array = np.zeros((size, size))
    array[size // 2, size // 2] = 0.7
    return array


def sides(array: np.ndarray, scale: str) -> list[int | None]:
    return [area.side for area in area_ratios(array)[scale].values()]


def on_every_scale(values: list[int | None]) -> dict[str, list[int | None]]:
    return {scale: values for scale in SCALES}


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones((101, 101)), on_every_scale([47, 57, 73, None])),
        (np.ones((1024, 1024)), on_every_scale([459, 561, 725, 1019])),
        (delta(64), on_every_scale([3, 3, 3, 3])),
        (np.zeros((64, 64)), on_every_scale([None] * 4)),
        (
            gaussian(1024, 64),
            {"log": [83, 105, 145, 369], "mass": [77, 97, 135, 361], "normalized": [143, 179, 239, 487]},
        ),
        (
            gaussian(1024, 64, 1e3),  # only the papers' scale depends on the height
            {"log": [143, 179, 239, 487], "mass": [77, 97, 135, 361], "normalized": [143, 179, 239, 487]},
        ),
        (gaussian(1024, 64, 1e-12), {"log": [77, 97, 135, 361]}),  # too small for 1 + A in float64
    ],
    ids=["uniform 101", "uniform 1024", "delta", "zeros", "gaussian", "gaussian times 1000", "faint gaussian"],
)
def test_areas_of_known_maps(array: np.ndarray, expected: dict[str, list[int | None]]) -> None:
    for scale, values in expected.items():
        assert sides(array, scale) == values, scale


def test_ratios_and_rectangles() -> None:
    areas = area_ratios(np.ones((1024, 1024)))["mass"]
    assert [round(area.ratio, 4) for area in areas.values()] == [0.2009, 0.3001, 0.5013, 0.9903]
    assert str(areas[0.5]) == "725 (50.13 %)"
    wide = area_ratios(np.ones((20, 40)), [0.01, 0.2, 0.45, 0.46])["mass"]
    assert [area.side for area in wide.values()] == [3, 13, 19, None]  # 19 rows of 20 are the most there are
    assert wide[0.2].ratio == 13**2 / 800
    assert str(wide[0.46]) == "-"


def test_scales() -> None:
    array = np.array([[0.0, 9.0], [99.0, 999.0]])
    assert rescale(array, "log") == pytest.approx(np.array([[0, 1 / 3], [2 / 3, 1]]))
    assert rescale(array, "normalized") == pytest.approx(np.log10(array / 0.999 + 1))
    assert np.array_equal(rescale(array, "mass"), array)
    with pytest.raises(UsageError, match="did you mean 'mass'"):
        rescale(array, "mas")


# --------------------------------------------------------------------------------------------- functions that are known


def depthwise(kernel: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A convolution of each of three channels, without reduction of the grid."""
    side = kernel.shape[-1]
    return lambda x: nn.functional.conv2d(x, kernel.expand(3, 1, side, side), padding=side // 2, groups=3)


@pytest.mark.parametrize("k", [3, 7, 15, 31])
def test_the_field_of_a_positive_kernel_is_its_box(k: int) -> None:
    images = [torch.rand(1, 3, 64, 48) for _ in range(3)]
    erf = pixel_influence(depthwise(torch.full((k, k), 0.5)), images)
    expected = np.zeros((64, 48))
    expected[32 - k // 2 : 33 + k // 2, 24 - k // 2 : 25 + k // 2] = 3 * 0.5
    assert np.array_equal(erf.array, expected)
    assert (erf.images, erf.skipped) == (3, 0)
    assert area_ratios(erf, [0.99])["mass"][0.99].side == k


def test_larger_kernels_spread_the_mass_and_scale_changes_only_the_log() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[list[int | None]]] = {"mass": [], "normalized": [], "log": []}
    for k in (3, 9, 17, 33, 51):
        line = torch.linspace(-1.5, 1.5, k)
        kernel = torch.exp(-(line[:, None] ** 2) - line[None] ** 2) * (1 + torch.rand(k, k, generator=generator))
        plain, scaled = (pixel_influence(depthwise(f * kernel), [torch.rand(1, 3, 64, 64)]) for f in (1, 10))
        for scale in ("mass", "normalized"):
            assert sides(plain.array, scale) == sides(scaled.array, scale)
        for scale, rows in found.items():
            rows.append(sides(plain.array, scale))
        if k == 51:
            assert sides(plain.array, "log") != sides(scaled.array, "log")
    for scale in ("mass", "normalized"):
        spread = np.array(found[scale])
        assert (np.diff(spread, axis=0) >= 0).all() and (np.diff(spread[:, 2:], axis=0) > 0).all(), scale


def test_negative_influence_does_not_count() -> None:
    kernel = -torch.ones(5, 5)
    kernel[:, :2] = 2.0  # the sum is positive where the image is bright on the left, so the ReLU lets it pass
    image = torch.zeros(1, 3, 32, 32)
    image[..., :16] = 1.0
    array = pixel_influence(depthwise(kernel), [image]).array
    assert array[14:19, 14:16].tolist() == [[6.0, 6.0]] * 5
    assert array.sum() == 60.0
    assert not pixel_influence(depthwise(-torch.ones(5, 5)), [image]).array.any()  # a feature below 0 moves nothing


def test_the_sum_over_a_layer_norm_keeps_its_gradient() -> None:
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))]

    def features(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(nn.functional.conv2d(x, weight, padding=2).movedim(1, -1), (8,)).movedim(-1, 1)

    assert pixel_influence(features, images).array.sum() > 1


def test_images_with_nan_are_skipped_and_counted() -> None:
    good = torch.rand(1, 3, 16, 16)
    bad = torch.full((1, 3, 16, 16), torch.nan)

    def square(x: torch.Tensor) -> torch.Tensor:
        return x**2

    erf = pixel_influence(square, [bad, good, bad, 2 * good])
    assert (erf.images, erf.skipped) == (2, 2)
    expected = np.zeros((16, 16))
    expected[8, 8] = 3 * good[0, :, 8, 8].sum()  # the mean of 2 x and 2 (2 x)
    assert erf.array == pytest.approx(expected)
    with pytest.raises(InputError, match="none of 1 images gives finite gradients"):
        pixel_influence(square, [bad])
    with pytest.raises(InputError, match="no image"):
        pixel_influence(square, [])
    with pytest.raises(UsageError, match=r"one size, got \(16, 16\) and \(16, 32\)"):
        pixel_influence(square, [good, torch.rand(1, 3, 16, 32)])


# ------------------------------------------------------------------------------------------------------------- networks

ADAPTERS = {
    "dka": {"width": 4, "large_kernel": 7, "small_kernel": 3},
    "salt": {},
    "norm": {},
}


def adapted(make_segmenter: Callable[..., SamSegmenter], kind: str, dtype: torch.dtype, **kwargs) -> SamSegmenter:
    """A tiny network whose adapters do something."""
    network = make_segmenter(kind, **kwargs)
    attach(network, ADAPTERS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.to(dtype)


def last_tokens(network: SamSegmenter, x: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) -> (1, C, h, w): the blocks one after the other, without the encoder's own forward."""
    encoder = network.image_encoder
    if hasattr(encoder, "stages"):
        x = encoder.conv_blocks(encoder.patch_embed(x))
        for stage in encoder.stages:
            x = stage.downsample(x).permute(0, 2, 3, 1)
            for block in stage.blocks:
                x = block(x)
            x = x.permute(0, 3, 1, 2)
        return x
    x = encoder.patch_embed(x) + encoder.pos_embed
    for block in encoder.blocks:
        x = block(x)
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_influence_is_that_of_finite_differences(
    kind: str, tap: str, make_segmenter: Callable[..., SamSegmenter]
) -> None:
    network = adapted(make_segmenter, kind, torch.float64)
    image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64)[:, None, None] / 255
    std = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64)[:, None, None] / 255
    color = ((image.expand(3, -1, -1) - mean) / std)[None]

    @torch.no_grad()
    def score(x: torch.Tensor) -> float:
        tokens = last_tokens(network, x)
        maps = tokens if tap == "block" else network.image_encoder.neck(tokens)
        return float(maps[0, :, 2, 2].clamp(min=0).sum())

    array = measure_erf(network, [image], tap).array
    step = 1e-5
    pixels = [(32, 32), (40, 33), (0, 0), (63, 20), (10, 50), (25, 60)]
    expected = []
    for y, x in pixels:
        change = torch.zeros(3, *color.shape, dtype=torch.float64)
        change[range(3), 0, range(3), y, x] = step
        expected.append(sum(max(0.0, (score(color + c) - score(color - c)) / (2 * step)) for c in change))
    assert [array[pixel] for pixel in pixels] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert max(expected) > 1e-4


def test_single_precision_adapters_and_images_matter(make_segmenter: Callable[..., SamSegmenter]) -> None:
    images = list(torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(5)))
    for tap in TAPS:
        wide = measure_erf(adapted(make_segmenter, "vit", torch.float64), images, tap).array
        single = measure_erf(adapted(make_segmenter, "vit", torch.float32), images, tap).array
        assert single == pytest.approx(wide, rel=1e-2, abs=1e-5 * wide.max())
        plain = measure_erf(make_segmenter("vit"), images, tap).array
        assert np.abs(plain - wide).max() > 0.05 * wide.max()
        each = [measure_erf(adapted(make_segmenter, "vit", torch.float64), [image], tap).array for image in images]
        assert wide == pytest.approx(np.mean(each, axis=0))


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 64, 96)), (2, (2, 64, 64)), (3, (3, 48, 64))])
def test_channels_and_rectangles(
    channels: int, shape: tuple[int, int, int], make_segmenter: Callable[..., SamSegmenter]
) -> None:
    network = adapted(make_segmenter, "vit", torch.float32, in_channels=channels)
    assert measure_erf(network, [torch.rand(shape)]).array.shape == shape[1:]
    with pytest.raises(UsageError, match=f"images must be .B, {channels}, H, W."):
        measure_erf(network, [torch.rand(4, 64, 64)])
    with pytest.raises(UsageError, match="did you mean 'neck'"):
        measure_erf(network, [torch.rand(shape)], "nek")


def test_the_network_stays_as_it_is(make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = adapted(make_segmenter, "tiny_vit", torch.float32)
    network.train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in network.named_parameters()}
    with pytest.raises(UsageError):
        measure_erf(network, [torch.rand(1, 64, 63)])
    measure_erf(network, [torch.rand(1, 64, 64)], "block")
    assert network.training
    assert not network.image_encoder.neck._forward_hooks
    assert sum(required for _, required in before.values()) > 10
    for name, parameter in network.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name


# --------------------------------------------------------------------------------------------------------------- slices


@pytest.fixture
def scans(tmp_path: Path, phantom: SimpleNamespace) -> Path:
    """Two scans of 11 and 6 slices, on the task's own grid."""
    for name, depth in (("a", 11), ("b", 6)):
        labels = phantom.truth((40, 48, depth))
        phantom.write(tmp_path / f"{name}.nii.gz", labels, np.diag([1.0, 1.0, 3.0, 1.0]))
    return tmp_path


def test_slices_are_spread_over_the_scans(scans: Path, band_task: Task) -> None:
    cases = find_cases(scans)
    every = body_slices(cases, band_task, 50)
    assert len(every) == 11 + 6
    assert all(image.shape == (1, 64, 64) and 0 <= image.min() < image.max() <= 1 for image in every)
    few = body_slices(cases, band_task, 5)  # 3 of the first scan, 2 of the second
    expected = [every[i] for i in (1, 5, 9, 11 + 1, 11 + 4)]
    assert all(torch.equal(a, b) for a, b in zip(few, expected, strict=True))
    (single,) = body_slices(cases, band_task, 1)
    assert torch.equal(single, every[11 + 3])
    with pytest.raises(UsageError, match="got 0"):
        body_slices(cases, band_task, 0)


def test_a_body_larger_than_the_field_of_view_gives_the_middle_window(scans: Path, band_task: Task) -> None:
    cases = find_cases(scans / "a.nii.gz")
    whole = body_slices(cases, band_task, 1)[0]
    small = Task(**{**band_task.to_dict(), "image_size": 32, "keep_largest": False})
    assert torch.equal(body_slices(cases, small, 1)[0], whole[:, 16:48, 16:48])


def test_constant_slices_are_left_out(tmp_path: Path, phantom: SimpleNamespace, band_task: Task) -> None:
    labels = phantom.truth((40, 48, 11))
    labels[:, :, :8] = 0
    path = phantom.write(tmp_path / "a.nii.gz", labels, np.diag([1.0, 1.0, 3.0, 1.0]))
    assert len(body_slices(find_cases(path), band_task, 50)) == 3
    labels[:] = 0
    labels[:, :, 5] = 2  # every slice is constant, the scan is not
    path = phantom.write(tmp_path / "b.nii.gz", labels, np.diag([1.0, 1.0, 3.0, 1.0]))
    with pytest.raises(InputError, match="no slice of 1 scans"):
        body_slices(find_cases(path), band_task, 50)


def test_slices_with_neighbors(scans: Path, band_task: Task) -> None:
    plain = body_slices(find_cases(scans / "b.nii.gz"), band_task, 50)
    task = Task(**{**band_task.to_dict(), "context": 1})
    around = body_slices(find_cases(scans / "b.nii.gz"), task, 50)
    assert torch.equal(around[2], torch.cat(plain[1:4]))


def test_tasks_that_prepare_scans_otherwise_are_refused(band_task: Task) -> None:
    same = Task(**{**band_task.to_dict(), "name": "other", "classes": ("background", "liver")})
    check_same_slices({"a": band_task, "b": same})
    other = Task(**{**band_task.to_dict(), "spacing": 2.0})
    with pytest.raises(UsageError, match=r"a and c .*\(spacing 1.0 and 2.0\)"):
        check_same_slices({"a": band_task, "b": same, "c": other})
