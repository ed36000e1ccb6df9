# SPDX-License-Identifier: Apache-2.0
"""Effective receptive fields of encoders (`samda erf`), with a picture for each place where they are tapped.

ViT-B appears with random weights: a check of the mechanism (a large kernel spreads the influence), not a statement on
any model. What training does to the field is measured with the models of the hippocampus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from samda import SamSegmenter, fetch_examples
from samda.inference import area_ratios, body_slices, measure_erf
from samda.receptive_field import TAPS, rescale

BOTTLENECK = {"width": 16, "bias": False}  # DKA without its kernels
KERNEL = {"type": "lka", "kernel_size": 5, "width": 16, "bias": False, "act": "post", "placement": "after"}
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "vit_t, frozen": {"head": {}},
    "vit_b, random": {"head": {}},
    "vit_b, random, bottleneck": {"bottleneck": BOTTLENECK},
    "vit_b, random, small kernel": {"dka_5": KERNEL},
    "vit_b, random, DKA": {"dka": {}},
}
RANDOM_SCALE = 0.5  # of the weights of Up, which are zero in a new adapter
IMAGES, RANDOM_IMAGES = 12, 2  # slices of patient A; ViT-B is slow
SIDE = 64  # pixels of the pictures that are kept


def measure_network(name: str) -> dict[str, Any]:
    """Areas and pictures of a network of `NETWORKS`, on slices of patient A of the examples."""
    example, random = fetch_examples()["A"], "random" in name
    images = body_slices([example.case], example.task, RANDOM_IMAGES if random else IMAGES)
    torch.manual_seed(0)
    network = SamSegmenter(name.split(",")[0], weights=None if random else "pretrained", adapters=NETWORKS[name])
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith("up.weight"):
                parameter.normal_(std=RANDOM_SCALE)
    return measure(network, images)


def measure(network: SamSegmenter, images: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Tap -> {"areas": scale -> share of the influence -> share of the image, "picture": hexadecimal lines}."""
    row: dict[str, Any] = {"images": len(images)}
    for tap in TAPS:
        erf = measure_erf(network, images, tap)
        areas = {
            scale: {str(share): None if area.ratio is None else round(area.ratio, 4) for share, area in found.items()}
            for scale, found in area_ratios(erf).items()
        }
        row[tap] = {"areas": areas, "picture": picture(erf.array)}
    return row


def picture(array: np.ndarray) -> list[str]:
    """The map on three decades in at most SIDE x SIDE bytes, as hexadecimal lines."""
    step = max(1, array.shape[0] // SIDE)
    rows = array.shape[0] // step
    coarse = array[: rows * step, : rows * step].reshape(rows, step, rows, step).mean((1, 3))
    return [bytes(line).hex() for line in np.rint(rescale(coarse, "normalized") * 85).astype(np.uint8)]
