# SPDX-License-Identifier: Apache-2.0
"""Slices chosen without labels, windows of large bodies, and embeddings that are computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samda.adaptation import case
from samda.adaptation.case import EmbeddingReplay, choose_slices, cut_windows, slice_areas


def test_few_slices_are_all_taken() -> None:
    assert choose_slices(np.zeros((2, 5)), np.zeros(5), 5) == [0, 1, 2, 3, 4]
    assert choose_slices(np.zeros((2, 5)), np.zeros(5), 8) == [0, 1, 2, 3, 4]


def test_a_blind_model_still_sees_the_whole_scan() -> None:
    """Nothing predicted: half of the slices lie evenly, the others where the doubt is."""
    doubt = np.zeros(80)
    doubt[60:64] = [1, 4, 3, 2]
    chosen = choose_slices(np.zeros((3, 80)), doubt, 8)
    assert {10, 30, 50, 70} <= set(chosen) and len(chosen) == 8
    assert 61 in chosen and 62 not in chosen  # a neighbor of 61 shows the same


def test_every_class_is_shown_at_its_largest() -> None:
    areas = np.zeros((2, 100))
    areas[0, 40:61] = 1000 - 10 * np.abs(np.arange(40, 61) - 52)
    areas[1, 70:81] = 30 - np.abs(np.arange(70, 81) - 74)
    chosen = choose_slices(areas, np.zeros(100), 8)
    assert 52 in chosen and 74 in chosen and len(chosen) == 8 and chosen == sorted(chosen)


def test_the_choice_is_deterministic_and_without_repetition() -> None:
    rng = np.random.default_rng(0)
    areas, doubt = rng.random((6, 112)).round(1), rng.random(112).round(1)
    first = choose_slices(areas, doubt, 12)
    assert first == choose_slices(areas, doubt, 12) and len(set(first)) == 12


def test_areas_per_slice() -> None:
    labels = np.zeros((2, 3, 4), np.uint8)
    labels[:, :, 1], labels[0, 0, 3] = 1, 2
    assert slice_areas(labels, 3, axis=2).tolist() == [[0, 6, 0, 0], [0, 0, 0, 1]]
    assert slice_areas(labels, 3, axis=0).tolist() == [[3, 3], [1, 0]]


def test_windows_follow_the_foreground() -> None:
    images = torch.arange(2 * 8 * 12).view(2, 1, 8, 12).float()
    labels = torch.zeros(2, 8, 12, dtype=torch.uint8)
    labels[0, 3:5, 9:11] = 1  # centroid (3.5, 9.5): the window wants to start at (-.5, 5.5) and may at (0, 4) most
    windows = cut_windows(images, labels, 8)
    assert torch.equal(windows[0], images[0, :, :, 4:12])
    assert torch.equal(windows[1], images[1, :, :, 2:10])  # nothing predicted: the middle
    assert cut_windows(images[..., :8], labels[..., :8], 8).data_ptr() == images.data_ptr()


class Counter(torch.nn.Module):
    """A network that counts what is encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.encoded = 0

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.encoded += len(images)
        return {"embedding": images * 2}

    def forward(self, pyramid: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.gain * pyramid["embedding"]


def passes(memory_mb: float | None) -> tuple[int, list[torch.Tensor]]:
    network, batches = Counter(), [torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)]
    replay, results = EmbeddingReplay(network, memory_mb), []
    for _ in range(3):
        replay.rewind()
        results.append(torch.cat([replay(batch) for batch in batches]))
    return network.encoded, results


def test_embeddings_are_computed_once() -> None:
    encoded, results = passes(memory_mb=1)
    assert encoded == 4
    assert all(torch.equal(results[0], r) for r in results)


def test_beyond_the_memory_they_lie_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory_mb in (0.0, 2 * 16 * 4 / 1e6):  # the first batch fits
        encoded, results = passes(memory_mb)
        assert encoded == 4 and all(torch.equal(results[0], r) for r in results)
    encoded, results = passes(None)
    assert encoded == 12 and all(torch.equal(results[0], r) for r in results)
    monkeypatch.setattr(case, "LEAST_FREE", 1 << 62)  # no disk has this room
    encoded, results = passes(2 * 16 * 4 / 1e6)
    assert encoded == 4 + 2 * 2 and all(torch.equal(results[0], r) for r in results)
