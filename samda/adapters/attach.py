# SPDX-License-Identifier: Apache-2.0
"""The adapters by name, and how settings from a config file or a command line become configs.

Scopes: which of the trained parameters move when a model is adapted to new scans without labels.

=================== ==============================================================================================
scope               parameters
=================== ==============================================================================================
gate                SAM-DA's gates and Lt: the smallest and safest choice
decoder             all of SAM-DA
norm                the norm adapter, encoder and decoder
encoder             every adapter of the encoder; embeddings cannot be kept between steps
decoder+encoder     several scopes together, joined by "+"
=================== ==============================================================================================

Base weights and class head never belong to a scope.

Fold adapters into a network for good, for files that leave samda; what can be undone is :func:`merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from samda.adapters.base import merge, modules, sites
from samda.adapters.baselines import BottleneckConfig, DecoderConfig, FullConfig, HeadConfig
from samda.adapters.kernel import DkaConfig, LkaConfig
from samda.adapters.lora import LoraConfig
from samda.adapters.norm import NormConfig
from samda.adapters.salt import SaltConfig
from samda.adapters.sam_da import SamDaConfig
from samda.adapters.settings import AdapterConfig
from samda.adapters.sites import LinearSite, NormSite
from samda.errors import AdapterError, UsageError, from_mapping, nearest

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


SCOPES = ("gate", "decoder", "norm", "encoder")


def check_scope(scope: str) -> list[str]:
    """The names that `scope` joins by "+", each once and in the order of :data:`SCOPES`; no model is needed.

    Raises:
        UsageError: there is no such scope.
    """
    parts = str(scope).split("+")
    for part in parts:
        if part not in SCOPES:
            raise UsageError(f"there is no scope {part!r}; {nearest(part, SCOPES)}")
    return [name for name in SCOPES if name in parts]


def scope_parameters(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope by their full name in `model`, in module order.

    Args:
        model: a network with adapters.
        scope: a name of the table, or several joined by "+".

    Raises:
        UsageError: there is no such scope.
        AdapterError: it is empty in this model; the message lists the scopes it has.
    """
    found = _parameters_by_scope(model)
    chosen: dict[str, nn.Parameter] = {}
    for part in check_scope(scope):
        if part not in found:
            have = ", ".join(available_scopes(model)) or "none (it has no adapter that could be adapted)"
            raise AdapterError(f"this model has no parameters in scope {part!r}; it has: {have}")
        chosen |= found[part]
    order = [name for name, _ in model.named_parameters()]
    return {name: chosen[name] for name in order if name in chosen}


def available_scopes(model: nn.Module) -> list[str]:
    """The scopes that `model` has parameters in, "decoder+encoder" included where it has both."""
    found = _parameters_by_scope(model)
    both = ["decoder+encoder"] if {"decoder", "encoder"} <= set(found) else []
    return [scope for scope in SCOPES if scope in found] + both


def _parameters_by_scope(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path, site, adapter in modules(model):
        own = dict(adapter.named_parameters())
        declared = adapter.scope_params()
        if site.info.part == "encoder":
            declared = declared | {"encoder": adapter.adapter_params()}
        for scope, names in declared.items():
            found.setdefault(scope, {}).update({f"{path}.{name}": own[name] for name in names})
    return found


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Write what merges into the base weights themselves and drop the adapters that it came from.

    Adapters that are modules stay, their own parts folded into fewer where possible. There is no way back: give a copy.

    Raises:
        AdapterError: a merged weight is not finite; the model is unchanged.
    """
    merge(model)
    for site in sites(model).values():
        if isinstance(site, LinearSite | NormSite) and site.merged:
            for name in ("weight", "bias"):
                merged = getattr(site, f"merged_{name}", None)
                if merged is not None:
                    getattr(site, name).copy_(merged)
            site.unmerge()
    for path, site, adapter in list(modules(model)):
        if adapter.mergeable and isinstance(site, LinearSite | NormSite):
            del site.adapters[path.rpartition(".")[2]]
