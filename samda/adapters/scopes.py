# SPDX-License-Identifier: Apache-2.0
"""Scopes: which of the trained parameters move when a model is adapted to new scans without labels.

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
"""

from __future__ import annotations

import torch.nn as nn

from samda.adapters.base import modules
from samda.errors import AdapterError, UsageError, nearest

__all__ = ["SCOPES", "available_scopes", "check_scope", "scope_parameters"]

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
