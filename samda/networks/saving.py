# SPDX-License-Identifier: Apache-2.0
"""State dicts that hold only what is trained, and load strictly: the frozen base is neither saved nor missed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from samda.adapters.base import trainable_parameters
from samda.adapters.sites import Site

if TYPE_CHECKING:
    from samda.networks.segmenter import SamSegmenter


def base_keys(network: nn.Module) -> set[str]:
    """Keys of the full state dict that belong to the frozen base: all but adapters and what is trained."""
    own = set(trainable_parameters(network))
    for path, module in network.named_modules():
        if isinstance(module, Site):
            own |= {f"{path}.adapters.{name}" for name in module.adapters.state_dict()}
    tensors = [name for name, _ in network.named_parameters()] + [name for name, _ in network.named_buffers()]
    return {name for name in tensors if name not in own}


def full_state(network: SamSegmenter) -> dict[str, torch.Tensor]:
    """The state dict of base and class head, adapters left out."""
    before, network.full_state_dict = network.full_state_dict, True
    try:
        state = network.state_dict()
    finally:
        network.full_state_dict = before
    return {key: tensor for key, tensor in state.items() if ".adapters." not in key}


def save_only_trained(network: nn.Module) -> None:
    """Let `state_dict` leave out the base unless `network.full_state_dict`, and strict loading accept that.

    A state dict with none of the base's tensors leaves the base as it is; one with some of them must have all.
    """
    network.register_state_dict_post_hook(_drop_base)
    network.register_load_state_dict_pre_hook(_look_for_base)
    network.register_load_state_dict_post_hook(_excuse_base)


def _drop_base(network: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if not network.full_state_dict:
        for name in base_keys(network):
            state.pop(prefix + name, None)


def _look_for_base(network: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = {prefix + name for name in base_keys(network)}
    adapter_only = names.isdisjoint(state)
    network._excused = names if adapter_only else set()
    if not adapter_only:
        network._fingerprint = None  # of the base that was


def _excuse_base(network: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in network._excused]
    network._excused = set()
