# SPDX-License-Identifier: Apache-2.0
"""Attach adapters to a network, the registry :data:`ADAPTERS`, and scopes of test-time adaptation.

A scope is the set of trained parameters that the adaptation to a scan changes:

=================== ==============================================================================================
scope               parameters
=================== ==============================================================================================
intensity           gray values of the input
ssf                 scale and shift of the levels that the head `pyramid` reads
gate                SAM-DA's gates and Lt
decoder             all of SAM-DA
norm                the norm adapter, encoder and decoder
encoder             every adapter of the encoder; embeddings cannot be cached between steps
decoder+encoder     several scopes, joined by "+"
=================== ==============================================================================================

Base weights and class head are in no scope. Without a choice, it is what follows the encoder (`ssf`, `decoder`), else
`norm` or `encoder`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from samda.adapters.base import (
    Adapter,
    AdapterConfig,
    attached,
    attached_names,
    freeze,
    is_merged,
    merge,
    modules,
    sites,
    unmerge,
)
from samda.adapters.baselines import BottleneckConfig, DecoderConfig, FullConfig, HeadConfig
from samda.adapters.intensity import IntensityConfig
from samda.adapters.kernel import DkaConfig, LkaConfig
from samda.adapters.lora import LoraConfig
from samda.adapters.norm import NormConfig
from samda.adapters.salt import SaltConfig
from samda.adapters.sam_da import SamDaConfig
from samda.adapters.sites import Site, WeightSite
from samda.adapters.ssf import SsfConfig
from samda.errors import AdapterError, UsageError, from_mapping, nearest

Adapters = Mapping[str, Mapping[str, Any] | AdapterConfig] | Iterable[str] | str

METHODS = (SaltConfig, LoraConfig, LkaConfig, DkaConfig, SamDaConfig, SsfConfig, IntensityConfig, NormConfig)
BASELINES = (BottleneckConfig, HeadConfig, DecoderConfig, FullConfig)
ADAPTERS: dict[str, type[AdapterConfig]] = {kind.name: kind for kind in (*METHODS, *BASELINES)}

RESERVED = ("training", "trainable", "base")  # attribute of modules, and entries of `count_parameters`


def build_configs(adapters: Adapters) -> dict[str, AdapterConfig]:
    """Configs from names or plain settings.

    Args:
        adapters: names of :data:`ADAPTERS` for default settings; or name -> settings or config. With the key `type` in
            the settings, the name is arbitrary.

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
    return {str(name): _build_config(str(name), settings) for name, settings in adapters.items()}


def check_together(adapters: Mapping[str, AdapterConfig], present: Mapping[str, AdapterConfig] | None = None) -> None:
    """Raise AdapterError if a name exists (in `present`) or is not an identifier, or two configs exclude each other."""
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


def _build_config(name: str, settings: Mapping[str, Any] | AdapterConfig) -> AdapterConfig:
    if isinstance(settings, AdapterConfig):
        return settings
    if not isinstance(settings, Mapping):
        raise UsageError(f"adapter {name!r}: settings must be a mapping, got {settings!r}; write {{}} for the defaults")
    values = dict(settings)
    kind = values.pop("type", name)
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise UsageError(f"there is no adapter {kind!r}; {nearest(str(kind), ADAPTERS)}")
    return from_mapping(ADAPTERS[kind], values, f"adapter {name!r}")


def attach(model: nn.Module, adapters: Adapters) -> None:
    """Attach adapters to their sites; on an error, the model is unchanged.

    The output of the model does not change, unless a config selects the initialization of its paper. Afterwards, only
    parameters of adapters, class head and baselines require gradients.

    Args:
        model: a network with sites; attach after its base weights were loaded.
        adapters: names ("salt", or ["salt", "sam_da"]), or name -> settings or config, for example
            `{"salt": samda.SaltConfig(rank=4)}`, see :func:`samda.adapters.build_configs`. An adapter is saved and
            addressed by its name.

    Raises:
        UsageError: an adapter or a setting is unknown or out of range.
        AdapterError: a name exists or is not an identifier, a config has no site, a site is not supported, or two
            configs exclude each other.
    """
    if is_merged(model):
        raise AdapterError("adapters are merged; call unmerge before attaching more")
    configs, present, places = build_configs(adapters), attached(model), sites(model)
    check_together(configs, present)
    built = []
    for name, config in configs.items():
        targets = [site for site in places.values() if config.targets(site.info)]
        if config.roles and not targets:
            raise AdapterError(f"adapter {name!r} finds none of its sites ({', '.join(config.serves())}) in this model")
        config.review(targets)
        built += [(site, name, _build_at(site, name, config, model)) for site in targets]
    for site, name, adapter in built:
        site.adapters[name] = adapter
    model._samda_adapters = present | configs  # type: ignore[assignment]
    freeze(model)


