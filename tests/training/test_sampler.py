# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from samda.errors import UsageError
from samda.training import SliceSampler

FOREGROUND = torch.tensor([True] * 8 + [False] * 20)


def indices(sampler: SliceSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    pairs = list(sampler)
    assert {e for e, _ in pairs} == {epoch}
    return [index for _, index in pairs]


@pytest.mark.parametrize(("share", "empty"), [(0.0, 0), (0.01, 1), (0.2, 2), (0.5, 8), (0.9, 20)])
def test_all_foreground_and_the_asked_share_of_empty_slices(share: float, empty: int) -> None:
    drawn = indices(SliceSampler(FOREGROUND, share), epoch=1)
    assert sorted(i for i in drawn if i < 8) == list(range(8))
    rest = [i for i in drawn if i >= 8]
    assert len(rest) == len(set(rest)) == empty


def test_late_slices_are_drawn_after_they_join() -> None:
    late = torch.zeros_like(FOREGROUND)
    late[[6, 7, 26, 27]] = True
    sampler = SliceSampler(FOREGROUND, 0.5, late=late)
    assert not set(indices(sampler, 1)) & {6, 7, 26, 27} and len(sampler) == 12
    sampler.join()
    assert set(indices(sampler, 1)) >= {6, 7} and len(sampler) == 16
    whole = indices(SliceSampler(FOREGROUND, 0.5), 1)
    assert indices(sampler, 1) == whole


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = SliceSampler(FOREGROUND, 0.3, seed=4), SliceSampler(FOREGROUND, 0.3, seed=4)
    torch.manual_seed(123)
    for epoch in (5, 2):
        indices(first, epoch)
    assert indices(first, 3) == indices(again, 3)
    assert indices(first, 3) != indices(first, 4)
    assert indices(first, 3) != indices(SliceSampler(FOREGROUND, 0.3, seed=5), 3)


def test_ranks_share_an_epoch() -> None:
    whole = indices(SliceSampler(FOREGROUND, 0.2, seed=1), 1)
    parts = [indices(SliceSampler(FOREGROUND, 0.2, seed=1, num_replicas=2, rank=rank), 1) for rank in (0, 1)]
    assert [index for pair in zip(*parts, strict=True) for index in pair] == whole


def test_a_share_outside_the_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"empty_share must lie in \[0, 1\), got 1"):
        SliceSampler(FOREGROUND, 1.0)
