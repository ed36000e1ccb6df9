# SPDX-License-Identifier: Apache-2.0
"""segment_anything with our encoders and files: loaded by its own modules, strictly, they give our numbers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from samda.adapters import trainable_parameters
from samda.errors import AdapterError, WeightsError
from samda.models.export import export_model
from samda.models.sam_file import to_segment_anything
from samda.networks.backbones import ViTConfig
from samda.networks.segmenter import SamSegmenter
from samda.networks.weights import read_state
from samda.task import Task

TASK = Task("t", classes=("background", "a", "b"), image_size=64)
ADAPTERS: dict[str, dict[str, Any]] = {
    "salt": {"salt": {"rank": 2}},
    "lora": {"lora": {"rank": 2}},
    "norm": {"norm": {"where": "both"}},
    "together": {"salt": {"rank": 2, "layers": ["attn.qkv"]}, "lora": {}, "norm": {"where": "encoder"}},
    "head": {"head": {}},
    "decoder": {"decoder": {}},
    "full": {"full": {}},
}


@torch.no_grad()
def trained(network: SamSegmenter, seed: int = 0) -> SamSegmenter:
    """The network with everything that is trained moved by a visible amount."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(network).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def preprocess(sam: Sam, image: torch.Tensor) -> torch.Tensor:
    """Gray values in [0, 1] as segment_anything takes them: color, 0 to 255."""
    return sam.preprocess(255 * image.expand(-1, 3, -1, -1))


def class_logits(sam: Sam, head: dict[str, torch.Tensor], embedding: torch.Tensor) -> torch.Tensor:
    """What `loading` in export.json says, with segment_anything's modules only."""
    source = embedding + sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    tokens = head["mask_tokens.weight"][None]
    tokens, keys = sam.mask_decoder.transformer(source, sam.prompt_encoder.get_dense_pe(), tokens)
    image = sam.mask_decoder.output_upscaling(keys.transpose(1, 2).view_as(source))
    rows = []
    for k in range(tokens.shape[1]):
        x = tokens[:, k]
        for i in range(3):
            layer = f"output_hypernetworks_mlps.{k}.layers.{i}"
            x = torch.nn.functional.linear(x, head[f"{layer}.weight"], head[f"{layer}.bias"])
            x = x.relu() if i < 2 else x
        rows.append(x)
    return (torch.stack(rows, 1) @ image.flatten(2)).view(1, len(rows), *image.shape[2:])


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_segment_anything_loads_it_strictly_and_gives_our_numbers(
    name: str,
    tmp_path: Path,
    make_segmenter: Callable[..., SamSegmenter],
    original_sam: Callable[[ViTConfig], Sam],
    tiny_vit_config: ViTConfig,
    tiny_weights: Path,
) -> None:
    network = trained(make_segmenter(adapters=ADAPTERS[name]))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    pyramid = network.encode(image)
    embedding, logits = pyramid["embedding"], network.decode(pyramid)

    about = export_model(network, tmp_path / "out", TASK, "sam")
    sam, base = original_sam(tiny_vit_config), original_sam(tiny_vit_config)
    sam.load_state_dict(torch.load(tmp_path / "out" / "sam.pth", weights_only=True))
    base.load_state_dict(torch.load(tiny_weights, weights_only=True))

    found = sam.image_encoder(preprocess(sam, image))
    assert torch.allclose(found, embedding, atol=1e-4 * float(embedding.abs().max()))
    changed = not torch.allclose(found, base.image_encoder(preprocess(sam, image)), atol=1e-3)
    assert changed == (name not in ("head", "decoder"))
    head = load_file(tmp_path / "out" / "class_head.safetensors")
    assert torch.allclose(class_logits(sam, head, found), logits, atol=1e-4 * float(logits.abs().max()))
    for part in ("mask_tokens", "iou_token", "iou_prediction_head", "output_hypernetworks_mlps"):  # SAM's own
        for a, b in zip(*(getattr(s.mask_decoder, part).parameters() for s in (sam, base)), strict=True):
            assert torch.equal(a, b)
    assert about["files"]["sam.pth"]["difference"] < 1e-4 * about["files"]["sam.pth"]["largest"]
    assert json.loads((tmp_path / "out" / "export.json").read_text("utf-8")) == about
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)


@torch.no_grad()
def test_a_tiny_vit_file_has_the_names_of_mobile_sams(
    tmp_path: Path, make_segmenter: Callable[..., SamSegmenter], tiny_tinyvit_weights: Path
) -> None:
    network = trained(make_segmenter("tiny_vit", adapters={"salt": {"rank": 2}, "norm": {}}))
    export_model(network, tmp_path / "out", TASK, "sam")
    state, base = read_state(tmp_path / "out" / "sam.pth"), read_state(tiny_tinyvit_weights)
    assert base.keys() <= state.keys()
    assert {key.split(".")[1] for key in state.keys() - base.keys()} <= {"norm_head", "head"}
    assert torch.equal(state["image_encoder.norm_head.weight"], base["image_encoder.norm_head.weight"])
    assert state["image_encoder.head.bias"].shape == (1000,)  # the base file of the test has none
    key = "image_encoder.layers.1.blocks.0.attn.qkv.weight"
    site = network.image_encoder.stages[0].blocks[0].attn.qkv
    assert torch.allclose(state[key], base[key] + site.adapters["salt"].delta(), atol=1e-6)
    assert not torch.equal(state[key], base[key])
    image = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(1))
    sam = to_segment_anything(network.config, tmp_path / "out" / "sam.pth")
    normal = (image.expand(-1, 3, -1, -1) - network.pixel_mean) / network.pixel_std
    assert torch.allclose(sam.image_encoder(normal), network.encode(image)["embedding"], atol=1e-5)


