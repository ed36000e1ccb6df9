# SPDX-License-Identifier: Apache-2.0
"""Feature pyramids of the encoders, and the head that reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from timm.models.tiny_vit import TinyVit

from samda.adapters import attach, count_parameters, trainable_parameters
from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.embeddings import EmbeddingDataset, labeled_batches
from samda.errors import AdapterError, InputError, UsageError
from samda.models import load_model, save_model
from samda.networks.backbones import BACKBONES, TinyViTConfig
from samda.networks.closed_form import RidgeStatistics
from samda.networks.pyramid_head import SCORE_SCALE, PyramidHead
from samda.networks.segmenter import SamSegmenter
from samda.networks.tiny_vit import TinyViT
from samda.networks.weights import read_state
from samda.task import Task

Make = Callable[..., SamSegmenter]
TASK = Task("t", classes=("background", "a", "b"), image_size=64)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def labels(count: int, size: int = 64) -> torch.Tensor:
    """(count, 1, size, size): two blocks that move from slice to slice."""
    maps = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    for i in range(count):
        maps[i, :, 8 + 2 * i : 24 + 2 * i, 8:30] = 1
        maps[i, :, 40:56, 30 + i : 50 + i] = 2
    return maps


def counts(maps: torch.Tensor) -> torch.Tensor:
    return torch.bincount(maps.flatten().long(), minlength=3)


@torch.no_grad()
def moved(network: SamSegmenter) -> SamSegmenter:
    """Everything that is trained moved by a visible amount."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(network).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


# --------------------------------------------------------------------------------------------- levels of the encoders


