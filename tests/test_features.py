# SPDX-License-Identifier: Apache-2.0
"""Features of the decoder: what the tap sees, and the moments of a set of slices, against plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from samda.networks.segmenter import SamSegmenter
from samda.source_statistics import FeatureTap, class_shares, feature_statistics


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
    embedding = network.encode(images(2))
    decoder = network.mask_decoder
    tokens = decoder.mask_tokens.weight.expand(2, -1, -1)
    with torch.no_grad(), FeatureTap(network) as tap:
        _, upscaled = decoder.decode_tokens(embedding, *network.prompts(embedding), tokens)
        (last,) = tap.features[-1]
        torch.testing.assert_close(decoder.output_upscaling(last.transpose(1, 2).unflatten(2, (4, 4))), upscaled)


def test_the_tap_follows_the_adapter_and_lets_gradients_through(network: SamSegmenter) -> None:
    embedding = network.encode(images(1)).detach()
    adapter = next(m for name, m in network.named_modules() if name.endswith("sides.image"))
    with FeatureTap(network) as tap:
        network.decode(embedding)
        before = tap.features[0][0].detach().clone()
        with torch.no_grad():
            adapter.residual.copy_(torch.eye(256))  # T -> T + T
        tap.clear()
        network.decode(embedding)
        torch.testing.assert_close(tap.features[0][0], 2 * before)
        adapter.residual.requires_grad_()
        tap.clear()
        network.decode(embedding)
        tap.features[0][0].sum().backward()
    assert adapter.residual.grad.abs().sum() > 0


def test_a_closed_tap_sees_nothing(network: SamSegmenter) -> None:
    with FeatureTap(network) as tap:
        pass
    network.decode(network.encode(images(1)))
    assert tap.features == [[], []]


def test_statistics_are_the_weighted_moments_over_all_slices_whatever_the_batch(network: SamSegmenter) -> None:
    items = labeled(5)
    found = feature_statistics(network, items, [0, 2, 4], batch_size=2)
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
        embeddings = network.encode(images(3))
    embedded = [{"embedding": e, "label": item["label"]} for e, item in zip(embeddings, items, strict=True)]
    a, b = (feature_statistics(network, x, range(3)) for x in (items, embedded))
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one["mean"][0], other["mean"][0], atol=1e-4)


def test_many_slices_are_thinned_evenly(network: SamSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samda.source_statistics.MOST", 2)
    items = labeled(5)
    assert feature_statistics(network, items, range(5)) == feature_statistics(network, items, [0, 3])
