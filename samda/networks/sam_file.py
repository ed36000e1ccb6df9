# SPDX-License-Identifier: Apache-2.0
"""A trained network as a file of SAM: adapters merged into the weights, every tensor under SAM's own name.

The file has the tensors of the base file, no more and no less, so `segment_anything` loads it strictly (MobileSAM's
package does for `vit_t`). What SAM has no place for, the class head, is handed out apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samda.adapters.base import modules
from samda.adapters.folding import fold
from samda.errors import AdapterError, WeightsError
from samda.networks.backbones import TinyViTConfig
from samda.networks.saving import full_state
from samda.networks.weights import HEAD_PREFIXES, QUALITY_PREFIXES, State, name_in_network, read_state

if TYPE_CHECKING:
    from samda.networks.segmenter import SamSegmenter

__all__ = ["class_head", "sam_state"]

CLASSIFIER = 1000  # classes of ImageNet, which TinyViT was pre-trained on and SAM never uses
PREFIX = "image_encoder."


def sam_state(network: SamSegmenter) -> State:
    """The state dict of a SAM whose weights are those of `network`, adapters folded in.

    Image encoder, prompt encoder, and of the mask decoder transformer and upscaling are the network's. SAM's own mask
    tokens, their hypernetworks and the quality head are the base file's: the class head took their place here.

    Args:
        network: a copy on the CPU; its adapters are folded into it.

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
    own = full_state(network)
    state = {}
    for key, tensor in file.items():
        name = name_in_network(key, network.config)
        taken = name in own and not key.startswith(HEAD_PREFIXES)
        state[key] = (own[name] if taken and name else tensor).detach().clone().contiguous()
    if isinstance(network.config, TinyViTConfig):
        state |= {key: tensor for key, tensor in _classifier(network.config).items() if key not in state}
    return state


def class_head(network: SamSegmenter) -> State:
    """The class head: `mask_tokens.weight` (K, 256) and `output_hypernetworks_mlps.k.*`, as in SAM's mask decoder."""
    own = full_state(network)
    return {name.removeprefix("mask_decoder."): own[name].detach().contiguous() for name in network.head_params()}


def _refuse_modules(network: SamSegmenter) -> None:
    places: dict[str, list[str]] = {}
    for path, site, adapter in modules(network):
        if not adapter.mergeable:
            places.setdefault(path.rpartition(".")[2], []).append(site.info.name)
    for name, found in places.items():
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise AdapterError(
            f"adapter {name!r} is no change of weights but a module at {found[0]}{others}, for which SAM's file has no "
            "tensor; export as onnx or torch"
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
