# SPDX-License-Identifier: Apache-2.0
"""MONAI's DynUNet from scratch, in two and in three dimensions.

Dice + cross-entropy, AdamW, random affine maps and gray values, patches of which every class has its share. The budget
is CPU time, so the learning rate follows the share of it that is spent: at the end it is 0, however many steps this
machine made. Scans stay on their own grid; their gray values are standardized one by one.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)

from samda.data import read_scan
from samda.inference import Prediction

FILTERS = {2: (32, 64, 128, 256, 256), 3: (24, 48, 96, 192)}
LARGEST = {2: 256, 3: 64}  # side of a patch
RATE = 3e-3

Item = dict[str, torch.Tensor]  # "image" (C, ...) and "label" (1, ...)


def rate(spent: float) -> float:
    """The learning rate, RATE (1 - spent)^0.9, after the share `spent` of the training."""
    return RATE * (1 - min(1.0, spent)) ** 0.9


def patch_of(items: Sequence[Item], dimensions: int) -> tuple[int, ...]:
    """Sides of the patches: of the largest item, a multiple of 16, at most `LARGEST`."""
    sides = [max(item["image"].shape[1 + axis] for item in items) for axis in range(dimensions)]
    return tuple(min(LARGEST[dimensions], 16 * math.ceil(side / 16)) for side in sides)


def batch_of(patch: Sequence[int]) -> int:
    """Patches of a step: two, and more of small ones."""
    return max(2, min(16, 2**17 // math.prod(patch)))


def build_unet(dimensions: int, channels: int, num_classes: int) -> DynUNet:
    """The network; logits at the size of its input."""
    filters = FILTERS[dimensions]
    strides = [1] + [2] * (len(filters) - 1)
    return DynUNet(
        spatial_dims=dimensions,
        in_channels=channels,
        out_channels=num_classes,
        kernel_size=[3] * len(filters),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=list(filters),
        norm_name=("INSTANCE", {"affine": True}),
    )


def read_image(path: str, channels: int | None = None) -> torch.Tensor:
    """(C, X, Y, Z), each channel with mean 0 and deviation 1; a gray scan is repeated over the channels."""
    array = np.asarray(read_scan(path, None).array, np.float32)
    image = torch.from_numpy(array if array.ndim == 4 else array[..., None]).movedim(-1, 0)
    axes = (1, 2, 3)
    image = (image - image.mean(axes, keepdim=True)) / (image.std(axes, keepdim=True) + 1e-6)
    return image if channels in (None, len(image)) else image[:1].repeat(channels, 1, 1, 1)


def read_items(cases: Sequence[dict[str, str]], dimensions: int) -> list[Item]:
    """The volumes, or all their slices along Z; every item has as many channels as the richest case."""
    images = [read_image(case["image"]) for case in cases]
    channels, items = max(len(image) for image in images), []
    for case, image in zip(cases, images, strict=True):
        label = torch.from_numpy(np.asarray(read_scan(case["label"]).array, np.uint8))[None]
        volume = {"image": image if len(image) == channels else image[:1].repeat(channels, 1, 1, 1), "label": label}
        if dimensions == 3:
            items.append(volume)
        else:
            items += [{key: value[..., z] for key, value in volume.items()} for z in range(label.shape[-1])]
    return items


def build_augmentation(patch: Sequence[int], num_classes: int) -> Compose:
    """A patch at random, bent and with other gray values; of three patches one is centered on a foreground class."""
    keys, turn = ("image", "label"), 0.3 if len(patch) == 2 else (0.3,) * 3
    ratios = [2.0] + [1 / (num_classes - 1)] * (num_classes - 1)
    return Compose(
        [
            SpatialPadd(keys, patch),
            RandCropByLabelClassesd(keys, "label", patch, ratios, num_classes, num_samples=1, warn=False),
            RandAffined(
                keys,
                prob=0.8,
                rotate_range=turn,
                shear_range=(0.1,) * len(patch) if len(patch) == 2 else (0.1,) * 6,
                scale_range=(0.2,) * len(patch),
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandScaleIntensityd("image", 0.25, prob=0.5),
            RandShiftIntensityd("image", 0.25, prob=0.5),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            RandGaussianNoised("image", prob=0.3, std=0.15),
        ]
    )


def train_unet(
    lists: Sequence[Path], output: Path, classes: tuple[str, ...], cpu_seconds: float, seed: int, dimensions: int
) -> dict[str, Any]:
    """Train on the first list until the CPU time is spent, reading included; write a folder of label maps per list.

    Returns:
        {"cpu_seconds", "steps", "parameters", "patch", "batch"}
    """
    start = time.process_time()
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in lists]
    items = read_items(contents[0]["training"], dimensions)
    torch.manual_seed(seed)
    network = build_unet(dimensions, len(items[0]["image"]), len(classes))
    patch = patch_of(items, dimensions)
    steps, spent = _train(network, items, patch, len(classes), cpu_seconds, seed, start)
    for file, content in zip(lists, contents, strict=True):
        for case in content["test"]:
            predict(network.eval(), case, patch, classes).save(output / file.stem)
    return {
        "cpu_seconds": round(spent, 1),
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "patch": list(patch),
        "batch": batch_of(patch),
    }


def _train(
    network: DynUNet,
    items: Sequence[Item],
    patch: Sequence[int],
    num_classes: int,
    cpu_seconds: float,
    seed: int,
    start: float,
) -> tuple[int, float]:
    """Steps made and CPU seconds spent since `start`."""
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimizer = torch.optim.AdamW(network.parameters(), rate(0), weight_decay=1e-4)
    augmentation, order = build_augmentation(patch, num_classes), random.Random(seed)
    augmentation.set_random_state(seed=seed)
    network.train()
    steps = 0
    while (spent := time.process_time() - start) < cpu_seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate(spent / cpu_seconds)
        drawn = [augmentation(order.choice(items))[0] for _ in range(batch_of(patch))]
        images, labels = (torch.stack([item[key].as_tensor() for item in drawn]) for key in ("image", "label"))
        optimizer.zero_grad(set_to_none=True)
        loss(network(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        steps += 1
    return steps, spent


@torch.no_grad()
def predict(network: DynUNet, case: dict[str, str], patch: Sequence[int], classes: tuple[str, ...]) -> Prediction:
    """The label map of a case on its own grid."""
    image = read_image(case["image"], network.in_channels)
    parts = image[None] if len(patch) == 3 else image.movedim(-1, 0)  # slices side by side are a batch
    logits = sliding_window_inference(parts, patch, 4, network, overlap=0.5, mode="gaussian")
    labels = logits.argmax(1)
    labels = labels[0] if len(patch) == 3 else labels.movedim(0, -1)
    affine = read_scan(case["image"], None).affine
    return Prediction(case["id"], labels.numpy().astype(np.uint8), affine, classes, Path(case["image"]))
