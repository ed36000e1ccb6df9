# SPDX-License-Identifier: Apache-2.0
"""Adapters: the small modules that are trained, how they attach, freeze, merge and are saved."""

from __future__ import annotations

from samda.adapters.adapter_file import AdapterFile, load_adapters, read_adapters, save_adapters
from samda.adapters.attach import ADAPTERS, SCOPES, available_scopes, build_configs, check_scope, scope_parameters
from samda.adapters.base import (
    Adapter,
    adapter_parameters,
    attach,
    attached,
    base_parameters,
    count_parameters,
    detach,
    disabled,
    freeze,
    is_merged,
    merge,
    regularization,
    set_enabled,
    sites,
    trainable_parameters,
    unmerge,
)
from samda.adapters.baselines import BottleneckConfig, DecoderConfig, FullConfig, HeadConfig
from samda.adapters.kernel import DkaConfig, LkaConfig
from samda.adapters.lora import LoraConfig
from samda.adapters.norm import NormConfig
from samda.adapters.salt import SaltConfig
from samda.adapters.sam_da import SamDaConfig
from samda.adapters.settings import AdapterConfig

__all__ = [
    "ADAPTERS",
    "SCOPES",
    "Adapter",
    "AdapterConfig",
    "AdapterFile",
    "BottleneckConfig",
    "DecoderConfig",
    "DkaConfig",
    "FullConfig",
    "HeadConfig",
    "LkaConfig",
    "LoraConfig",
    "NormConfig",
    "SaltConfig",
    "SamDaConfig",
    "adapter_parameters",
    "attach",
    "attached",
    "available_scopes",
    "base_parameters",
    "build_configs",
    "check_scope",
    "count_parameters",
    "detach",
    "disabled",
    "freeze",
    "is_merged",
    "load_adapters",
    "merge",
    "read_adapters",
    "regularization",
    "save_adapters",
    "scope_parameters",
    "set_enabled",
    "sites",
    "trainable_parameters",
    "unmerge",
]
