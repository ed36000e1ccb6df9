# SPDX-License-Identifier: Apache-2.0
"""Effective receptive fields of encoders that learned from all slices of patient A, on the slices that are scored.

What a method learned is kept in the cache folder; where it is not, it is trained again. ViT-B appears with random
weights: a check of the mechanism (a large kernel spreads the influence), no statement on any model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from samda.io import cache_dir, replacing
from samda.networks.segmenter import SamSegmenter
from samda.receptive_field import TAPS, area_ratios, measure_erf, rescale

from . import trial
from .methods import METHODS
from .protocol import ALL, TASKS, fingerprint, load

__all__ = ["RANDOM", "field", "keep", "picture", "setup"]

RANDOM = {
    "vit_b": {"head": {}},
    "vit_b, bottleneck_16": METHODS["bottleneck_16"].adapters,
    "vit_b, dka_5": METHODS["dka_5"].adapters,
    "vit_b, dka": METHODS["dka"].adapters,
}
RANDOM_SCALE = 0.5  # of the weights of Up, which are zero in a new adapter
RANDOM_IMAGES = 2  # of the scored slices; ViT-B is slow
SIDE = 64  # pixels of the pictures that are kept


def keep(method: str, network: SamSegmenter) -> None:
    """Keep what was trained on all slices."""
    with replacing(_file(method)) as temporary:
        torch.save(network.state_dict(), temporary)


def _file(method: str) -> Path:
    return cache_dir() / "evidence" / f"network_{method.replace('+', '_')}_{setup(method)}.pt"


def setup(name: str) -> str:
    """Changes with everything that was set for a row."""
    if name in RANDOM:
        return fingerprint(TASKS["abdomen"], RANDOM[name], RANDOM_SCALE, RANDOM_IMAGES)
    return trial.setup("abdomen", METHODS[name])


def field(name: str) -> dict[str, Any]:
    """Areas and a picture for each tap: of a method, or of a ViT-B of :data:`RANDOM`."""
    slices = load("abdomen")
    images = [slices.images[i] for i in slices.test]
    if name in RANDOM:
        network, images = _random(name), images[:RANDOM_IMAGES]
    else:
        network = _trained(name)
    row: dict[str, Any] = {"images": len(images)}
    for tap in TAPS:
        erf = measure_erf(network, images, tap)
        areas = {
            scale: {str(share): None if area.ratio is None else round(area.ratio, 4) for share, area in found.items()}
            for scale, found in area_ratios(erf).items()
        }
        row[tap] = {"skipped": erf.skipped, "areas": areas, "picture": picture(erf.array)}
    return row


def picture(array: np.ndarray) -> list[str]:
    """The map on three decades in SIDE x SIDE bytes, as hexadecimal lines."""
    side = array.shape[0] // SIDE
    coarse = array[: side * SIDE, : side * SIDE].reshape(SIDE, side, SIDE, side).mean((1, 3))
    return [bytes(line).hex() for line in np.rint(rescale(coarse, "normalized") * 85).astype(np.uint8)]


def _trained(method: str) -> SamSegmenter:
    if not _file(method).is_file():
        _, network = trial.run("abdomen", METHODS[method], ALL, 0)
        keep(method, network)
    slices = load("abdomen")
    network = SamSegmenter("vit_t", num_classes=slices.task.num_classes, adapters=dict(METHODS[method].adapters))
    network.load_state_dict(torch.load(_file(method), weights_only=True), strict=False)
    return network


def _random(name: str) -> SamSegmenter:
    torch.manual_seed(0)
    network = SamSegmenter("vit_b", weights=None, adapters=RANDOM[name])
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith("up.weight"):
                parameter.normal_(std=RANDOM_SCALE)
    return network
