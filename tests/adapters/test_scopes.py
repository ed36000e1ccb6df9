# SPDX-License-Identifier: Apache-2.0
"""Scopes of adaptation on a network with one adapter of each sort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn as nn

from samda.adapters import base
from samda.adapters.attach import available_scopes, scope_parameters
from samda.errors import AdapterError, UsageError

EVERYTHING = {"salt": {"rank": 2}, "sam_da": {"side": "both"}, "norm": {}, "decoder": {}}
Make = Callable[..., nn.Module]


def own(model: nn.Module, *names: str) -> set[str]:
    return set(base.adapter_parameters(model, names))


def test_scopes_are_what_adapters_declare(make_segmenter: Make) -> None:
    model = make_segmenter(adapters=EVERYTHING)
    encoder_norms = {name for name in own(model, "norm") if name.startswith("image_encoder.")}
    assert set(scope_parameters(model, "decoder")) == own(model, "sam_da")
    assert set(scope_parameters(model, "norm")) == own(model, "norm")
    assert set(scope_parameters(model, "encoder")) == own(model, "salt") | encoder_norms
    assert set(scope_parameters(model, "decoder+encoder")) == own(model, "sam_da", "salt") | encoder_norms
    gate = scope_parameters(model, "gate")
    assert set(gate) < own(model, "sam_da")
    assert sum(p.numel() for p in gate.values()) == 2 * 131_074  # both sides
    assert available_scopes(model) == ["gate", "decoder", "norm", "encoder", "decoder+encoder"]
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in gate.items())


def test_sizes(make_segmenter: Make) -> None:
    model = make_segmenter(adapters={"sam_da": {}, "lka": {}})

    def size(scope: str) -> int:
        return sum(p.numel() for p in scope_parameters(model, scope).values())

    lka = 4 * (2 * 32 * 8 + 8 * 49 + 2 * 8 + 32)
    assert (size("gate"), size("decoder"), size("decoder+encoder")) == (131_074, 395_522, 395_522 + lka)


@pytest.mark.parametrize(
    ("adapters", "scope", "message"),
    [
        ({"salt": {}}, "decoder", "this model has no parameters in scope 'decoder'; it has: encoder$"),
        ({"sam_da": {}}, "decoder+encoder", "no parameters in scope 'encoder'; it has: gate, decoder$"),
        ({"norm": {"where": "decoder"}}, "gate", "it has: norm$"),
        ({"head": {}}, "decoder", "it has: none"),
        ({"sam_da": {}}, "all", "there is no scope 'all'; choose from decoder, encoder, gate, norm"),
        ({"sam_da": {}}, "decoder+encodr", "there is no scope 'encodr'; did you mean 'encoder'"),
        ({"sam_da": {}}, "", "there is no scope ''"),
    ],
)
def test_empty_and_unknown_scopes_are_refused(adapters: dict, scope: str, message: str, make_segmenter: Make) -> None:
    with pytest.raises((AdapterError, UsageError), match=message):
        scope_parameters(make_segmenter(adapters=adapters), scope)
