# SPDX-License-Identifier: Apache-2.0
"""The adapters by name, and how settings from a config file or a command line become configs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn as nn

from samda.adapters.baselines import BottleneckConfig, DecoderConfig, FullConfig, HeadConfig
from samda.adapters.kernel import DkaConfig, LkaConfig
from samda.adapters.lora import LoraConfig
from samda.adapters.norm import NormConfig
from samda.adapters.salt import SaltConfig
from samda.adapters.sam_da import SamDaConfig
from samda.adapters.settings import AdapterConfig
from samda.errors import AdapterError, UsageError, from_mapping, nearest

__all__ = ["ADAPTERS", "Adapters", "build_configs", "check_together"]

Adapters = Mapping[str, Mapping[str, Any] | AdapterConfig] | Iterable[str] | str

ADAPTERS: dict[str, type[AdapterConfig]] = {
    config.name: config
    for config in (
        SaltConfig,
        LoraConfig,
        LkaConfig,
        DkaConfig,
        SamDaConfig,
        NormConfig,
        BottleneckConfig,
        HeadConfig,
        DecoderConfig,
        FullConfig,
    )
}

RESERVED = ("training", "trainable", "base")  # a module's own attribute, and entries of `count_parameters`


def build_configs(adapters: Adapters) -> dict[str, AdapterConfig]:
    """Configs from names or plain settings.

    Args:
        adapters: names of :data:`ADAPTERS`, which get their default settings; or adapter name -> settings, where the
            name may be any other with the key `type` among the settings. A config that is already built is passed on.

    Raises:
        UsageError: an adapter or a setting is unknown (the message gives the nearest valid name) or out of range.

    Example:
        >>> build_configs({"salt": {"rank": 8}, "wide": {"type": "lka", "kernel_size": 15}})["wide"].kernel_size
        15
    """
    if isinstance(adapters, str):
        adapters = [adapters]
    if not isinstance(adapters, Mapping):
        if not isinstance(adapters, Iterable):
            raise UsageError(f"adapters must be names or a mapping of name to settings, got {adapters!r}")
        adapters = {name: {} for name in adapters}
    return {str(name): _build(str(name), settings) for name, settings in adapters.items()}


def check_together(adapters: Mapping[str, AdapterConfig], present: Mapping[str, AdapterConfig] | None = None) -> None:
    """Refuse adapters that no network takes.

    Args:
        adapters: those to attach.
        present: those that are attached already.

    Raises:
        AdapterError: a name is taken or no identifier, or two configs exclude each other.
    """
    present = present or {}
    for name in adapters:
        if name in present:
            raise AdapterError(f"adapter {name!r} is already attached; detach it first or choose another name")
        if not name.isidentifier() or hasattr(nn.ModuleDict, name) or name in RESERVED:
            raise AdapterError(f"adapter name {name!r} cannot be used; choose letters, digits and underscores")
    together = {**present, **adapters}
    served = [name for name, config in together.items() if config.roles]
    for name, config in together.items():
        if config.alone and served:
            raise AdapterError(
                f"{name!r} trains the base weights that {served[0]!r} builds on; attach only one of them"
            )


def _build(name: str, settings: Mapping[str, Any] | AdapterConfig) -> AdapterConfig:
    if isinstance(settings, AdapterConfig):
        return settings
    if not isinstance(settings, Mapping):
        raise UsageError(f"adapter {name!r}: settings must be a mapping, got {settings!r}; write {{}} for the defaults")
    values = dict(settings)
    kind = values.pop("type", name)
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise UsageError(f"there is no adapter {kind!r}; {nearest(str(kind), ADAPTERS)}")
    return from_mapping(ADAPTERS[kind], values, f"adapter {name!r}")
