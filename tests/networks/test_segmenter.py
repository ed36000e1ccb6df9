# SPDX-License-Identifier: Apache-2.0
"""The segmenter: its logits step by step, its class head, its modes, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from segment_anything.modeling import Sam

from samda.adapters import count_parameters
from samda.errors import UsageError
from samda.models.sam_file import to_segment_anything
from samda.networks import recompute
from samda.networks.backbones import ViTConfig
from samda.networks.segmenter import SamSegmenter

KINDS = ["vit", "tiny_vit"]


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@torch.no_grad()
def test_logits_step_by_step(
    tiny_segmenter: SamSegmenter, tiny_vit_config: ViTConfig, tiny_weights: Path, size: tuple[int, int]
) -> None:
    image = random_images(2, 1, *size)
    sam: Sam = to_segment_anything(tiny_vit_config, tiny_weights)
    normalized = (image * 255 - sam.pixel_mean) / sam.pixel_std  # broadcasts to three channels
    embedding = sam.image_encoder(normalized)
    positions = sam.prompt_encoder.pe_layer((size[0] // 16, size[1] // 16))[None]
    source = embedding + sam.prompt_encoder.no_mask_embed.weight[0][:, None, None]
    decoder = sam.mask_decoder
    tokens = decoder.mask_tokens.weight[:1].expand(2, 3, -1)  # three classes, each SAM's first mask token
    tokens, keys = decoder.transformer(source, positions.expand(2, -1, -1, -1), tokens)
    features = decoder.output_upscaling(keys.transpose(1, 2).reshape(embedding.shape))
    low = torch.einsum("bkc,bchw->bkhw", decoder.output_hypernetworks_mlps[0](tokens), features)
    expected = F.interpolate(low, size, mode="bilinear", align_corners=False)

    torch.testing.assert_close(tiny_segmenter.encode(image)["embedding"], embedding, rtol=1e-4, atol=1e-4)
    found = tiny_segmenter(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(found, tiny_segmenter(tiny_segmenter.encode(image)))
    assert torch.equal(
        F.interpolate(tiny_segmenter.decode(tiny_segmenter.encode(image)), scale_factor=4, mode="bilinear"), found
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(make_segmenter: Callable[..., SamSegmenter], kind: str) -> None:
    network = make_segmenter(kind).double()
    images = random_images(3, 1, 64, 48).double()
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=0, atol=1e-10)


@torch.no_grad()
def test_of_two_channels_the_third_is_the_mean(make_segmenter: Callable[..., SamSegmenter]) -> None:
    image = torch.rand(2, 2, 64, 64)
    three = torch.stack([image[:, 0], image[:, 1], (image[:, 0] + image[:, 1]) / 2], dim=1)
    torch.testing.assert_close(make_segmenter(in_channels=2)(image), make_segmenter(in_channels=3)(three))


def test_one_channel_is_the_same_as_three_equal_ones(make_segmenter: Callable[..., SamSegmenter]) -> None:
    image = random_images(1, 1, 64, 64)
    assert torch.equal(make_segmenter()(image), make_segmenter(in_channels=3)(image.repeat(1, 3, 1, 1)))


@torch.no_grad()
def test_single_precision_leaves_autocast(tiny_segmenter: SamSegmenter) -> None:
    image = random_images(1, 1, 64, 64)
    expected = tiny_segmenter(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny_segmenter(image)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_monai_tensors_come_out_as_plain_tensors(tiny_segmenter: SamSegmenter) -> None:
    image = random_images(1, 1, 64, 64)
    found = tiny_segmenter(MetaTensor(image))
    assert type(found) is torch.Tensor
    assert torch.equal(found, tiny_segmenter(image))


def test_a_stack_is_its_images(tiny_segmenter: SamSegmenter) -> None:
    stack = torch.rand(2, 1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = tiny_segmenter(stack)
        assert logits.shape == (2, 3, 32, 48, 3)
        for i in range(3):
            assert torch.equal(logits[..., i], tiny_segmenter(stack[..., i]))


def test_class_head_is_counted_apart(make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = make_segmenter(num_classes=5, adapters={"lora": {"rank": 2}})
    own = dict(network.named_parameters())
    assert set(network.head_params()) <= set(own)
    assert count_parameters(network)["head"] == 5 * (256 + 139_808)
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    assert trained == set(network.head_params()) | {name for name in own if ".adapters.lora." in name}


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_neither_base_nor_statistics(make_segmenter: Callable[..., SamSegmenter], kind: str) -> None:
    network = make_segmenter(kind, adapters={"lka": {}, "sam_da": {}}).train()
    trained = set(network.state_dict())
    network.full_state_dict = True
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(random_images(2, 1, 64, 64)).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= trained
    assert moved >= set(network.head_params())


@pytest.mark.parametrize("kind", KINDS)
def test_computing_again_keeps_less_and_changes_no_gradient(
    make_segmenter: Callable[..., SamSegmenter], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = random_images(2, 1, 64, 64)
    gradients, kept = {}, {}
    for choice in ("nothing", "large blocks", "all"):
        network = make_segmenter(kind, adapters={"lka": {}, "lora": {}, "sam_da": {}}).train()
        monkeypatch.setattr(recompute, "LARGE", 0 if choice == "large blocks" else 2**30)
        network.image_encoder.checkpointing = choice == "all"
        sizes: list[int] = []
        weights = {p.data_ptr() for p in network.parameters()}  # there anyway

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes, weights: set[int] = weights) -> torch.Tensor:
            sizes.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pyramid = network.encode(image)
        kept[choice] = sum(sizes)
        network(pyramid).square().mean().backward()
        gradients[choice] = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert kept["all"] < 0.5 * kept["nothing"]
    if kind == "vit":  # the other encoder has nothing worth it
        assert kept["all"] < kept["large blocks"] < 0.75 * kept["nothing"]
    for name, gradient in gradients["nothing"].items():
        assert torch.equal(gradients["all"][name], gradient), name
        assert torch.equal(gradients["large blocks"][name], gradient), name


@pytest.mark.parametrize("adapter", ["lka", "full"])
def test_train_leaves_the_base_in_evaluation(make_segmenter: Callable[..., SamSegmenter], adapter: str) -> None:
    network = make_segmenter("tiny_vit", adapters={adapter: {}}).train()
    training = {name for name, module in network.named_modules() if module.training}
    assert network.training and "mask_decoder.mask_tokens" in training
    outside = {name for name in training if name and ".adapters" not in name}
    assert all(name.startswith(("mask_decoder.mask_tokens", "mask_decoder.output_hyper")) for name in outside)
    assert any(name.endswith(".adapters.lka") for name in training) == (adapter == "lka")
    assert not any(module.training for module in network.eval().modules())


@pytest.mark.parametrize(
    ("adapters", "adapted"),
    [({}, False), ({"sam_da": {}}, False), ({"decoder": {}}, False), ({"head": {}}, False)]
    + [({name: {}}, True) for name in ("lora", "salt", "lka", "dka", "bottleneck", "norm", "full")],
)
def test_knows_whether_embeddings_can_be_kept(
    make_segmenter: Callable[..., SamSegmenter], adapters: dict, adapted: bool
) -> None:
    assert make_segmenter(adapters=adapters).encoder_adapted is adapted


def test_loading_weights_draws_no_random_number(make_segmenter: Callable[..., SamSegmenter]) -> None:
    state = torch.get_rng_state()
    make_segmenter(adapters={"lora": {}, "sam_da": {}})
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_copies_answer_alike(make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = make_segmenter("tiny_vit", adapters={"lora": {}})
    image = random_images(1, 1, 64, 64)
    expected = network(image)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(image), expected)
        assert twin.state_dict().keys() == network.state_dict().keys()
        twin.load_state_dict(network.state_dict())


def test_without_memory_for_counting() -> None:
    with torch.device("meta"):
        network = SamSegmenter("vit_b", num_classes=2, weights=None, adapters={"lora": {"rank": 4}})
    counts = count_parameters(network)
    # SAM less its quality token and head (256 -> 256 -> 256 -> 4), four mask tokens and four hypernetworks
    replaced = 256 + 2 * (256 * 256 + 256) + (256 * 4 + 4) + 4 * (256 + 139_808)
    assert counts["base"] == 93_735_472 - replaced
    assert counts["head"] == 2 * (256 + 139_808)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2 .* got 1"),
        ({"num_classes": "3"}, "num_classes must be at least 2 .* got '3'"),
        ({"in_channels": 4}, "in_channels must be 1, 2 or 3, got 4"),
        ({"backbone": "vit_x"}, "unknown backbone 'vit_x'"),
        ({"adapters": {"lorra": {}}}, "lorra"),
    ],
)
def test_wrong_arguments_are_refused(tiny_vit_config: ViTConfig, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamSegmenter(**({"backbone": tiny_vit_config, "weights": None} | arguments))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 64, 64), r"images must be \(B, 1, H, W\), got \(1, 3, 64, 64\)"),
        ((1, 64, 64), r"images must be \(B, 1, H, W\)"),
        ((1, 1, 64, 40), r"multiples of 16, got \(64, 40\)"),
    ],
)
def test_wrong_images_are_refused(tiny_segmenter: SamSegmenter, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_segmenter(torch.zeros(shape))
