# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared, by name: their adapters, and the rate at which these learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["ABLATIONS", "ENCODER", "FRESH", "FROZEN", "METHODS", "Method"]


@dataclasses.dataclass(frozen=True)
class Method:
    """Adapters (name -> settings) on the class head.

    Attributes:
        adapters: see :func:`samda.adapters.build_configs`.
        rate: of the adapters, or of the base where a baseline trains it.
        encoder: does every step encode its slices, in views that no step before has seen? Otherwise they are encoded
            once, in the few views of :mod:`.protocol`.
    """

    adapters: Mapping[str, Mapping[str, Any]]
    rate: float = 1e-3
    encoder: bool = True


def _kernel(size: int, **settings: Any) -> dict[str, dict[str, Any]]:
    """DKA with one kernel: width, place and activation of DKA."""
    return {f"dka_{size}": {"type": "lka", "kernel_size": size, "width": 16, "bias": False, "act": "post"} | settings}


METHODS: dict[str, Method] = {
    "head": Method({"head": {}}, encoder=False),
    "decoder": Method({"decoder": {}}, 5e-4, encoder=False),
    "sam_da": Method({"sam_da": {}}, 3e-3, encoder=False),
    "head_fresh": Method({"head": {}}),  # what fresh views alone are worth
    "sam_da_fresh": Method({"sam_da": {}}, 3e-3),
    "bottleneck": Method({"bottleneck": {}}),
    "bottleneck_16": Method({"bottleneck": {"width": 16, "bias": False}}),  # DKA without its kernels
    "lora": Method({"lora": {}}, 3e-3),
    "salt": Method({"salt": {}}, 3e-3),
    "s_sam": Method({"salt": {"r": 1.0}}, 3e-3),
    "lka": Method({"lka": {}}),
    "dka": Method({"dka": {}}),
    "dka_51": Method(_kernel(51, placement="after")),
    "dka_5": Method(_kernel(5, placement="after")),
    "salt+sam_da": Method({"salt": {}, "sam_da": {}}, 3e-3),
    "salt+dka+sam_da": Method({"salt": {}, "dka": {}, "sam_da": {}}),
    "full": Method({"full": {}}, 3e-4),
}
FROZEN = tuple(name for name, method in METHODS.items() if not method.encoder)
FRESH = ("head_fresh", "sam_da_fresh")
ENCODER = tuple(name for name, method in METHODS.items() if method.encoder and name not in FRESH)  # these change it

# ablation -> row -> method; a row that the main table has stands there under its own name
ABLATIONS: dict[str, dict[str, Method]] = {
    "LKA, kernel and placement": {
        "kernel 7, parallel": METHODS["lka"],
        "kernel 3": Method({"lka": {"kernel_size": 3}}),
        "kernel 5": Method({"lka": {"kernel_size": 5}}),
        "kernel 11": Method({"lka": {"kernel_size": 11}}),
        "kernel 31": Method({"lka": {"kernel_size": 31}}),
        "kernel 7, after the sum": Method({"lka": {"placement": "after"}}),
    },
    "DKA, kernels": {
        "51 + 5": METHODS["dka"],
        "31 + 5": Method({"dka": {"large_kernel": 31}}),
        "51 alone": METHODS["dka_51"],
        "5 alone": METHODS["dka_5"],
        "none (bottleneck of the same width)": METHODS["bottleneck_16"],
    },
    "SALT, r, d and ReLU": {
        "r = k - 8, d = 4": METHODS["salt"],
        "r = k (S-SAM)": METHODS["s_sam"],
        "r = 0, d = 4": Method({"salt": {"r": 0}}, 3e-3),
        "r = k - 8, d = 1": Method({"salt": {"rank": 1}}, 3e-3),
        "r = 0, d = 16": Method({"salt": {"r": 0, "rank": 16}}, 3e-3),
        "r = k - 8, d = 4, no ReLU": Method({"salt": {"activation": None}}, 3e-3),
    },
    "SAM-DA, side and prompts": {
        "image, 2 prompts": METHODS["sam_da"],
        "token, 2 prompts": Method({"sam_da": {"side": "token"}}, 3e-3, encoder=False),
        "both, 2 prompts": Method({"sam_da": {"side": "both"}}, 3e-3, encoder=False),
        "image, 8 prompts": Method({"sam_da": {"num_prompts": 8}}, 3e-3, encoder=False),
        "image, 64 prompts": Method({"sam_da": {"num_prompts": 64}}, 3e-3, encoder=False),
    },
}
