# SPDX-License-Identifier: Apache-2.0
"""Features of the decoder: what the tap sees, and the moments of a set of slices, against plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from samda.features import FeatureTap, feature_statistics, moments
from samda.networks.segmenter import SamSegmenter


@pytest.fixture
def network(make_segmenter: Callable[..., SamSegmenter]) -> SamSegmenter:
    return make_segmenter(adapters={"sam_da": {}})


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(count))


def test_moments_are_those_of_numpy() -> None:
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    mean, std = moments(values)
    flat = values.numpy().reshape(15, 7)
    np.testing.assert_allclose(mean, flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(std, flat.std(0), atol=1e-6)


def test_a_constant_channel_has_the_least_deviation() -> None:
    assert moments(torch.ones(4, 2))[1].tolist() == pytest.approx([1e-6, 1e-6])


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


def test_statistics_are_the_moments_over_all_slices_whatever_the_batch(network: SamSegmenter) -> None:
    pictures = images(5)
    items = [{"image": image} for image in pictures]
    found = feature_statistics(network, items, [0, 2, 4], batch_size=2)
    with torch.no_grad(), FeatureTap(network) as tap:
        network.decode(network.encode(pictures[[0, 2, 4]]))
        for layer, kept in zip(found, tap.features, strict=True):
            values = kept[0].reshape(-1, 256).double().numpy()
            np.testing.assert_allclose(layer["mean"], values.mean(0), atol=1e-4 * values.std())
            np.testing.assert_allclose(layer["std"], values.std(0), rtol=1e-4)


def test_embeddings_give_the_same_as_images(network: SamSegmenter) -> None:
    pictures = images(3)
    with torch.no_grad():
        embedded = [{"embedding": e} for e in network.encode(pictures)]
    a, b = (feature_statistics(network, x, range(3)) for x in ([{"image": i} for i in pictures], embedded))
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one["mean"], other["mean"], atol=1e-4)


def test_many_slices_are_thinned_evenly(network: SamSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samda.features.MOST", 2)
    items = [{"image": image} for image in images(5)]
    assert feature_statistics(network, items, range(5)) == feature_statistics(network, items, [0, 3])
