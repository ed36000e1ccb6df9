# SPDX-License-Identifier: Apache-2.0
"""The adapter contract: small modules at named sites of a frozen network.

Everything that happens to an adapter later (freezing, counting, saving, merging, the scope of test-time adaptation)
derives from one answer: which parameters it calls its own (:meth:`Adapter.adapter_params`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn

from samda.adapters.sites import LinearSite, NormSite, Site, SiteInfo
from samda.errors import AdapterError

__all__ = [
    "Adapter",
    "AdapterConfig",
    "adapter_parameters",
    "attach",
    "attached",
    "base_parameters",
    "count_parameters",
    "detach",
    "disabled",
    "freeze",
    "is_merged",
    "merge",
    "set_enabled",
    "sites",
    "trainable_parameters",
    "unmerge",
]


class Adapter(nn.Module):
    """One adapter module at one site.

    `forward` is what the kind of site asks for (see :mod:`samda.adapters.sites`). A weight delta (`linear` and `norm`
    sites) returns the *additive* part and offers `delta()`; a module of a token or decoder site returns what replaces
    its input.
    """

    enabled: bool = True
    mergeable: bool = False  # can its effect be folded into the base weights?

    def adapter_params(self) -> list[str]:
        """Names of the parameters that are this adapter's own (a fresh list)."""
        return [name for name, _ in self.named_parameters()]

    def delta(self) -> Any:
        """The change of the base parameter: a tensor of the weight's shape, or (scale, shift) at a norm."""
        raise AdapterError(f"{type(self).__name__} is no weight delta and cannot be merged into the base weights")

    def reparameterize(self) -> bool:
        """Fold the adapter's own parts into fewer, where the mathematics allows; True if anything changed."""
        return False

    def restore(self) -> None:
        """Undo :meth:`reparameterize`."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Settings of one adapter. A subclass adds fields, states the roles it serves and builds the module of a site."""

    name: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ()

    seed: int = 0  # of the adapter's own random initialization; the global generators stay untouched

    def targets(self, info: SiteInfo) -> bool:
        """Does this adapter go to that site?"""
        return info.role in self.roles

    def build(self, site: Site, generator: torch.Generator) -> Adapter:
        """The module for `site`; it raises AdapterError with the place and the reason where it cannot serve it."""
        raise NotImplementedError

    def base_params(self, model: nn.Module) -> list[str]:
        """Base parameters that this "adapter" trains itself (the baselines `decoder` and `full`); usually none."""
        return []


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites of `model` by their full name, in module order."""
    return {module.info.name: module for module in model.modules() if isinstance(module, Site)}


def attached(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters of `model` by name, in the order of attachment (a fresh dict)."""
    return dict(getattr(model, "_samda_adapters", {}))


def attach(model: nn.Module, adapters: Mapping[str, AdapterConfig]) -> None:
    """Attach adapters to their sites; all of them or, when one refuses, none.

    At this moment the output of the model does not change, unless a config asks for its paper's own initialization.
    Afterwards exactly the adapters' parameters, the class head and what a baseline declares require gradients.

    Args:
        model: a network with sites.
        adapters: name -> config. The name is the key under which the adapter is saved and addressed.

    Raises:
        AdapterError: a name is taken, a config finds no site, or a site cannot be served. The model is unchanged.
    """
    present = attached(model)
    places = sites(model)
    if is_merged(model):
        raise AdapterError("adapters are merged; call unmerge before attaching more")
    built: list[tuple[Site, str, Adapter]] = []
    for name, config in adapters.items():
        if name in present:
            raise AdapterError(f"adapter {name!r} is already attached; detach it first or choose another name")
        targets = [site for site in places.values() if config.targets(site.info)]
        if config.roles and not targets:
            raise AdapterError(f"adapter {name!r} finds none of its sites ({', '.join(config.roles)}) in this model")
        for site in targets:
            # a seed per site: equal layers must not start equal, and no global generator is touched
            seed = zlib.crc32(f"{config.seed}/{name}/{site.info.name}".encode())
            adapter = config.build(site, torch.Generator().manual_seed(seed))
            reference = next(iter(site.parameters()), None) or next(model.parameters())
            built.append((site, name, adapter.to(reference.device)))
    for site, name, adapter in built:
        site.adapters[name] = adapter
    model._samda_adapters = present | dict(adapters)  # type: ignore[assignment]
    freeze(model)