def _build_at(site: Site, name: str, config: AdapterConfig, model: nn.Module) -> Adapter:
    reference = next(site.parameters(), None)
    reference = next(model.parameters()) if reference is None else reference
    # one seed per site, so that equal layers differ; the global generator is not used
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{name}/{site.info.name}".encode()))
    with torch.device("meta" if reference.is_meta else "cpu"):
        adapter = config.build(site, generator)
    return adapter.to(reference.device, reference.dtype)


def detach(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Remove adapters (all if `names` is None); base weights trained by a baseline keep their values."""
    names = attached_names(model, names)
    unmerge(model)
    for site in sites(model).values():
        for name in names:
            if name in site.adapters:
                del site.adapters[name]
    model._samda_adapters = {n: c for n, c in attached(model).items() if n not in names}  # type: ignore[assignment]
    freeze(model)


SCOPES = ("intensity", "ssf", "gate", "decoder", "norm", "encoder")


def check_scope(scope: str) -> list[str]:
    """The names in `scope`, joined by "+", each once and in the order of :data:`SCOPES`."""
    parts = str(scope).split("+")
    for part in parts:
        if part not in SCOPES:
            raise UsageError(f"there is no scope {part!r}; {nearest(part, SCOPES)}")
    return [name for name in SCOPES if name in parts]


def default_scope(model: nn.Module) -> str:
    """The scope of this model without a choice, see the module; AdapterError where it has none."""
    found = _parameters_by_scope(model)
    for group in (("ssf", "decoder"), ("norm",), ("encoder",), ("intensity",)):
        if chosen := [scope for scope in group if scope in found]:
            return "+".join(chosen)
    raise AdapterError("this model has no adapter, and nothing else adapts; train it with one, such as ssf")


def scope_parameters(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope, or of several joined by "+", by full name in module order.

    Raises:
        AdapterError: the scope is empty in this model; the message lists its scopes.
    """
    found = _parameters_by_scope(model)
    chosen: dict[str, nn.Parameter] = {}
    for part in check_scope(scope):
        if part not in found:
            have = ", ".join(name for name in SCOPES if name in found) or "none; train it with an adapter, such as ssf"
            raise AdapterError(f"this model has no parameters in scope {part!r}; it has: {have}")
        chosen |= found[part]
    order = [name for name, _ in model.named_parameters()]
    return {name: chosen[name] for name in order if name in chosen}


def _parameters_by_scope(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path, site, adapter in modules(model):
        own = dict(adapter.named_parameters())
        declared = adapter.scope_params()
        if site.info.part == "encoder" and site.info.kind != "input":
            declared = declared | {"encoder": adapter.adapter_params()}
        for scope, names in declared.items():
            found.setdefault(scope, {}).update({f"{path}.{name}": own[name] for name in names})
    return found


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Overwrite base weights by merged weights and remove the merged adapters, for export; so does a class head's
    `fold_sites` with adapters of its levels.

    Adapters that are modules remain, reparameterized if possible. This cannot be undone (see :func:`merge`): pass a
    copy.
    """
    merge(model)
    for module in model.children():
        if hasattr(module, "fold_sites"):
            module.fold_sites()  # type: ignore[operator]
    for site in sites(model).values():
        if isinstance(site, WeightSite):
            for name in ("weight", "bias"):
                merged = getattr(site, f"merged_{name}")
                if merged is not None:
                    getattr(site, name).copy_(merged)
            site.unmerge()
    for path, site, adapter in list(modules(model)):
        if adapter.mergeable and isinstance(site, WeightSite):
            del site.adapters[path.rpartition(".")[2]]
