# SPDX-License-Identifier: Apache-2.0
"""Settings of adapters: one frozen dataclass a method, checked when it is made, plain values when it is saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn as nn

from samda.adapters.sites import Site, SiteInfo
from samda.errors import UsageError

if TYPE_CHECKING:
    from samda.adapters.base import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of one adapter. A subclass adds fields, states the roles it serves and builds the module of a site."""

    name: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ()  # all roles that this kind of adapter can serve
    alone: ClassVar[bool] = False  # does it move what other adapters build on?
    free: ClassVar[tuple[str, ...]] = ("seed", "init")  # settings that may differ when a trained file is loaded

    seed: int = 0  # of the adapter's own random initialization; the global generators stay untouched

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # numpy's numbers as Python's, which is what a file of adapters holds
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        self.require("seed", is_int(self.seed), "an integer")

    def serves(self) -> tuple[str, ...]:
        """The roles that this adapter goes to with these settings."""
        return self.roles

    def targets(self, info: SiteInfo) -> bool:
        """Does this adapter go to that site?"""
        return info.role in self.serves()

    def review(self, places: Sequence[Site]) -> None:
        """Look at all of its sites at once before the first is built: warn, or raise AdapterError."""

    def build(self, site: Site, generator: torch.Generator) -> Adapter:
        """The module for `site`; it raises AdapterError with the place and the reason where it cannot serve it."""
        raise NotImplementedError

    def base_params(self, model: nn.Module) -> list[str]:
        """Base parameters that this "adapter" trains itself (the baselines `decoder` and `full`); usually none."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `type` and every setting."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"type": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def require(self, key: str, valid: bool, what: str) -> None:
        """Refuse the setting `key` unless `valid`; `what` says what it must be."""
        if not valid:
            raise UsageError(f"adapter {self.name!r}: {key} must be {what}, got {getattr(self, key)!r}")

    def require_choice(self, key: str, choices: Iterable[str | None]) -> None:
        """Refuse the setting `key` unless it is one of `choices`."""
        choices = list(choices)
        listed = ", ".join("null" if choice is None else choice for choice in choices)
        self.require(key, getattr(self, key) in choices, f"one of {listed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAdapterConfig(AdapterConfig):
    """Settings of a weight delta for the linear layers of the encoder."""

    roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    layers: tuple[str, ...] = roles  # which of the encoder's linear layers

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", (self.layers,) if isinstance(self.layers, str) else tuple(self.layers))
        known = all(layer in self.roles for layer in self.layers)
        self.require("layers", bool(self.layers) and known, f"a list out of {', '.join(self.roles)}")

    def serves(self) -> tuple[str, ...]:
        return self.layers


def is_int(value: Any, low: int | None = None) -> bool:
    """Is `value` an integer (no bool), and at least `low`?"""
    return isinstance(value, int) and not isinstance(value, bool) and (low is None or value >= low)


def is_number(value: Any) -> bool:
    """Is `value` a finite real number (no bool)?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