def detach(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Remove adapters (all when `names` is None); the base is as it was before."""
    names = _names(model, names)
    unmerge(model)
    for site in sites(model).values():
        for name in names:
            if name in site.adapters:
                del site.adapters[name]
    model._samda_adapters = {n: c for n, c in attached(model).items() if n not in names}  # type: ignore[assignment]
    freeze(model)


def adapter_parameters(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The adapters' own parameters by their full name in `model`."""
    names = _names(model, names)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Site):
            for name in names:
                if name in module.adapters:
                    adapter = module.adapters[name]
                    own = dict(adapter.named_parameters())
                    for key in adapter.adapter_params():
                        found[f"{path}.adapters.{name}.{key}"] = own[key]
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the supervised phase trains: adapters, class head, and what a baseline declares; also what is saved."""
    own = dict(model.named_parameters())
    names = set(adapter_parameters(model)) | set(getattr(model, "head_params", list)())
    for config in attached(model).values():
        names |= set(config.base_params(model))
    return {name: parameter for name, parameter in own.items() if name in names}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that is neither adapter nor class head: the pre-trained SAM."""
    outside = set(adapter_parameters(model)) | set(getattr(model, "head_params", list)())
    return {name: parameter for name, parameter in model.named_parameters() if name not in outside}


def freeze(model: nn.Module) -> None:
    """Let exactly :func:`trainable_parameters` require gradients."""
    trainable = {id(parameter) for parameter in trainable_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameter counts: one entry per adapter, `head` (class head), `trainable` and `base`."""
    counts = {}
    for name, config in attached(model).items():
        parameters = adapter_parameters(model, [name])
        own = dict(model.named_parameters())
        parameters.update({key: own[key] for key in config.base_params(model)})
        counts[name] = sum(p.numel() for p in parameters.values())
    own = dict(model.named_parameters())
    counts["head"] = sum(own[name].numel() for name in getattr(model, "head_params", list)())
    counts["trainable"] = sum(p.numel() for p in trainable_parameters(model).values())
    counts["base"] = sum(p.numel() for p in base_parameters(model).values())
    return counts


def set_enabled(model: nn.Module, enabled: bool, names: Iterable[str] | None = None) -> None:
    """Switch adapters on or off (all when `names` is None)."""
    names = _names(model, names)
    if is_merged(model):
        raise AdapterError("adapters are merged into the weights; call unmerge before switching them")
    for site in sites(model).values():
        for name in names:
            if name in site.adapters:
                site.adapters[name].enabled = enabled  # type: ignore[assignment]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the network answers as the unadapted base does (class head included as it is)."""
    before = [(a, a.enabled) for site in sites(model).values() for a in site.adapters.values()]
    merged = is_merged(model)
    if merged:
        unmerge(model)
    try:
        for adapter, _ in before:
            adapter.enabled = False  # type: ignore[assignment]
        yield
    finally:
        for adapter, state in before:
            adapter.enabled = state  # type: ignore[assignment]
        if merged:
            merge(model)


def merge(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Fold adapters into the base for inference at the base model's cost; harmless when done twice.

    Weight deltas go into a merged copy of the weight (the base weight is never written to); kernel adapters fold their
    two kernels into one. What cannot be merged stays as it is, unless it is named.

    Args:
        model: a network with adapters.
        names: adapters that must merge; None takes those that can.

    Returns:
        The names of the adapters that are now merged into base weights.

    Raises:
        AdapterError: a named adapter cannot be merged, or only part of a site's deltas was named.
    """
    chosen = _names(model, names)
    places = sites(model).values()
    able = {n for site in places for n, a in site.adapters.items() if a.mergeable}
    if names is not None:
        for name in chosen:
            if name not in able:
                raise AdapterError(f"adapter {name!r} cannot be merged into the base weights; it runs as a module")
        left = [n for n in able if n not in chosen]
        if left:
            raise AdapterError(f"merge also {', '.join(sorted(left))}: deltas are folded together, all or none")
    for site in places:
        for name, adapter in site.adapters.items():
            if name in chosen and not adapter.mergeable:
                adapter.reparameterize()
        if isinstance(site, LinearSite | NormSite):
            site.merge()
    return [name for name in attached(model) if name in able]


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`; base weights were never touched, so the way back is exact."""
    for site in sites(model).values():
        if isinstance(site, LinearSite | NormSite):
            site.unmerge()
        for adapter in site.adapters.values():
            adapter.restore()


def is_merged(model: nn.Module) -> bool:
    """Is any site merged?"""
    return any(getattr(site, "merged_weight", None) is not None for site in sites(model).values())


def _names(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    """`names`, checked against what is attached; all attached names for None."""
    present = attached(model)
    if names is None:
        return list(present)
    names = list(names)
    for name in names:
        if name not in present:
            raise AdapterError(f"no adapter {name!r} in this model; attached: {', '.join(present) or 'none'}")
    return names
