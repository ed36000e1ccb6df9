# SPDX-License-Identifier: Apache-2.0
"""The table of backbones: sizes, names, and the exact parameter counts of the published models."""

from __future__ import annotations

import json

import pytest
import torch
from segment_anything import sam_model_registry

from samda.errors import UsageError
from samda.models.sam_file import to_segment_anything
from samda.networks.backbones import BACKBONES, BackboneConfig, TinyViTConfig, ViTConfig, backbone_config

# exact counts of the published models: whole SAM, image encoder
COUNTS = {
    "vit_b": (93_735_472, 89_670_912),
    "vit_l": (312_342_832, 308_278_272),
    "vit_h": (641_090_608, 637_026_048),
    # MobileSAM's 10,130,092 less its unused classifier: a norm of 2 x 320 and a linear layer of 320 x 1000 + 1000
    "vit_t": (10_130_092 - 321_640, 10_130_092 - 321_640 - 6_220 - 4_058_340),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        sam = to_segment_anything(name, weights=None)
    counts = sum(p.numel() for p in sam.parameters()), sum(p.numel() for p in sam.image_encoder.parameters())
    assert counts == COUNTS[name]


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_names_and_shapes_are_those_of_the_official_files(name: str) -> None:
    with torch.device("meta"):
        official, ours = sam_model_registry[name](), to_segment_anything(name, weights=None)
    shapes = [{key: tuple(t.shape) for key, t in sam.state_dict().items()} for sam in (official, ours)]
    assert shapes[0] == shapes[1]


def test_a_named_backbone_is_saved_by_name() -> None:
    assert [backbone_config(name).to_json() for name in BACKBONES] == list(BACKBONES)


@pytest.mark.parametrize("fixture", ["tiny_vit_config", "tiny_tinyvit_config"])
def test_other_sizes_go_through_json(fixture: str, request: pytest.FixtureRequest) -> None:
    config: BackboneConfig = request.getfixturevalue(fixture)
    assert backbone_config(json.loads(json.dumps(config.to_json()))) == config


def test_a_changed_size_is_no_longer_the_named_backbone() -> None:
    config = ViTConfig("vit_b", 768, 12, 12, (2, 5, 8, 11), image_size=512)
    assert config.to_json()["image_size"] == 512
    assert isinstance(backbone_config({"type": "tiny_vit", **BACKBONES["vit_t"].sizes(), "name": "x"}), TinyViTConfig)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vit-b", "unknown backbone 'vit-b'; did you mean 'vit_b'"),
        ({"type": "vti"}, "backbone type 'vti' is unknown; did you mean 'vit'"),
        ({"type": "vit", "dept": 2}, "backbone: unknown key 'dept'; did you mean 'depth'"),
        ({"type": "vit", "name": "x"}, "backbone: .*missing"),
    ],
)
def test_wrong_backbones_are_refused(backbone: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backbone_config(backbone)  # type: ignore[arg-type]
