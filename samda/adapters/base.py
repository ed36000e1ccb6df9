# SPDX-License-Identifier: Apache-2.0
"""The interface of adapters: modules at named sites of a frozen network, each with a dataclass of settings.

Freezing, counting, saving, merging and the scopes of test-time adaptation derive from the parameters that an adapter
declares (:meth:`Adapter.adapter_params`). The functions below evaluate them for a whole network.
:mod:`samda.adapters.attach` attaches adapters and has the registry of all methods.

A network provides sites; optionally `head_params()`, the names of the parameters of its class head; and `parts`, its
modules "encoder" and "decoder", for baselines and for :func:`changes_encoder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn

from samda.adapters.sites import Site, SiteInfo, WeightSite
from samda.errors import AdapterError, UsageError
from samda.io import plain

Choices = Mapping[str, tuple[str | None, ...]]  # setting -> its values


class Adapter(nn.Module):
    """One adapter module at one site.

    `forward` depends on the kind of site (see :mod:`samda.adapters.sites`). A weight delta (`linear` and `norm` sites)
    returns the *additive* part and implements `delta()`; that of a `level` has `delta()` only; a module at a token or
    decoder site returns the replacement of its input.
    """

    enabled: bool = True
    mergeable: bool = False  # can it be merged into the base weights?
    reparameterized: bool = False  # are its parts folded into fewer?
    pace: ClassVar[float] = 1.0  # its learning rate in an adaptation, relative to that of the objective

    def adapter_params(self) -> list[str]:
        """Names of the parameters of this adapter (a new list)."""
        return [name for name, _ in self.named_parameters()]

    def scope_params(self) -> dict[str, list[str]]:
        """Parameters by scope of adaptation (see :mod:`samda.adapters.attach`), other than "encoder"."""
        return {}

    def delta(self) -> Any:
        """The change of the base parameter: a tensor of the weight's shape, or (scale, shift) at a norm or a level."""
        raise AdapterError(f"{type(self).__name__} is not a weight delta and cannot be merged into the base weights")

    def fused_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Base layer and delta together, x (W + dW)^T + b, if that is cheaper than their sum; else None."""
        return None

    def rebase(self, weight: torch.Tensor) -> None:
        """Called after base weights were loaded into the site: update derived tensors."""

    def regularizer(self) -> torch.Tensor | None:
        """Penalty of the method on its parameters, a scalar; None if it has none."""
        return None

    def check_state(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Raise AdapterError for a state (names and shapes are checked) that was trained on another base weight."""

    def reparameterize(self) -> bool:
        """Fold parts of the adapter into fewer, if possible; True if anything changed."""
        return False

    def restore(self) -> None:
        """Undo :meth:`reparameterize`."""

    def prepare_export(self) -> None:
        """Use operations that ONNX runtimes support; results do not change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of one adapter. A subclass adds fields, lists its roles and builds the module of a site."""

    name: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ()  # all roles that the adapter supports
    alone: ClassVar[bool] = False  # does it change base weights that other adapters depend on?
    free: ClassVar[tuple[str, ...]] = ("seed", "init")  # settings that may differ when a trained file is loaded
    positive: ClassVar[tuple[str, ...]] = ()  # settings that are integers of at least 1
    choices: ClassVar[Choices] = {}

    seed: int = 0  # of the random initialization; global generators are not used

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # as a Python number, for JSON
                object.__setattr__(self, field.name, value.item())
            if field.type == "bool":
                self.require(field.name, isinstance(getattr(self, field.name), bool), "true or false")
        self.require("seed", is_int(self.seed), "an integer")
        for key in self.positive:
            self.require(key, is_int(getattr(self, key), 1), "an integer of at least 1")
        for key, values in self.choices.items():
            listed = ", ".join("null" if value is None else value for value in values)
            self.require(key, getattr(self, key) in values, f"one of {listed}")

    def require(self, key: str, valid: bool, what: str) -> None:
        """Refuse the setting `key` unless `valid`; `what` describes valid values."""
        if not valid:
            raise UsageError(f"adapter {self.name!r}: {key} must be {what}, got {getattr(self, key)!r}")

    def serves(self) -> tuple[str, ...]:
        """The roles of this adapter with these settings."""
        return self.roles

    def targets(self, info: SiteInfo) -> bool:
        """Is the adapter attached to this site?"""
        return info.role in self.serves()

    def review(self, places: Sequence[Site]) -> None:
        """Check all sites before the first module is built: warn, or raise AdapterError."""

    def build(self, site: Site, generator: torch.Generator) -> Adapter:
        """The module for `site`; AdapterError with site and reason if the site is not supported."""
        raise NotImplementedError

    def base_params(self, model: nn.Module) -> list[str]:
        """Base parameters that the adapter trains (baselines `decoder` and `full`); usually none."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `type` and all settings."""
        return {"type": self.name} | plain(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAdapterConfig(AdapterConfig):
    """Settings of a weight delta for the linear layers of the encoder."""

    roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    layers: tuple[str, ...] = roles  # linear layers of the encoder

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", (self.layers,) if isinstance(self.layers, str) else tuple(self.layers))
        known = all(layer in self.roles for layer in self.layers)
        self.require("layers", bool(self.layers) and known, f"a list out of {', '.join(self.roles)}")

    def serves(self) -> tuple[str, ...]:
        return self.layers


def is_int(value: Any, low: int | None = None) -> bool:
    """Is `value` an integer (not a bool), and at least `low`?"""
    return isinstance(value, int) and not isinstance(value, bool) and (low is None or value >= low)


# Initialization uses an explicit generator; the global random state does not change.


def random_linear(in_features: int, out_features: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    """A linear layer with PyTorch's default distribution, U(-1/sqrt(in), 1/sqrt(in)) for weight and bias."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta")  # without initialization
    layer = layer.to_empty(device=torch.get_default_device())
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    return layer


def random_uniform(*shape: int, bound: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def random_normal(*shape: int, std: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter from N(0, std^2)."""
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def zeros(*shape: int) -> nn.Parameter:
    """A parameter of zeros."""
    return nn.Parameter(torch.zeros(shape))


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites of `model` by full name, in module order."""
    return {module.info.name: module for module in model.modules() if isinstance(module, Site)}


def attached(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters of `model` by name, in the order of attachment (a new dict)."""
    return dict(getattr(model, "_samda_adapters", {}))


def attached_names(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """`names`, or all adapters if None; raises AdapterError for a missing one."""
    present = list(attached(model))
    names = present if names is None else list(names)
    for name in names:
        if name not in present:
            have = ", ".join(present) or "none"
            raise AdapterError(f"there is no adapter {name!r} in this model; attached: {have}")
    return names


def modules(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[tuple[str, Site, Adapter]]:
    """The adapter modules of `model` (of all adapters if `names` is None): full path, site, module."""
    names = attached_names(model, names)
    for path, site in model.named_modules():
        if isinstance(site, Site):
            for name in names:
                if name in site.adapters:
                    yield f"{path}.adapters.{name}", site, site.adapters[name]  # type: ignore[misc]


def adapter_parameters(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of adapters by full name."""
    found = {}
    for path, _, adapter in modules(model, names):
        own = dict(adapter.named_parameters())
        found.update({f"{path}.{key}": own[key] for key in adapter.adapter_params()})
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained and saved: of adapters, class head and baselines."""
    names = set(adapter_parameters(model)) | _head(model)
    for config in attached(model).values():
        names |= set(config.base_params(model))
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the pre-trained SAM, without adapters and class head."""
    outside = set(adapter_parameters(model)) | _head(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in outside}


def _head(model: nn.Module) -> set[str]:
    return set(getattr(model, "head_params", list)())


def in_part(model: nn.Module, part: str, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of `parameters` in a part of `model`, "encoder" or "decoder", with its adapters.

    Empty if the model does not have the part.
    """
    module = getattr(model, "parts", {}).get(part)
    inside = {id(parameter) for parameter in module.parameters()} if module is not None else set()
    return [name for name, parameter in parameters.items() if id(parameter) in inside]


def changes_encoder(model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> bool:
    """Are any of `parameters` (None: the trained ones) in the encoder?

    If not, the embedding of an image is constant and can be cached.
    """
    return bool(in_part(model, "encoder", trainable_parameters(model) if parameters is None else parameters))


def freeze(model: nn.Module) -> None:
    """Set `requires_grad` for exactly :func:`trainable_parameters`."""
    trainable = {id(parameter) for parameter in trainable_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameter counts: one entry per adapter, `head` (class head), `trainable` and `base`."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    groups = {name: {*adapter_parameters(model, [name]), *c.base_params(model)} for name, c in attached(model).items()}
    groups |= {"head": _head(model), "trainable": set(trainable_parameters(model)), "base": set(base_parameters(model))}
    return {group: sum(sizes[name] for name in names) for group, names in groups.items()}


def regularization(model: nn.Module, names: Iterable[str] | None = None) -> torch.Tensor:
    """Sum of the penalties of adapters (:meth:`Adapter.regularizer`), a scalar; 0 if there are none.

    Only SALT has one. A training adds it to the loss with a weight, by default 0 as published.
    """
    terms = [term for _, _, adapter in modules(model, names) if (term := adapter.regularizer()) is not None]
    return torch.stack(terms).sum() if terms else next(model.parameters()).new_zeros(())


@contextlib.contextmanager
def disabled(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[None]:
    """Disable adapters within the block (all if `names` is None).

    The class head and base weights trained by a baseline do not change. Merged adapters are merged again afterwards.

    Raises:
        AdapterError: a named adapter has no modules (a baseline).
    """
    for name in names if names is not None else ():
        if not any(True for _ in modules(model, [name])):
            raise AdapterError(f"adapter {name!r} has no modules and cannot be switched; load the base weights instead")
    before = [(adapter, adapter.enabled) for _, _, adapter in modules(model, names)]
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
    """Merge adapters for inference at the cost of the base model; returns the names of merged adapters. Idempotent.

    Weight deltas are added to a copy of the weight (the base weight is never changed); kernel adapters fold their two
    kernels into one. Other adapters do not change, unless they are in `names`.

    Raises:
        AdapterError: a named adapter cannot be merged, only some of the deltas of a site are named, or a merged weight
            is not finite. Nothing is merged.
    """
    chosen = attached_names(model, names)
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
            if adapter.mergeable and isinstance(site, WeightSite):
                site.merge()
            else:
                adapter.reparameterize()
    except AdapterError:
        unmerge(model)
        raise
    return [name for name in attached(model) if name in able]


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`, exactly, because base weights are never changed."""
    for site in sites(model).values():
        if isinstance(site, WeightSite):
            site.unmerge()
    for _, _, adapter in modules(model):
        adapter.restore()


def is_merged(model: nn.Module) -> bool:
    """Is any site merged, or any adapter reparameterized?"""
    merged = any(site.merged for site in sites(model).values())
    return merged or any(adapter.reparameterized for _, _, adapter in modules(model))