@torch.no_grad()
def test_levels_of_tiny_vit_are_outputs_of_timms_stages() -> None:
    """At a size that whole windows fill, where timm's blocks do the same."""
    config = TinyViTConfig("t", (8, 16, 24, 32), (1, 1, 2, 1), (1, 2, 3, 4), (2, 2, 2, 2), image_size=64)
    sizes = {"embed_dims": config.dims, "depths": config.depths, "num_heads": config.num_heads}
    original = TinyVit(num_classes=0, window_sizes=config.windows, drop_path_rate=0.0, **sizes).eval()
    ours = TinyViT(**config.sizes()).eval()
    state = {}
    for name, tensor in original.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["stages", "0"]:
            name = ".".join(["conv_blocks", *parts[3:]])
        elif parts[0] == "stages":
            name = ".".join(["stages", str(int(parts[1]) - 1), *parts[2:]])
        state[name] = tensor
    missing = ours.load_state_dict(state, strict=False).missing_keys
    assert all(name.startswith("neck.") for name in missing)
    original.stages[3].downsample.conv2.conv.stride = (1, 1)  # as in MobileSAM
    image = images(2, 3, 64, 64)
    found = ours.pyramid(image, ("4", "8", "16", "embedding"))
    x = original.patch_embed(image)
    for level, stage in zip(("4", "8", "16", None), original.stages, strict=True):
        x = stage(x)
        if level is not None:
            torch.testing.assert_close(found[level], x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    torch.testing.assert_close(found["embedding"], ours.neck(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@torch.no_grad()
def test_levels_have_the_sizes_that_the_backbone_states(make_segmenter: Make, kind: str) -> None:
    network = make_segmenter(kind)
    levels = network.config.levels()
    found = network.image_encoder.pyramid(images(2, 3, 48, 80), levels)
    for name, (channels, stride) in levels.items():
        assert found[name].shape == (2, channels, 48 // stride, 80 // stride)
    assert torch.equal(found["embedding"], network.image_encoder(images(2, 3, 48, 80)))
    assert set(network.config.head_levels) <= set(levels)


def test_a_vit_is_read_at_its_first_global_blocks() -> None:
    for name, config in BACKBONES.items():
        if name != "vit_t":
            early, middle, _ = config.head_levels
            assert [early, middle] == [f"block_{index}" for index in config.global_blocks[:2]]


@torch.no_grad()
def test_adapters_of_the_encoder_change_the_levels_behind_them(make_segmenter: Make) -> None:
    plain, adapted = (make_segmenter("tiny_vit", head="pyramid", adapters=a) for a in (None, {"lora": {}}))
    image = images(1, 1, 64, 64)
    before, same = plain.encode(image), adapted.encode(image)
    assert all(torch.allclose(before[name], same[name], atol=1e-5) for name in before)
    after = moved(adapted).encode(image)
    assert torch.equal(after["4"], before["4"])  # the first stage has no transformer block
    assert not torch.allclose(after["8"], before["8"], atol=1e-3)


# -------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@pytest.mark.parametrize("stride", [2, 4])
def test_shapes_and_gradients(make_segmenter: Make, kind: str, stride: int) -> None:
    network = moved(make_segmenter(kind, head={"type": "pyramid", "stride": stride}, in_channels=2)).train()
    image = images(2, 2, 48, 80)
    pyramid = network.encode(image)
    assert tuple(pyramid) == network.levels
    assert set(network.levels) == {"image", *network.config.head_levels}
    logits = network.decode(pyramid)
    assert logits.shape == (2, 3, 48 // stride, 80 // stride) and network(pyramid).shape == (2, 3, 48, 80)
    assert torch.equal(network(image), network(pyramid))
    network(image).square().mean().backward()
    assert all(bool(p.grad.any()) for p in network.head.parameters())
    assert network.mask_decoder is None and network.prompt_encoder is None


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(make_segmenter: Make) -> None:
    network = moved(make_segmenter("tiny_vit", head="pyramid")).double()
    stack = images(3, 1, 64, 48).double()
    torch.testing.assert_close(network(stack)[1:2], network(stack[1:2]), rtol=0, atol=1e-10)


@torch.no_grad()
def test_single_precision_leaves_autocast(make_segmenter: Make) -> None:
    network, image = moved(make_segmenter("tiny_vit", head="pyramid")), images(1, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(image)
    assert found.dtype == torch.float32
    assert (found - network(image)).norm() < 0.05 * network(image).norm()


def test_a_missing_level_is_named(make_segmenter: Make) -> None:
    network = make_segmenter("tiny_vit", head="pyramid")
    pyramid = network.encode(images(1, 1, 64, 64))
    del pyramid["8"]
    with pytest.raises(UsageError, match="lacks the level '8'"):
        network(pyramid)


@pytest.mark.parametrize("adapters", [{"sam_da": {}}, {"decoder": {}}, {"norm": {"where": "both"}}, {"full": {}}])
def test_the_decoder_is_read_where_something_in_it_is_trained(make_segmenter: Make, adapters: dict[str, Any]) -> None:
    network = moved(make_segmenter("tiny_vit", head="pyramid", adapters=adapters)).train()
    assert network.head_config.decoder and "upscaled" in network.head.reads
    network(images(1, 1, 64, 64)).square().mean().backward()
    inside = {name: p for name, p in trainable_parameters(network).items() if name.startswith("mask_decoder.")}
    assert any(p.grad is not None and bool(p.grad.any()) for p in inside.values())


def test_without_it_there_is_no_decoder_to_adapt(make_segmenter: Make) -> None:
    network = make_segmenter("tiny_vit", head="pyramid", adapters={"lora": {}, "head": {}})
    assert network.mask_decoder is None
    with pytest.raises(AdapterError, match="'sam_da' finds none of its sites"):
        attach(network, ["sam_da"])
    kept = make_segmenter("tiny_vit", head={"type": "pyramid", "decoder": True})
    attach(kept, ["sam_da"])
    assert kept.mask_decoder is not None


def test_the_head_is_counted_saved_and_trained_by_its_own_parameters(make_segmenter: Make) -> None:
    network = make_segmenter("tiny_vit", head="pyramid", adapters={"lora": {"rank": 2}})
    size = sum(p.numel() for p in network.head.parameters())
    assert count_parameters(network)["head"] == size
    buffers = {f"class_head.{name}" for name, _ in network.head.named_buffers()}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert buffers and set(network.state_dict()) == trained | buffers | {"_extra_state"}  # the answer of the base
    assert {name for name in trained if ".adapters." not in name} == set(network.head_params())


def test_parameters_of_the_default_head() -> None:
    with torch.device("meta"):
        network = SamSegmenter("vit_t", num_classes=3, weights=None, head="pyramid")
    assert count_parameters(network)["head"] == sum(p.numel() for p in network.head.parameters()) < 250_000


def test_building_draws_no_random_number_and_is_reproducible(make_segmenter: Make) -> None:
    state = torch.get_rng_state()
    first, second = (make_segmenter(head="pyramid") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.head.parameters(), second.head.parameters(), strict=True))


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("pyramids", "'pyramids'; did you mean 'pyramid'"),
        (None, "None"),
        ({"type": "fpn"}, "'fpn'"),
        ({"widths": [8]}, "'none'"),
        ({"type": "pyramid", "levels": ["4", "9", "embedding"]}, "level '9'"),
        ({"type": "pyramid", "levels": ["4", "embedding"]}, "three names"),
        ({"type": "pyramid", "stride": 3}, "stride must be 2 or 4, got 3"),
        ({"type": "pyramid", "widths": [96, 64, 48, 12]}, "multiples of 8"),
        ({"type": "pyramid", "width": 4}, "'width'"),
        ({"type": "sam", "stride": 4}, "'stride'"),
    ],
)
def test_refusals(tiny_tinyvit_config: TinyViTConfig, head: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        SamSegmenter(tiny_tinyvit_config, 3, weights=None, head=head)


class Slices:
    """Four labeled slices."""

    foreground = torch.ones(4, dtype=torch.bool)
    late = torch.zeros(4, dtype=torch.bool)

    def __len__(self) -> int:
        return 4

    def signature(self) -> list[int]:
        return [4]

    def view(self, index: int, view: int) -> dict[str, Any]:
        return {"image": images(4, 1, 64, 64)[index], "label": labels(4)[index]}


@pytest.mark.parametrize("memory_mb", [100, 0])
@torch.no_grad()
def test_kept_levels_give_the_logits_of_the_images(make_segmenter: Make, memory_mb: float) -> None:
    network = make_segmenter("tiny_vit", head="pyramid", adapters={"sam_da": {}})
    network.fit_closed_form([(images(4, 1, 64, 64), labels(4))], counts(labels(4)))
    network = moved(network)
    kept = EmbeddingDataset(Slices(), network, batch_size=3, memory_mb=memory_mb)
    ((pyramid, found),) = labeled_batches(kept, range(4))
    assert isinstance(pyramid, dict) and set(pyramid) == set(network.levels)
    assert {level.dtype for level in pyramid.values()} == {torch.float16} and torch.equal(found, labels(4))
    expected = network(images(4, 1, 64, 64))
    assert (network(pyramid) - expected).norm() <= 16 * torch.finfo(torch.float16).eps * expected.norm()


def test_levels_that_fit_nowhere_are_refused(make_segmenter: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="do not fit into memory_mb=0 nor on the disk"):
        EmbeddingDataset(Slices(), make_segmenter("tiny_vit", head="pyramid"), memory_mb=0)


# ------------------------------------------------------------------------------------------------------- closed form


def test_the_closed_form_is_numpys_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [3 + 5 * torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3)]
    maps = [labels(2, 64)[:, 0, ::2, ::2] for _ in features]
    class_counts = counts(torch.cat(maps))
    statistics = RidgeStatistics(class_counts, background_share=1.0, ridge=0.1)
    for values, own in zip(features, maps, strict=True):
        statistics.add(values, own)
    found = statistics.solve()

    x = torch.cat(features).permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    blocks = torch.cat(maps).reshape(-1, 8, 4, 8, 4)
    y = np.stack([(blocks == k).double().mean((2, 4)).reshape(-1).numpy() for k in range(3)], 1)
    weight = y @ np.sqrt(class_counts[0] / class_counts).numpy()
    mean, std = x.mean(0), x.std(0)
    u = np.concatenate([(x - mean) / std, np.ones((len(x), 1))], 1)
    ridge = 0.1 * weight.sum() * np.diag([1.0] * 4 + [0.0])
    expected = np.linalg.solve((u * weight[:, None]).T @ u + ridge, (u * weight[:, None]).T @ y)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(found.std, std, rtol=1e-4)
    np.testing.assert_allclose(found.weight, expected[:4], atol=1e-4)
    np.testing.assert_allclose(found.bias, expected[4], atol=1e-4)


@torch.no_grad()
def test_the_head_begins_at_the_solution(make_segmenter: Make) -> None:
    network, stack, maps = make_segmenter("tiny_vit", head="pyramid"), images(4, 1, 64, 64), labels(4)
    assert not network.head_trained
    network.fit_closed_form([(stack, maps)], counts(maps))
    assert network.head_trained
    head = network.head
    assert isinstance(head, PyramidHead)
    statistics = RidgeStatistics(counts(maps))
    pyramid = network.encode(stack)
    resized = [nn.functional.interpolate(pyramid[name], (16, 16), mode="bilinear") for name in head.levels]
    features = torch.cat(resized, 1)
    statistics.add(features, maps[:, 0])
    solution = statistics.solve()
    standard = ((features - solution.mean.view(1, -1, 1, 1)) / solution.std.view(1, -1, 1, 1)).clamp(-8, 8)
    scores = torch.einsum("bchw,ck->bkhw", standard, solution.weight) + solution.bias.view(1, -1, 1, 1)
    expected = SCORE_SCALE * nn.functional.interpolate(scores, (32, 32), mode="bilinear")
    # the head clips before it enlarges a level, so values near the clipping differ; there are few
    found = network.decode(pyramid)
    assert (found - expected).abs().median() < 1e-4
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.99
    head.linear_gain.zero_()
    assert not network.decode(pyramid).any()  # the stages give zero


@pytest.mark.parametrize("inputs", ["images", "pyramids"])
def test_batches_may_be_images_or_pyramids_of_any_size(make_segmenter: Make, inputs: str) -> None:
    stack, maps = images(4, 1, 64, 64), labels(4)
    networks = [make_segmenter("tiny_vit", head="pyramid") for _ in range(2)]
    given = stack if inputs == "images" else {k: v.detach() for k, v in networks[0].encode(stack).items()}
    networks[0].fit_closed_form([(given, maps)], counts(maps))
    networks[1].fit_closed_form([(stack[:3], maps[:3]), (stack[3:], maps[3:])], counts(maps))
    first, second = (network(stack) for network in networks)
    assert torch.allclose(first, second, atol=1e-2 * float(first.abs().max()))


def test_a_start_needs_foreground_and_slices(make_segmenter: Make) -> None:
    network, stack = make_segmenter("tiny_vit", head="pyramid"), images(1, 1, 64, 64)
    empty = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    with pytest.raises(InputError, match="needs foreground"):
        network.fit_closed_form([(stack, empty)], counts(empty))
    with pytest.raises(InputError, match="no slices"):
        network.fit_closed_form([], counts(labels(1)))
    assert not network.head_trained
    with pytest.raises(UsageError, match="'sam' has no closed-form start"):
        make_segmenter().fit_closed_form([(stack, labels(1))], counts(labels(1)))


# ------------------------------------------------------------------------------------------------------ model folders


@pytest.mark.parametrize("head", ["sam", "pyramid", {"type": "pyramid", "widths": [16, 16, 8, 8], "stride": 4}])
@pytest.mark.parametrize("adapters", [{}, {"sam_da": {}, "lora": {}}])
def test_a_folder_brings_the_head_back(
    make_segmenter: Make, tiny_tinyvit_weights: Path, tmp_path: Path, head: Any, adapters: dict[str, Any]
) -> None:
    network = moved(make_segmenter("tiny_vit", head=head, adapters=adapters))
    if network.head.name == "pyramid":
        network.fit_closed_form([(images(4, 1, 64, 64), labels(4))], counts(labels(4)))
    save_model(network, tmp_path / "model", TASK)
    loaded = load_model(tmp_path / "model", tiny_tinyvit_weights)[0]
    image = images(2, 1, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(image), network(image))
    assert loaded.head_config == network.head_config


def test_a_folder_may_bring_the_base_of_a_network_without_decoder(make_segmenter: Make, tmp_path: Path) -> None:
    network = moved(make_segmenter("tiny_vit", head="pyramid", adapters={"lora": {}}))
    save_model(network, tmp_path / "with_base", TASK, with_base=True)
    assert read_state(tmp_path / "with_base" / "base.safetensors")
    fresh = moved(make_segmenter("tiny_vit", head="pyramid", weights=None))
    save_model(fresh, tmp_path / "own_base", TASK)
    image = images(1, 1, 64, 64)
    with torch.no_grad():
        for folder, expected in (("with_base", network), ("own_base", fresh)):
            assert torch.equal(load_model(tmp_path / folder)[0](image), expected(image))


def test_partial_labels_give_each_class_the_pixels_that_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3)]
    maps = [labels(2, 64)[:, 0, ::4, ::4] for _ in features]
    table = PartialLabels(("background", "a", "b"), sets=((2,),)).possible()
    lacking = torch.where(maps[1] == 2, 0, maps[1])  # its background may be b
    given = [maps[0], torch.where(lacking == 0, OPEN, lacking), torch.full_like(maps[2], IGNORED)]
    class_counts = counts(torch.cat([maps[0], lacking]))
    solutions = []
    for own, possible in (([maps[0], lacking], None), (given, table)):
        statistics = RidgeStatistics(class_counts, background_share=1.0, possible=possible)
        for values, one in zip(features, own, strict=False):
            statistics.add(values, one)
        statistics.total, statistics.square, statistics.pixels = torch.zeros(4), torch.ones(4), 1  # of one frame
        solutions.append(statistics.solve())
    both, partial = solutions
    torch.testing.assert_close(partial.weight[:, 1], both.weight[:, 1])  # a is known in both
    x = torch.cat(features[:2]).permute(0, 2, 3, 1).flatten(0, 2).double()
    cells = torch.cat([maps[0], lacking]).reshape(-1, 8, 2, 8, 2).permute(0, 1, 3, 2, 4).reshape(len(x), 4)
    told = torch.arange(len(x)) < len(x) // 2  # b is known in the first, and where the second shows a alone
    told |= (cells == 1).all(1)
    first = features[0].permute(0, 2, 3, 1).flatten(0, 2)
    z = torch.cat([(x - first.mean(0)) / first.std(0), torch.ones(len(x), 1)], 1)[told]
    y = torch.stack([(cells == k).double().mean(1) for k in range(3)], 1)[told]
    w = (y @ (class_counts[0] / class_counts).sqrt().double())[:, None]
    gram = (z * w).T @ z + 1e-2 * w.sum() * torch.diag(torch.tensor([1.0, 1, 1, 1, 0]))
    expected = torch.linalg.solve(gram, (z * w).T @ y[:, 2])
    torch.testing.assert_close(partial.weight[:, 2].double(), expected[:4], rtol=1e-4, atol=1e-5)
    assert float(partial.bias[2]) == pytest.approx(float(expected[4]), abs=1e-5)
    torch.testing.assert_close(partial.weight.sum(1), torch.zeros(4), rtol=0, atol=1e-5)
    assert float(partial.bias.sum()) == pytest.approx(1)
