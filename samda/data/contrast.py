# SPDX-License-Identifier: Apache-2.0
"""Random tissue contrast: what another scanner, sequence or contrast medium does to gray values, for training."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from scipy import ndimage

__all__ = ["RandTissueContrastd"]

AIR = 0.05  # below this value a pixel fades into air, which is dark on every scanner
POINTS = 6  # of the gray value curve
EDGE = 1.0  # pixels: sigma by which an organ's offset fades out at its border


class RandTissueContrastd(RandomizableTransform):
    """Give a slice other gray values: one curve for all tissue, and an offset of its own for each organ.

    x -> t curve(x) + (1 - t) x + G * sum_k offset_k [label = k], clipped to [0, 1], with t = min(1, x / AIR), so that
    air stays dark, and a small Gaussian G, so that organs keep soft borders. The curve runs through random points mixed
    with the identity; it need not rise, since MR orders tissues differently from CT. Offsets stand for contrast media,
    which brighten organs independently of each other. The idea of location-wise gray value maps: SLAug,
    arXiv 2211.11514.

    Args:
        prob: probability that a slice changes at all.
        curve: largest weight of the random curve, 0 (identity) to 1; the weight is uniform from 0.
        offset: largest offset of an organ, in either direction.
        image_key: {image_key: (C, H, W) in [0, 1]}; all channels change alike.
        label_key: {label_key: (1, H, W) class indices, background 0}; or (C, H, W), where the channels are neighboring
            slices: an organ then shifts in all of them by the same offset, in each where it lies there.
    """

    def __init__(
        self, prob: float, curve: float, offset: float, image_key: str = "image", label_key: str = "label"
    ) -> None:
        super().__init__(prob)
        self.curve, self.offset, self.image_key, self.label_key = curve, offset, image_key, label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        image, label = np.asarray(d[self.image_key], np.float32), np.asarray(d[self.label_key])
        identity = np.linspace(0, 1, POINTS)
        weight = self.R.uniform(0, self.curve)
        curve = (1 - weight) * identity + weight * self.R.uniform(0, 1, POINTS)
        tissue = np.clip(image / AIR, 0, 1)
        changed = tissue * np.interp(image, identity, curve) + (1 - tissue) * image
        offsets = np.zeros(label.shape)
        for k in np.unique(label[label > 0]):
            offsets[label == k] = self.R.uniform(-self.offset, self.offset)
        changed = changed + ndimage.gaussian_filter(offsets, (0, EDGE, EDGE))
        d[self.image_key] = torch.from_numpy(np.clip(changed, 0, 1).astype(np.float32))
        return d
