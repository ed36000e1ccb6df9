# SPDX-License-Identifier: Apache-2.0
"""How many slices fit into the memory of a device at once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from samda.errors import UsageError, nearest

__all__ = ["available_mb", "fitting_batch_size"]

DEFAULT = 8  # slices, for which the learning rates of train.json were chosen
PIXELS = 256 * 256  # of the slices that were measured
SHARE = 0.7  # of the memory that is free: the rest is for scans, and for others
# MB (10^6 bytes) of the process with base weights and adapters, and of every slice of 256 x 256 pixels in a training
# step: with adapters in the encoder (flagship), and with adapters in the decoder alone (sam_da, embeddings computed
# before). vit_t and vit_b were measured on a CPU in single precision; vit_l and vit_h are scaled from vit_b, the slices
# by depth x width of the encoder.
MEASURED = {
    "vit_t": (1000.0, 140.0, 20.0),
    "vit_b": (2000.0, 570.0, 20.0),
    "vit_l": (4500.0, 1520.0, 20.0),
    "vit_h": (8500.0, 2540.0, 20.0),
}


def fitting_batch_size(backbone: str, image_size: int, memory_mb: float, encoder: bool = True) -> int:
    """The largest power of two up to 8 that should fit, at least 1.

    Args:
        backbone: "vit_t", "vit_b", "vit_l" or "vit_h".
        image_size: pixels of a slice, both directions.
        memory_mb: free memory (MB).
        encoder: do adapters change the encoder?
    """
    if backbone not in MEASURED:
        raise UsageError(f"unknown backbone {backbone!r}; {nearest(backbone, MEASURED)}")
    fixed, adapted, embedded = MEASURED[backbone]
    per_slice = (adapted if encoder else embedded) * image_size**2 / PIXELS
    fits = (SHARE * memory_mb - fixed) / per_slice
    return next((size for size in (DEFAULT, 4, 2) if size <= fits), 1)


def available_mb(device: str) -> float:
    """Free memory of a device (MB); of the CPU, main memory."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.mem_get_info(kind)[0] / 1e6
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e6
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
