# SPDX-License-Identifier: Apache-2.0
"""Measurements of slices whose numbers are known by hand; moments of features against plain formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from samda.errors import InputError
from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import (
    FEATURES,
    QUANTILES,
    FeatureTap,
    SliceStatistics,
    class_shares,
    ellipse_moments,
    feature_statistics,
)
from samda.task import Task

MEDIAN = QUANTILES.index(0.5)
TASK = Task(classes=("background", "organ", "vessel", "never"), spacing=2.0, image_size=64)


def slice_statistics(cases: list[tuple[np.ndarray, np.ndarray]], task: Task) -> dict[str, Any]:
    statistics = SliceStatistics(task)
    for images, labels in cases:
        statistics.update(images, labels)
    return statistics.to_dict()


def scan(n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """A body of 0.5 over rows 10 to 49 and columns 6 to 57; the organ in slices 1 to 3, two vessels in slice 2."""
    images = np.zeros((n, 1, 64, 64), np.float32)
    images[:, :, 10:50, 6:58] = 0.5
    labels = np.zeros((n, 64, 64), np.uint8)
    for i, height in ((1, 4), (2, 8), (3, 12)):
        labels[i, 20 : 20 + height, 12:32] = 1
    labels[2, 40:42, 40:42] = labels[2, 44:46, 40:42] = 2
    images[:, 0][labels == 1] = 0.8
    images[:, 0][labels == 2] = 1.0
    return images, labels


def test_values_by_hand() -> None:
    statistics = slice_statistics([scan()], TASK)
    assert (statistics["cases"], statistics["slices"], statistics["spacing_mm"]) == (1, 5, 2.0)
    organ, vessel, never = (statistics["classes"][name] for name in TASK.classes[1:])
    assert (organ["slices"], organ["share"]) == (3, 0.6)
    # heights 4, 8, 12 x 20 pixels of 4 mm2: 320, 640, 960
    assert organ["area_mm2"] == pytest.approx(list(np.quantile([320, 640, 960], QUANTILES)), rel=1e-4)
    assert organ["components"] == [1.0] * len(QUANTILES)
    assert organ["compactness"] == pytest.approx([3 / math.pi] * len(QUANTILES), rel=1e-4)
    assert organ["elongation"][MEDIAN] == pytest.approx(20 / 8, rel=1e-4)
    # the slice of 8 rows: centroid (23.5, 21.5) in a body from row 10 to 49 and column 6 to 57
    assert organ["row"][MEDIAN] == pytest.approx((23.5 - 10) / 39, rel=1e-4)
    assert organ["column"][MEDIAN] == pytest.approx((21.5 - 6) / 51, rel=1e-4)
    assert organ["intensity"] == [pytest.approx([0.8] * len(QUANTILES), abs=1 / 256)]
    assert vessel["components"][MEDIAN] == 2.0
    assert vessel["intensity"] == [pytest.approx([1.0] * len(QUANTILES), abs=1 / 256)]
    # two 2 x 2 squares, centers 4 pixels apart: variances 2^2 + 4/12 and 4/12; 8 pixels
    assert vessel["compactness"][MEDIAN] == pytest.approx(8 / (4 * math.pi * math.sqrt((4 + 1 / 3) / 3)), rel=1e-4)
    assert vessel["elongation"][MEDIAN] == pytest.approx(math.sqrt(13), rel=1e-4)
    assert (never["slices"], never["share"], never["area_mm2"], never["intensity"]) == (0, 0.0, None, [None])
    # the opening by a disc of 4 pixels takes 4 + 2 + 1 + 1 pixels off each corner
    assert statistics["body"]["area_mm2"] == pytest.approx([(40 * 52 - 4 * 8) * 4.0] * len(QUANTILES), rel=1e-4)
    assert statistics["body"]["intensity"][0][MEDIAN] == pytest.approx(0.5, abs=1 / 256)
    assert set(FEATURES) <= set(organ)


@pytest.mark.parametrize(
    ("pixels", "compactness", "elongation"),
    [
        ([(3, 5)], 3 / math.pi, 1.0),
        ([(r, c) for r in range(6) for c in range(3)], 3 / math.pi, 2.0),
        ([(r, 0) for r in range(10)], 3 / math.pi, 10.0),
    ],
)
def test_rectangles(pixels: list[tuple[int, int]], compactness: float, elongation: float) -> None:
    rows, columns = np.array(pixels).T
    assert ellipse_moments(rows, columns) == pytest.approx((compactness, elongation))


def test_ellipses() -> None:
    rows, columns = np.nonzero(
        np.fromfunction(lambda r, c: (r - 40) ** 2 / 36**2 + (c - 40) ** 2 / 18**2 < 1, (81, 81))
    )
    assert ellipse_moments(rows, columns) == pytest.approx((1.0, 2.0), rel=0.01)


def test_cases_add_up_and_their_order_does_not_matter() -> None:
    first, second = scan(), scan(4)
    second = (second[0] * 0.7, np.roll(second[1], 3, axis=1))
    both = slice_statistics([first, second], TASK)
    assert both == slice_statistics([second, first], TASK)
    assert (both["cases"], both["slices"], both["classes"]["organ"]["slices"]) == (2, 9, 6)
    assert both["classes"]["organ"]["share"] == pytest.approx(6 / 9, rel=1e-4)


def test_a_table_below_the_body_is_not_part_of_it() -> None:
    images, labels = scan()
    images[:, :, 56:58, 4:60] = 0.6
    assert slice_statistics([(images, labels)], TASK)["classes"] == slice_statistics([scan()], TASK)["classes"]


def test_tensors_and_colors() -> None:
    task = Task(classes=("background", "mole"), modality="image", in_channels=3, spacing=1.0, image_size=16)
    images = torch.tensor([0.1, 0.5, 0.9])[None, :, None, None].expand(1, 3, 16, 16)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, 4:8, 0:16] = 1
    mole = slice_statistics([(images, labels)], task)["classes"]["mole"]
    assert [channel[MEDIAN] for channel in mole["intensity"]] == pytest.approx([0.1, 0.5, 0.9], abs=1 / 256)
    assert (mole["row"][0], mole["column"][0]) == pytest.approx((5.5 / 15, 0.5), rel=1e-4)  # in the whole picture


def test_plain_json_without_surprises() -> None:
    text = json.dumps(slice_statistics([scan()], TASK), allow_nan=False)
    assert json.loads(text)["classes"]["organ"]["share"] == 0.6
    assert len(text) < 3000
    nothing = SliceStatistics(TASK).to_dict()
    assert (nothing["slices"], nothing["classes"]["organ"]["share"]) == (0, 0.0)
    json.dumps(nothing, allow_nan=False)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 1, 8, 8)), np.zeros((3, 8, 8), int), r"\(2, 1, 8, 8\) and \(3, 8, 8\)"),
        (np.zeros((2, 3, 8, 8)), np.zeros((2, 8, 8), int), "1 channel.*have 3"),
        (np.zeros((2, 1, 8, 8)), np.full((2, 8, 8), 4), "labels hold 4 to 4, the classes are 0 to 3"),
    ],
)
def test_refuses(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        slice_statistics([(images, labels)], TASK)


# --------------------------------------------------------------------------------------------- features of the decoder


@pytest.fixture
def network(make_segmenter: Callable[..., SamSegmenter]) -> SamSegmenter:
    return make_segmenter(adapters={"sam_da": {}})


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(count))


def labeled(count: int) -> list[dict[str, torch.Tensor]]:
    """Slices with labels of classes 0 and 1; class 2 occurs nowhere."""
    generator = torch.Generator().manual_seed(count)
    return [{"image": i, "label": torch.randint(0, 2, (1, 64, 64), generator=generator)} for i in images(count)]


def test_shares_of_the_places_by_hand() -> None:
    labels = torch.tensor([[[0, 1, 2, 2], [1, 1, 2, 2]]])
    found = class_shares(labels, 3, (1, 2))
    assert found.tolist() == [[[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]]


def test_the_tap_sees_what_the_upscaling_reads(network: SamSegmenter) -> None:
    embedding = network.encode(images(2))["embedding"]
    decoder = network.mask_decoder
    with torch.no_grad(), FeatureTap(network) as tap:
        _, upscaled = decoder(embedding, *network.prompts(embedding))
        (last,) = tap.features[-1]
        torch.testing.assert_close(decoder.output_upscaling(last.transpose(1, 2).unflatten(2, (4, 4))), upscaled)


def test_the_tap_follows_the_adapter_and_lets_gradients_through(network: SamSegmenter) -> None:
    pyramid = {"embedding": network.encode(images(1))["embedding"].detach()}
    adapter = next(m for name, m in network.named_modules() if name.endswith("sides.image"))
    with FeatureTap(network) as tap:
        network.decode(pyramid)
        before = tap.features[0][0].detach().clone()
        with torch.no_grad():
            adapter.residual.copy_(torch.eye(256))  # T -> T + T
        tap.clear()
        network.decode(pyramid)
        torch.testing.assert_close(tap.features[0][0], 2 * before)
        adapter.residual.requires_grad_()
        tap.clear()
        network.decode(pyramid)
        tap.features[0][0].sum().backward()
    assert adapter.residual.grad.abs().sum() > 0


def test_a_closed_tap_sees_nothing(network: SamSegmenter) -> None:
    with FeatureTap(network) as tap:
        pass
    network.decode(network.encode(images(1)))
    assert tap.features == [[], []]


def test_statistics_are_the_weighted_moments_over_all_slices_whatever_the_batch(network: SamSegmenter) -> None:
    items = labeled(5)
    found = feature_statistics(network, TASK, items, [0, 2, 4], batch_size=2)["features"]
    chosen = [items[i] for i in (0, 2, 4)]
    # 64 px on a 4 x 4 grid: a place is 16 x 16 pixels
    blocks = torch.stack([item["label"][0].reshape(4, 16, 4, 16).float().mean((1, 3)) for item in chosen]).flatten()
    with torch.no_grad(), FeatureTap(network) as tap:
        network.decode(network.encode(torch.stack([item["image"] for item in chosen])))
        for layer, kept in zip(found, tap.features, strict=True):
            values = kept[0].reshape(-1, 256).double().numpy()
            for k, weights in ((0, 1 - blocks.numpy()), (1, blocks.numpy())):
                mean = np.average(values, axis=0, weights=weights)
                std = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
                np.testing.assert_allclose(layer["mean"][k], mean, atol=1e-4 * values.std())
                np.testing.assert_allclose(layer["std"][k], std, rtol=1e-4)
            assert layer["mean"][2] is None and layer["std"][2] is None


def test_embeddings_give_the_same_as_images(network: SamSegmenter) -> None:
    items = labeled(3)
    with torch.no_grad():
        embeddings = network.encode(images(3))["embedding"]
    pairs = zip(embeddings, items, strict=True)
    embedded = [{"pyramid": {"embedding": e}, "label": item["label"]} for e, item in pairs]
    a, b = (feature_statistics(network, TASK, x, range(3))["features"] for x in (items, embedded))
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one["mean"][0], other["mean"][0], atol=1e-4)


def test_many_slices_are_thinned_evenly(network: SamSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samda.source_statistics.MOST", 2)
    items = labeled(5)
    few, chosen = (feature_statistics(network, TASK, items, indices) for indices in (range(5), [0, 3]))
    assert few == chosen and few["features"]
