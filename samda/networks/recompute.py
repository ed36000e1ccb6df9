# SPDX-License-Identifier: Apache-2.0
"""Activations that a training computes again in its backward pass instead of keeping them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

LARGE = 2**23  # bytes of a block's input from which on some of the block is computed again

_state = threading.local()


def recompute(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function(*inputs)`, of which a backward pass keeps the inputs alone and computes the rest again.

    Within another recomputation it is a plain call: of that nothing is kept anyway.
    """
    if inside_recompute() or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        _state.inside = True
        try:
            return function(*inputs)
        finally:
            _state.inside = False

    return checkpoint(run, *inputs, use_reentrant=False)


def inside_recompute() -> bool:
    """Is this a function of :func:`recompute`, for the first time or again?"""
    return getattr(_state, "inside", False)


def is_large(x: torch.Tensor) -> bool:
    """Is it worth the time to keep less of a transformer block with this input? Kept are 20 times as many bytes.

    A training step of ViT-B with SALT, DKA and SAM-DA at 1024 pixels on a CPU then needs 3.9 GB, with all blocks
    computed again (`checkpointing`) 3.1 GB and 1.2 times the time; see docs/performance.md.
    """
    return x.numel() * x.element_size() > LARGE
