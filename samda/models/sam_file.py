# SPDX-License-Identifier: Apache-2.0
"""Networks as SAM models: encoders of samda in segment_anything's `Sam`, and trained networks as SAM weight files.

Such a file contains the weights with merged adapters and exactly the tensors of the base file under SAM's names, so
`segment_anything` loads it strictly (MobileSAM's package for `vit_t`). The class head is not part of SAM and is
written to a separate file.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from samda.adapters.attach import fold
from samda.adapters.base import modules
from samda.errors import AdapterError, WeightsError
from samda.networks.backbones import BackboneConfig, TinyViTConfig, backbone_config
from samda.networks.decoder import DEPTH, MLP_DIM, NUM_HEADS
from samda.networks.segmenter import SamSegmenter
from samda.networks.weights import HEAD_PREFIXES, QUALITY_PREFIXES, State, fetch_weights, name_in_network, read_state

CLASSIFIER = 1000  # classes of TinyViT's pre-training on ImageNet, not used by SAM
PREFIX = "image_encoder."


def to_segment_anything(backbone: str | BackboneConfig, weights: str | Path | None = "pretrained") -> Sam:
    """A `segment_anything.Sam` in evaluation mode with the image encoder of samda, for example for `SamPredictor`.

    For the arguments, see :class:`samda.networks.segmenter.SamSegmenter`.
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
        state = read_state(path)
        names = {key: key if key.startswith(QUALITY_PREFIXES) else name_in_network(key, config) for key in state}
        try:
            sam.load_state_dict({name: state[key] for key, name in names.items() if name})
        except RuntimeError as error:
            raise WeightsError(f"{path} does not fit {config.name} ({str(error).splitlines()[1].strip()})") from error
    return sam.eval()


def sam_state(network: SamSegmenter) -> State:
    """The state dict of a SAM whose weights are those of `network`, adapters folded in.

    Image encoder, prompt encoder, and of the mask decoder transformer and upscaling are the network's. SAM's own mask
    tokens, their hypernetworks and the quality head are the base file's: the class head took their place here.

    `network` is a copy on the CPU; its adapters are folded into it.

    Raises:
        AdapterError: an adapter runs as a module of its own, for which SAM's file has no tensor.
        WeightsError: the base weights came from no complete SAM file.
    """
    _refuse_modules(network)
    report = network.base_report
    file = {} if report is None else read_state(report.path, report.sha256)
    if not any(key.startswith(QUALITY_PREFIXES) for key in file):
        raise WeightsError(
            f"the base weights ({report.path.name if report else 'of no file'}) lack SAM's quality head, so no "
            "complete SAM can be written; train on a published SAM file, or export as onnx or torch"
        )
    fold(network)
    own = network.full_state()
    state = {}
    for key, tensor in file.items():
        name = name_in_network(key, network.config)
        taken = name in own and not key.startswith(HEAD_PREFIXES)
        state[key] = (own[name] if taken and name else tensor).detach().clone().contiguous()
    if isinstance(network.config, TinyViTConfig):
        state |= {key: tensor for key, tensor in _classifier(network.config).items() if key not in state}
    return state


def class_head(network: SamSegmenter) -> State:
    """The tensors of the class head; of the head `sam` under the names that they have in SAM's mask decoder."""
    own = network.full_state()
    names = network.head_params() + network.head_buffers()
    return {re.sub("^(mask_decoder|class_head).", "", name): own[name].detach().contiguous() for name in names}


def _refuse_modules(network: SamSegmenter) -> None:
    places: dict[str, list[str]] = {}
    for path, site, adapter in modules(network):
        if not adapter.mergeable and site.info.part != "head":
            places.setdefault(path.rpartition(".")[2], []).append(site.info.name)
    for name, found in places.items():
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise AdapterError(
            f"adapter {name!r} does not change weights but is a module at {found[0]}{others}, for which SAM's file has "
            "no tensor; export as onnx or torch"
        )


def _classifier(config: TinyViTConfig) -> State:
    """What MobileSAM's module also holds and SAM never calls; a converted base lacks it."""
    dim = config.dims[-1]
    return {
        f"{PREFIX}norm_head.weight": torch.ones(dim),
        f"{PREFIX}norm_head.bias": torch.zeros(dim),
        f"{PREFIX}head.weight": torch.zeros(CLASSIFIER, dim),
        f"{PREFIX}head.bias": torch.zeros(CLASSIFIER),
    }
