# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from monai.losses import DiceCELoss

from samda.embeddings import EmbeddingDataset, allocate, draw, labeled_batches
from samda.errors import InputError, UsageError
from samda.networks.backbones import ViTConfig
from samda.networks.segmenter import SamSegmenter

HALF_EPS = torch.finfo(torch.float16).eps  # pyramids are kept in half precision


class Slices:
    """Seven slices; view v adds v to the image and moves the label."""

    late = torch.zeros(7, dtype=torch.bool)

    def __len__(self) -> int:
        return 7

    def view(self, index: int, view: int) -> dict[str, Any]:
        image = torch.full((1, 32, 32), float(index)) + view
        return {"image": image, "label": torch.full((1, 32, 32), view, dtype=torch.uint8), "case": index // 3}


class Pool(nn.Module):
    """An "encoder" whose embedding is the mean of the image."""

    encoder_adapted = False

    def encode(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": image.mean((2, 3), keepdim=True).expand(-1, 4, 2, 2)}


def test_the_room_on_disk_is_reserved_at_once(tmp_path: Path) -> None:
    """A mapped file that grows on a full disk ends the process; here, the limit of file sizes stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"0\.0 GB do not fit into memory_mb=0.*set TMPDIR to a larger disk"):
            allocate((2000,), torch.uint8, memory_mb=0, folder=tmp_path)
        assert allocate((1000,), torch.uint8, memory_mb=0, folder=tmp_path).shape == (1000,)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_view_zero_is_the_slice_itself() -> None:
    dataset = EmbeddingDataset(Slices(), Pool(), views=3, batch_size=4)
    for index in range(len(dataset)):
        item = dataset[index]
        assert torch.equal(item["pyramid"]["embedding"], torch.full((4, 2, 2), float(index)).half())
        assert item["label"].unique().tolist() == [0]
        assert item["case"] == index // 3


def test_an_epoch_draws_the_embedding_and_the_label_of_one_view() -> None:
    dataset = EmbeddingDataset(Slices(), Pool(), views=3, seed=5, batch_size=4)
    for epoch in range(1, 7):
        for index in range(len(dataset)):
            item = dataset[epoch, index]
            view = int(item["label"][0, 0, 0])
            assert torch.equal(item["pyramid"]["embedding"], torch.full((4, 2, 2), float(index + view)).half())


def test_every_view_comes_once_in_as_many_epochs_and_slices_start_apart() -> None:
    dataset = EmbeddingDataset(Slices(), Pool(), views=4)
    order = [[dataset.choose(epoch, index) for epoch in range(1, 5)] for index in range(7)]
    assert all(sorted(views) == [0, 1, 2, 3] for views in order)
    assert len({views[0] for views in order}) > 1


def test_the_choice_follows_from_the_seed() -> None:
    def choices(seed: int) -> list[int]:
        dataset = EmbeddingDataset(Slices(), Pool(), views=5, seed=seed)
        return [dataset.choose(epoch, index) for epoch in (1, 2) for index in range(7)]

    assert choices(1) == choices(1) != choices(2)


def test_beyond_the_budget_it_lies_on_disk_and_holds_the_same() -> None:
    memory, disk = (EmbeddingDataset(Slices(), Pool(), views=2, memory_mb=mb) for mb in (1, 0))
    assert [memory.cost["on_disk"], disk.cost["on_disk"]] == [False, True]
    for slot in (0, 1):
        assert torch.equal(memory.pyramids[slot]["embedding"], disk.pyramids[slot]["embedding"])
    assert torch.equal(memory[1, 3]["label"], disk[1, 3]["label"])


def test_the_cost_is_reported() -> None:
    cost = EmbeddingDataset(Slices(), Pool(), views=2).cost
    assert (cost["slices"], cost["views"]) == (7, 2)
    assert cost["megabytes"] == pytest.approx(7 * 2 * 16 * 2 / 1e6, abs=1e-3)
    assert cost["seconds"] >= 0


def test_allocate_maps_a_file_that_can_be_written() -> None:
    mapped = allocate((3, 4), torch.uint8, memory_mb=0)
    mapped[1] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert mapped[1].tolist() == [1, 2, 3, 4] and mapped.dtype == torch.uint8


def test_what_fits_nowhere_is_refused_before_it_is_written() -> None:
    with pytest.raises(InputError, match="GB do not fit into memory_mb=1 nor on the disk of"):
        allocate((10**6, 10**6, 10**3), torch.float32, memory_mb=1)


def test_draw_depends_on_all_parts_and_on_nothing_else() -> None:
    torch.manual_seed(0)
    first = draw(1, "view", 2)
    torch.manual_seed(1)
    assert draw(1, "view", 2) == first != draw(1, "view", 3)
    assert draw(12, 3) != draw(1, 23)


def test_adapters_in_the_encoder_are_refused() -> None:
    network = Pool()
    network.encoder_adapted = True
    with pytest.raises(UsageError, match="embeddings=False"):
        EmbeddingDataset(Slices(), network)
    with pytest.raises(UsageError, match="views must be at least 1"):
        EmbeddingDataset(Slices(), Pool(), views=0)


def test_training_on_embeddings_equals_encoding_in_every_step() -> None:
    torch.manual_seed(0)
    network = SamSegmenter(ViTConfig("tiny", 32, 2, 2, (1,), image_size=64), num_classes=3, weights=None)
    images, labels = torch.rand(3, 1, 64, 64), torch.randint(0, 3, (3, 1, 64, 64))

    class Random(Slices):
        def __len__(self) -> int:
            return 3

        def view(self, index: int, view: int) -> dict[str, Any]:
            return {"image": images[index], "label": labels[index].to(torch.uint8)}

    dataset = EmbeddingDataset(Random(), network, batch_size=2)
    ((pyramid, _),) = labeled_batches(dataset, range(3))
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)
    results = []
    for inputs in (images, pyramid):
        network.train().zero_grad()
        loss = loss_of(network(inputs), labels)
        loss.backward()
        results.append((loss, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}))
    (loss, gradients), (again, cached) = results
    torch.testing.assert_close(loss, again, rtol=HALF_EPS, atol=HALF_EPS)
    assert gradients.keys() == cached.keys() and gradients
    for name in gradients:
        difference = (gradients[name] - cached[name]).norm()
        assert difference <= 8 * HALF_EPS * gradients[name].norm() + 1e-7


def test_reduced_precision_where_the_processor_computes_it(
    make_segmenter: Callable[..., SamSegmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution, attention and norms in bfloat16 on any processor; one that only emulates it is spared."""
    network = make_segmenter("tiny_vit", head="pyramid")

    class Noise(Slices):
        def view(self, index: int, view: int) -> dict[str, Any]:
            image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(10 * index + view))
            return super().view(index, view) | {"image": image}

    found = {}
    for computed in (False, True):
        monkeypatch.setattr("samda.embeddings.computes_bf16", lambda device, computed=computed: computed)
        dataset = EmbeddingDataset(Noise(), network, views=2, amp=True, batch_size=4)
        assert dataset.cost["precision"] == ("bf16" if computed else "fp32")
        found[computed] = dataset.pyramids[1]
    for name, exact in found[False].items():
        difference = (found[True][name].float() - exact.float()).norm() / exact.float().norm()
        assert difference < 0.02 and (difference > 1e-4 or name == "image"), name
    assert torch.equal(found[True]["image"], found[False]["image"])


def test_a_view_takes_room_when_it_is_there() -> None:
    dataset = EmbeddingDataset(Slices(), Pool(), views=8, first=2)
    two = dataset.nbytes
    dataset.renew(len(dataset))
    assert dataset.nbytes == 1.5 * two
    assert EmbeddingDataset(Slices(), Pool(), views=8).nbytes == 4 * two


def test_slices_that_there_was_no_time_for_are_encoded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samda.embeddings.LEAST", 2 * Slices().view(0, 0)["label"].numel())  # pixels, not slices
    seen: list[int] = []
    dataset = EmbeddingDataset(
        Slices(), Pool(), views=3, batch_size=2, enough=lambda: True, collect=lambda p, y: seen.extend(y[:, 0, 0, 0])
    )
    assert len(seen) == 2 and (dataset.latest >= 0).sum() == 2
    for index in range(7):
        assert torch.equal(dataset[1, index]["pyramid"]["embedding"], torch.full((4, 2, 2), float(index)).half())
        assert dataset[index]["case"] == index // 3
    assert (dataset.latest == 0).all()
