# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms: from paths to preprocessed volumes, and random changes of slices for training."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapTransform,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    ScaleIntensityRanged,
)

from samda.data.contrast import RandTissueContrastd
from samda.data.intensity import ScaleBodyIntensityd
from samda.data.labels import MapLabelsd
from samda.data.readers import SAME_PLACE, SimpleITKReader, corner_distance_mm
from samda.data.task import Task
from samda.errors import InputError, UsageError, cause_of, nearest

__all__ = [
    "CheckSameGridd",
    "LoadScand",
    "Preprocessing",
    "build_augmentation",
    "build_preprocessing",
    "refuse_lossy_label",
    "refuse_other_grid",
]

RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


class Preprocessing(Compose):
    """MONAI's Compose, except that samda's own errors pass as they are instead of inside RuntimeErrors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            cause = cause_of(error)
            if cause is None:
                raise
            raise cause from None


class LoadScand(LoadImaged):
    """MONAI's LoadImaged with samda's reader and no other: what it refuses is refused.

    Args:
        keys: keys of the paths.
        channels: number of channels a voxel must have.

    Raises:
        InputError: a key is missing, or its file cannot be read (see :func:`samda.data.readers.read_scan`).
    """

    def __init__(self, keys: KeysCollection, channels: int = 1) -> None:
        self.reader = SimpleITKReader(channels)
        super().__init__(keys, dtype=None, image_only=True)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        for key in self.keys:
            if not data.get(key):
                name = data.get("id") or data.get("image") or "without a name"
                raise InputError(f"case {str(name)!r} has no {key}; {nearest(str(key), map(str, data))}")
            if key == "label":
                refuse_lossy_label(data[key])
        return super().__call__(data, reader or self.reader)


class CheckSameGridd(MapTransform):
    """Refuse a label that does not lie on the grid of its image; both in RAS order.

    Corners may be apart by a tenth of the smallest voxel side, which is what formats lose in rounding.

    Args:
        keys: keys of the labels.
        image_key: key of the image.

    Raises:
        InputError: other shape or other place, with both.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.image_key]
        for key in self.key_iterator(d):
            name = str(d[key].meta.get("filename_or_obj", key))
            affines = image.affine.numpy(), d[key].affine.numpy()
            refuse_other_grid(image.shape[1:], affines[0], d[key].shape[1:], affines[1], name)
        return d


def refuse_other_grid(
    image: Sequence[int], image_affine: np.ndarray, label: Sequence[int], label_affine: np.ndarray, name: str
) -> None:
    """Refuse a label on another grid than its image's, both in RAS order.

    Args:
        image: (X, Y, Z) of the image.
        image_affine: (4, 4) voxel index to RAS mm.
        label: (X, Y, Z) of the label.
        label_affine: the same of the label.
        name: of the label's file.

    Raises:
        InputError: other shape or other place, with both.
    """
    if tuple(image) != tuple(label):
        sizes = [" x ".join(map(str, shape)) for shape in (label, image)]
        raise InputError(f"{name} has {sizes[0]} voxels but its image {sizes[1]}; give the label of this very scan")
    apart = corner_distance_mm(image_affine, label_affine, image)
    if apart > SAME_PLACE * np.linalg.norm(image_affine[:3, :3], axis=0).min():
        raise InputError(
            f"{name} lies up to {apart:.2f} mm beside its image; give the label of this very scan, "
            "or resample it to the image's grid"
        )


def refuse_lossy_label(path: str | Path) -> None:
    """Refuse a label file whose format alters ids.

    Raises:
        InputError: it is a JPEG.
    """
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(f"{path} is a label saved as JPEG, which alters ids; save labels as PNG or NIfTI")


def build_preprocessing(
    task: Task, labels: bool, dataset_labels: Mapping[str, tuple[int, ...]] | None = None
) -> Preprocessing:
    """From the paths of a case to a volume the network's slices are cut from.

    {"image": path, "label": path} -> {"image": (C, X, Y, Z) float32 in [0, 1], "label": (1, X, Y, Z) uint8 class
    indices}, both MetaTensors in RAS order on the scan's own grid. Other keys pass.

    Args:
        task: the task.
        labels: read "label" too? Otherwise it is left as it is.
        dataset_labels: the data set's own name -> ids, used where the task has none
            (see :func:`samda.data.labels.label_map`).

    Raises:
        InputError: when called, for a scan or label that cannot be used; the message names it and the remedy.
    """
    keys = ["image", "label"] if labels else ["image"]
    steps: list[Any] = [LoadScand("image", channels=task.in_channels)]
    if labels:
        steps.append(LoadScand("label"))
    steps.append(EnsureChannelFirstd(keys))
    steps.append(Orientationd(keys, axcodes="RAS", labels=RAS_LABELS))
    if labels:
        steps += [CheckSameGridd("label"), MapLabelsd("label", task, dataset_labels)]
    steps.append(ScaleBodyIntensityd("image", task))
    return Preprocessing(steps)


def build_augmentation(task: Task, strength: float = 1.0, tissue: float = 1.0) -> Compose:
    """Random changes of a slice: {"image": (C, H, W) in [0, 1], "label": (1, H, W)} -> the same, as plain tensors.

    Geometry: small rotations, scalings and shifts; no flips, as left and right organs differ. Intensity: strong, so
    that the model meets the tissue contrasts of other scanners and contrast media: a gray value curve and an offset
    per organ (:class:`samda.data.contrast.RandTissueContrastd`), gamma, a bias field, noise and blur. Seed it with
    `set_random_state`.

    Args:
        task: the task.
        strength: 0 changes nothing, 1 is the default, 2 doubles every range.
        tissue: multiplies the ranges of the gray value curve and of the organs' offsets; 0 leaves both out.

    Raises:
        UsageError: a negative number.
    """
    for name, value in (("strength", strength), ("tissue contrast", tissue)):
        if value < 0:
            raise UsageError(f"the {name} of the augmentation must not be negative, got {value}")
    plain = EnsureTyped(["image", "label"], dtype=(torch.float32, torch.uint8), track_meta=False)
    if strength == 0:
        return Compose([plain])
    s = strength
    shift = 0.06 * s * task.image_size  # pixels
    steps: list[Any] = [
        RandAffined(
            ["image", "label"],
            prob=0.8,
            rotate_range=np.deg2rad(12) * s,
            scale_range=(0.15 * s, 0.15 * s),
            translate_range=(shift, shift),
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        plain,
        RandTissueContrastd(prob=min(1.0, 0.7 * s), curve=min(1.0, s * tissue), offset=0.25 * s * tissue),
        RandAdjustContrastd("image", prob=min(1.0, 0.3 * s), gamma=(1 / (1 + 0.6 * s), 1 + 0.6 * s)),
        RandBiasFieldd("image", degree=3, coeff_range=(-0.1 * s, 0.1 * s), prob=min(1.0, 0.3 * s)),
        RandGaussianSmoothd("image", sigma_x=(0.3, 0.3 + s), sigma_y=(0.3, 0.3 + s), prob=min(1.0, 0.2 * s)),
        RandGaussianNoised("image", std=0.15 * s, prob=min(1.0, 0.4 * s)),
        ScaleIntensityRanged("image", a_min=0.0, a_max=1.0, b_min=0.0, b_max=1.0, clip=True),
    ]
    return Compose([*steps, plain])
