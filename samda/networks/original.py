# SPDX-License-Identifier: Apache-2.0
"""segment_anything's own `Sam` around our encoders: prompts, and comparison with the original."""

from __future__ import annotations

from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from samda.errors import WeightsError
from samda.networks.backbones import BackboneConfig, TinyViTConfig, backbone_config
from samda.networks.decoder import DEPTH, MLP_DIM, NUM_HEADS
from samda.networks.tiny_vit import rename_mobile_sam
from samda.networks.weights import fetch_weights, read_state

__all__ = ["to_segment_anything"]


def to_segment_anything(backbone: str | BackboneConfig, weights: str | Path | None = "pretrained") -> Sam:
    """SAM with prompts, as the package segment_anything has it, with our image encoder in it.

    Args:
        backbone: name or sizes of the image encoder.
        weights: as in :class:`samda.networks.segmenter.SamSegmenter`.

    Returns:
        A `Sam` in evaluation, for instance for `segment_anything.SamPredictor`.

    Raises:
        WeightsError: the weights are missing, damaged or do not fit.
    """
    config = backbone_config(backbone)
    channels, grid = config.out_channels, config.image_size // 16
    transformer = TwoWayTransformer(depth=DEPTH, embedding_dim=channels, num_heads=NUM_HEADS, mlp_dim=MLP_DIM)
    sam = Sam(
        config.build(),
        PromptEncoder(channels, (grid, grid), (config.image_size, config.image_size), mask_in_chans=16),
        MaskDecoder(transformer_dim=channels, transformer=transformer),
    )
    if weights is not None:
        path = fetch_weights(config.name) if weights == "pretrained" else Path(weights)
        try:
            sam.load_state_dict(_rename(read_state(path), config))
        except RuntimeError as error:
            raise WeightsError(f"{path} does not fit {config.name} ({str(error).splitlines()[1].strip()})") from error
    return sam.eval()


def _rename(state: dict[str, torch.Tensor], config: BackboneConfig) -> dict[str, torch.Tensor]:
    if not isinstance(config, TinyViTConfig):
        return state
    prefix, renamed = "image_encoder.", {}
    for key, tensor in state.items():
        name = rename_mobile_sam(key.removeprefix(prefix)) if key.startswith(prefix) else key
        if name is not None:
            renamed[prefix + name if key.startswith(prefix) else name] = tensor
    return renamed