@pytest.mark.parametrize(
    ("adapters", "place"),
    [
        ({"sam_da": {}}, "decoder.0.layer and 1 more"),
        ({"salt": {"rank": 2}, "dka": {"large_kernel": 5}}, "encoder.0.attn.after and 3 more"),
        ({"lka": {}}, "encoder.0.attn.branch and 3 more"),
        ({"bottleneck": {}}, "encoder.0.attn.after and 3 more"),
    ],
)
def test_modules_have_no_place_in_sams_file(
    adapters: dict[str, dict[str, Any]], place: str, tmp_path: Path, make_segmenter: Callable[..., SamSegmenter]
) -> None:
    network = make_segmenter(adapters=adapters)
    words = f"'{list(adapters)[-1]}' .* a module at {place}, .* export as onnx or torch"
    with pytest.raises(AdapterError, match=words):
        export_model(network, tmp_path / "out", TASK, "sam")
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_no_file_makes_no_sam(tmp_path: Path, make_segmenter: Callable[..., SamSegmenter]) -> None:
    with pytest.raises(WeightsError, match=r"of no file.* lack SAM's quality head"):
        export_model(make_segmenter(weights=None, adapters={"salt": {"rank": 2}}), tmp_path / "out", TASK, "sam")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_the_encoder_of_a_pyramid_model_becomes_a_sam(
    tmp_path: Path, make_segmenter: Callable[..., SamSegmenter], original_sam: Callable[[ViTConfig], Sam]
) -> None:
    network = trained(make_segmenter(adapters={"lora": {"rank": 2}, "ssf": {}}, head="pyramid"))
    pyramid = network.encode(torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    plain = make_segmenter(head="pyramid")
    about = export_model(network, tmp_path / "out", TASK, "sam")
    sam = original_sam(network.config)
    sam.load_state_dict(torch.load(tmp_path / "out" / "sam.pth", weights_only=True))
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = network.encode(image)["embedding"]
    assert torch.allclose(sam.image_encoder(preprocess(sam, image)), expected, atol=1e-4 * float(expected.abs().max()))
    head = load_file(tmp_path / "out" / "class_head.safetensors")
    assert {f"class_head.{name}" for name in head} == {*network.head_params(), *network.head_buffers()}
    plain.class_head.load_state_dict(head)  # ssf is inside its weights
    expected = network.decode(pyramid)
    assert torch.allclose(plain.decode(pyramid), expected, atol=1e-4 * float(expected.abs().max()))
    assert about["model"]["head"]["type"] == "pyramid" and "'pyramid' reads image" in about["loading"]


RIGHT_LUNG, LEFT_LUNG = 5, 6  # label ids of the scan's segmentation
WINDOW = (-1000.0, 400.0)  # HU


def test_the_same_masks_as_the_original(tiny_vit_config: ViTConfig, tiny_weights: Path, original_sam: Callable) -> None:
    original = original_sam(tiny_vit_config)
    original.load_state_dict(torch.load(tiny_weights, weights_only=True))
    ours = to_segment_anything(tiny_vit_config, tiny_weights)
    generator = torch.Generator().manual_seed(0)
    record = {"image": torch.rand(3, 48, 64, generator=generator) * 255, "original_size": (96, 128)}
    record["boxes"] = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    first, second = (sam([record], multimask_output=True)[0] for sam in (ours, original))
    for key in ("low_res_logits", "iou_predictions"):
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-4 * second[key].abs().max().item())
    assert first["masks"].shape == second["masks"].shape == (1, 3, 96, 128)


def test_weights_that_do_not_fit_are_refused(tiny_vit_config: ViTConfig, tiny_tinyvit_weights: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit test_vit"):
        to_segment_anything(tiny_vit_config, tiny_tinyvit_weights)


def test_boxes_alone_find_the_lungs_of_a_real_scan(vit_t_weights: Path) -> None:
    folder = Path(importlib.util.find_spec("slicerio").origin).parent / "data"
    scan, labels = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name)))
        for name in ("CTChest4.nrrd", "Segmentation.seg.nrrd")
    )
    index = int(np.isin(labels, (RIGHT_LUNG, LEFT_LUNG)).sum((1, 2)).argmax())
    gray = np.clip((scan[index] - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1) * 255
    predictor = SamPredictor(to_segment_anything("vit_t", vit_t_weights))
    predictor.set_image(np.repeat(gray.astype(np.uint8)[..., None], 3, -1))
    for label in (RIGHT_LUNG, LEFT_LUNG):
        truth = labels[index] == label
        rows, columns = np.nonzero(truth)
        box = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
        mask = predictor.predict(box=box, multimask_output=False)[0][0]
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
