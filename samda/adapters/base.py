# SPDX-License-Identifier: Apache-2.0
"""The adapter contract: small modules at named sites of a frozen network.

Everything that happens to an adapter later (freezing, counting, saving, merging, the scope of test-time adaptation)
derives from one answer: which parameters it calls its own (:meth:`Adapter.adapter_params`).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from samda.adapters.settings import AdapterConfig
from samda.adapters.sites import LinearSite, NormSite, Site
from samda.errors import AdapterError

if TYPE_CHECKING:
    from samda.adapters.attach import Adapters


class Adapter(nn.Module):
    """One adapter module at one site.

    `forward` is what the kind of site asks for (see :mod:`samda.adapters.sites`). A weight delta (`linear` and `norm`
    sites) returns the *additive* part and offers `delta()`; a module of a token or decoder site returns what replaces
    its input.
    """

    enabled: bool = True
    mergeable: bool = False  # can its effect be folded into the base weights?
    reparameterized: bool = False  # are its own parts folded into fewer?

    def adapter_params(self) -> list[str]:
        """Names of the parameters that are this adapter's own (a fresh list)."""
        return [name for name, _ in self.named_parameters()]

    def scope_params(self) -> dict[str, list[str]]:
        """Own parameters by scope of adaptation (see :mod:`samda.adapters.attach`), beyond "encoder"."""
        return {}

    def delta(self) -> Any:
        """The change of the base parameter: a tensor of the weight's shape, or (scale, shift) at a norm."""
        raise AdapterError(f"{type(self).__name__} is no weight delta and cannot be merged into the base weights")

    def whole(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Base layer and delta in one, x (W + dW)^T + b, where that is cheaper than their sum; else None."""
        return None

    def rebase(self, weight: torch.Tensor) -> None:
        """Called after other base weights were loaded into the site: renew what was derived from them."""

    def regularizer(self) -> torch.Tensor | None:
        """The method's own penalty on its parameters, a scalar; None where it has none."""
        return None

    def check_state(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Refuse tensors that were trained on something else than this site's base weight, before they are assigned.

        Args:
            tensors: a state of this adapter, names and shapes already checked.
            source: where they come from, for the message.

        Raises:
            AdapterError: naming the layer and the remedy.
        """

    def reparameterize(self) -> bool:
        """Fold the adapter's own parts into fewer, where the mathematics allows; True if anything changed."""
        return False

    def restore(self) -> None:
        """Undo :meth:`reparameterize`."""

    def prepare_export(self) -> None:
        """Compute with operations that ONNX runtimes have; the numbers stay the same."""


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites of `model` by their full name, in module order."""
    return {module.info.name: module for module in model.modules() if isinstance(module, Site)}


def attached(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters of `model` by name, in the order of attachment (a fresh dict)."""
    return dict(getattr(model, "_samda_adapters", {}))


def attach(model: nn.Module, adapters: Adapters) -> None:
    """Attach adapters to their sites; all of them or, when one refuses, none.

    At this moment the output of the model does not change, unless a config asks for its paper's own initialization.
    Afterwards exactly the adapters' parameters, the class head and what a baseline declares require gradients.

    Args:
        model: a network with sites; attach after its base weights were loaded.
        adapters: names ("salt", or ["salt", "sam_da"]), or name -> settings or config, see
            :func:`samda.adapters.build_configs`. The name is the key under which the adapter is saved and addressed.

    Raises:
        UsageError: an adapter or a setting is unknown or out of range.
        AdapterError: a name is taken or no identifier, a config finds no site, a site cannot be served, or two configs
            exclude each other. The model is unchanged.
    """
    from samda.adapters.attach import (  # it knows every adapter, and each is built on this module
        build_configs,
        check_together,
    )

    if is_merged(model):
        raise AdapterError("adapters are merged; call unmerge before attaching more")
    adapters = build_configs(adapters)
    present = attached(model)
    places = sites(model)
    check_together(adapters, present)
    built = []
    for name, config in adapters.items():
        targets = [site for site in places.values() if config.targets(site.info)]
        if config.roles and not targets:
            raise AdapterError(f"adapter {name!r} finds none of its sites ({', '.join(config.serves())}) in this model")
        config.review(targets)
        built += [(site, name, _build(config, name, site, model)) for site in targets]
    for site, name, adapter in built:
        site.adapters[name] = adapter
    model._samda_adapters = present | adapters  # type: ignore[assignment]
    freeze(model)


def _build(config: AdapterConfig, name: str, site: Site, model: nn.Module) -> Adapter:
    reference = next(site.parameters(), None)
    reference = next(model.parameters()) if reference is None else reference
    # a seed per site: equal layers must not start equal, and no global generator is touched
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{name}/{site.info.name}".encode()))
    with torch.device("meta" if reference.is_meta else "cpu"):
        adapter = config.build(site, generator)
    return adapter.to(reference.device, reference.dtype)


def detach(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Remove adapters (all when `names` is None); the base is as it was before, but for what a baseline trained."""
    names = _names(model, names)
    unmerge(model)
    for site in sites(model).values():
        for name in names:
            if name in site.adapters:
                del site.adapters[name]
    model._samda_adapters = {n: c for n, c in attached(model).items() if n not in names}  # type: ignore[assignment]
    freeze(model)


def modules(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[tuple[str, Site, Adapter]]:
    """The adapter modules of `model` (of all adapters when `names` is None): full path, site, module."""
    names = _names(model, names)
    for path, site in model.named_modules():
        if isinstance(site, Site):
            for name in names:
                if name in site.adapters:
                    yield f"{path}.adapters.{name}", site, site.adapters[name]  # type: ignore[misc]


def adapter_parameters(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The adapters' own parameters by their full name in `model`."""
    found = {}
    for path, _, adapter in modules(model, names):
        own = dict(adapter.named_parameters())
        found.update({f"{path}.{key}": own[key] for key in adapter.adapter_params()})
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


def regularization(model: nn.Module, names: Iterable[str] | None = None) -> torch.Tensor:
    """Sum of the adapters' own penalties (:meth:`Adapter.regularizer`), a scalar; 0 where none has one."""
    terms = [term for _, _, adapter in modules(model, names) if (term := adapter.regularizer()) is not None]
    return torch.stack(terms).sum() if terms else next(model.parameters()).new_zeros(())


def set_enabled(model: nn.Module, enabled: bool, names: Iterable[str] | None = None) -> None:
    """Switch adapters on or off (all when `names` is None).

    Raises:
        AdapterError: adapters are merged, or a named one has no modules (a baseline trains the base itself).
    """
    if is_merged(model):
        raise AdapterError("adapters are merged into the weights; call unmerge before switching them")
    for name in names if names is not None else ():
        if not any(True for _ in modules(model, [name])):
            raise AdapterError(f"adapter {name!r} has no modules and cannot be switched; load the base weights instead")
    for _, _, adapter in modules(model, names):
        adapter.enabled = enabled


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the network answers as the unadapted base does (class head included as it is)."""
    before = [(adapter, adapter.enabled) for _, _, adapter in modules(model)]
    merged = is_merged(model)
    if merged:
        unmerge(model)
    try:
        for adapter, _ in before:
            adapter.enabled = False
        yield
    finally:
        for adapter, state in before:
            adapter.enabled = state
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
        AdapterError: a named adapter cannot be merged, only part of a site's deltas was named, or a merged weight is
            not finite. Nothing is merged then.
    """
    chosen = _names(model, names)
    able = {path.rpartition(".")[2] for path, _, a in modules(model) if a.mergeable and a.enabled}
    if names is not None:
        for name in chosen:
            if name not in able:
                raise AdapterError(f"adapter {name!r} cannot be merged into the base weights; it runs as a module")
        left = [n for n in able if n not in chosen]
        if left:
            raise AdapterError(f"merge also {', '.join(sorted(left))}: deltas are folded together, all or none")
    try:
        for _, site, adapter in modules(model, chosen):
            if adapter.mergeable and isinstance(site, LinearSite | NormSite):
                site.merge()
            else:
                adapter.reparameterize()
    except AdapterError:
        unmerge(model)
        raise
    return [name for name in attached(model) if name in able]


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`; base weights were never touched, so the way back is exact."""
    for site in sites(model).values():
        if isinstance(site, LinearSite | NormSite):
            site.unmerge()
    for _, _, adapter in modules(model):
        adapter.restore()


def is_merged(model: nn.Module) -> bool:
    """Is any site merged, or any adapter reparameterized?"""
    merged = any(site.merged for site in sites(model).values())
    return merged or any(adapter.reparameterized for _, _, adapter in modules(model))


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
