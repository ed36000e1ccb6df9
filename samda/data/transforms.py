# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms: preprocessing of scans from paths to volumes in [0, 1], and augmentation of slices.

:class:`RandTissueContrastd` simulates other scanners, sequences and contrast media.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    MapTransform,
    Orientationd,
    Rand2DElasticd,
    RandAdjustContrastd,
    RandBiasFieldd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    ScaleIntensityRanged,
)
from scipy import ndimage

from samda.data.body import coarse_body
from samda.data.dicom_files import dicom_modality, is_dicom, is_series
from samda.data.labels import OPEN, MapLabelsd, PartialLabels
from samda.data.readers import Scan, read_label, read_scan, refuse_other_grid, uncropped
from samda.errors import InputError, UsageError, cause_of, nearest
from samda.io import files_of
from samda.task import Task

AIR = 0.05  # pixels fade into air below this value; air is dark on every scanner
POINTS = 6  # of the intensity curve
SCANNERS = ("CT", "MR", "US", "CR", "DX", "MG", "XA", "RF")  # modalities of DICOM; those of other images are not known
EDGE = 1.0  # pixels; sigma of the smoothing of offsets at organ borders


class RandTissueContrastd(RandomizableTransform):
    """Random intensities: a curve for all tissues and an offset for each organ.

    x -> t curve(x) + (1 - t) x + G * sum_k offset_k [label = k], clipped to [0, 1], with t = min(1, x / AIR), so that
    air stays dark, and a small Gaussian G, so that organs keep soft borders. The curve interpolates random points mixed
    with the identity and need not be monotonic, because the order of tissues in MR differs from CT. Offsets simulate
    contrast media. Compare the location-scale augmentation of SLAug, arXiv 2211.11514.

    It takes "image" (C, H, W) in [0, 1], with the same curve for all channels, and "label" (1, H, W), class indices; or
    (C, H, W) for neighboring slices as channels, with the same offset of an organ in all of them.

    Args:
        prob: probability of a change.
        curve: largest weight of the random curve, 0 (identity) to 1; the weight is uniform from 0.
        offset: largest offset of an organ, in either direction.
    """

    def __init__(self, prob: float, curve: float, offset: float) -> None:
        super().__init__(prob)
        self.curve, self.offset = curve, offset

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        image, label = np.asarray(d["image"], np.float32), np.asarray(d["label"])
        identity = np.linspace(0, 1, POINTS)
        weight = self.R.uniform(0, self.curve)
        curve = (1 - weight) * identity + weight * self.R.uniform(0, 1, POINTS)
        tissue = np.clip(image / AIR, 0, 1)
        changed = tissue * np.interp(image, identity, curve) + (1 - tissue) * image
        offsets = np.zeros(label.shape)
        for k in np.unique(label[(label > 0) & (label < OPEN)]):
            offsets[label == k] = self.R.uniform(-self.offset, self.offset)
        changed = changed + ndimage.gaussian_filter(offsets, (0, EDGE, EDGE))
        d["image"] = torch.from_numpy(np.clip(changed, 0, 1).astype(np.float32))
        return d


def intensity_range(image: np.ndarray, spacing_mm: np.ndarray, task: Task) -> tuple[float, float]:
    """The two intensities that are mapped to 0 and 1.

    CT: window of the task in HU. MR: percentiles inside the body, independent of the amount of air. 2-D images:
    percentiles of all pixels and channels together, which preserves colors.

    `image` is (C, X, Y, Z), RAS; for MR one channel, because sequences have different scales.
    """
    if task.modality == "CT":
        return task.window
    samples = image
    if task.modality == "MR":
        values, mask, _ = coarse_body(image[0], spacing_mm, task, scaled=False)
        samples = values[mask]
    low, high = np.percentile(samples, task.percentiles)
    return float(low), float(high)


class ScaleBodyIntensityd(MapTransform):
    """Map the intensities of a scan (C, X, Y, Z) to [0, 1], float32, clipped; see :func:`intensity_range`.

    The last axis is outermost in memory, for fast access to axial slabs.
    """

    def __init__(self, keys: KeysCollection, task: Task) -> None:
        super().__init__(keys)
        self.task = task

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            if image.meta.get("filename_or_obj"):
                self._refuse_other_scanner(Path(image.meta["filename_or_obj"]))
            scaled = self._scale(image.as_tensor(), image.pixdim.numpy(), str(image.meta.get("filename_or_obj", key)))
            d[key] = MetaTensor(scaled, meta=image.meta, applied_operations=image.applied_operations)
        return d

    def _refuse_other_scanner(self, path: Path) -> None:
        """A DICOM series states its modality: HU are those of CT alone, and CT is no MR."""
        wanted = self.task.modality
        if wanted == "image" or not (is_series(path) or is_dicom(path)):
            return
        stated = dicom_modality(path) or ""
        if stated in SCANNERS and stated != wanted and "CT" in (stated, wanted):
            remedy = f", or say that it is {stated} (--modality {stated})" if stated == "MR" else ""
            raise InputError(
                f"{path} is of modality {stated}, but the task is for {wanted}; give {wanted} scans{remedy}"
            )

    def _scale(self, image: torch.Tensor, spacing_mm: np.ndarray, name: str) -> torch.Tensor:
        channels, x, y, z = image.shape
        scaled = torch.empty((channels, z, y, x), dtype=torch.float32).permute(0, 3, 2, 1)
        scaled.copy_(image)
        each = self.task.modality == "MR" and channels > 1  # MR sequences differ in scale
        for part in [slice(k, k + 1) for k in range(channels)] if each else [slice(None)]:
            what = f"channel {part.start} of {name}" if each else name
            low, high = self._limits(image[part], spacing_mm, what)
            scaled[part].sub_(low).div_(high - low).clamp_(0, 1)  # in place: scans are large
        return scaled

    def _limits(self, image: torch.Tensor, spacing_mm: np.ndarray, name: str) -> tuple[float, float]:
        """The intensities that are mapped to 0 and 1; an image that is mapped to one value is refused."""
        smallest, largest = (float(v) for v in image.aminmax())  # NaN if any voxel is NaN
        if not (np.isfinite(smallest) and np.isfinite(largest)):
            raise InputError(f"{name} contains NaN or infinite values; replace them")
        if smallest == largest:
            raise InputError(f"{name} is constant ({smallest:g} everywhere); check the file")
        low, high = intensity_range(image.numpy(), spacing_mm, self.task)
        if largest <= low or smallest >= high or low >= high:
            what = f"the range {low:g} to {high:g} of percentiles {self.task.percentiles}"
            what = f"the window {low:g} to {high:g} HU" if self.task.modality == "CT" else what
            raise InputError(
                f"{name} has values {smallest:g} to {largest:g}, which {what} maps to one value; check the units of "
                "the file and the modality, window and percentiles of the task"
            )
        if self.task.modality == "CT" and smallest >= 0:
            warnings.warn(f"{name} has no value below 0; a CT in Hounsfield units has air near -1000", stacklevel=2)
        return low, high


RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


class Preprocessing(Compose):
    """MONAI's Compose, but errors of samda are not wrapped in RuntimeErrors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            cause = cause_of(error)
            if cause is None:
                raise
            raise cause from None


class LoadScand(MapTransform):
    """Paths -> MetaTensors of scans, or of label files, with affine and geometry of the file.

    MONAI's LoadImaged falls back to other readers where a file is refused. For the arguments, see `read_scan` and, with
    `labels`, `read_label` of :mod:`samda.data.readers`.
    """

    def __init__(
        self, keys: KeysCollection, channels: int = 1, labels: bool = False, wanted: Collection[int] | None = None
    ) -> None:
        super().__init__(keys)
        self.channels, self.labels, self.wanted = channels, labels, wanted

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            path = d.get(key)
            if not path:
                name = d.get("id") or d.get("image") or "without a name"
                raise InputError(f"case {str(name)!r} has no {key}; {nearest(str(key), map(str, d))}")
            if self.labels:
                image = d.get("image")  # to its series a DICOM label belongs
                image = image.meta["filename_or_obj"] if isinstance(image, MetaTensor) else image
                scan = read_label(path, image, self.wanted)
            else:
                scan = read_scan(path, self.channels)
            affine = torch.from_numpy(scan.affine.copy())
            meta = {
                "affine": affine,
                "original_affine": scan.affine.copy(),
                "spatial_shape": np.asarray(scan.array.shape[:3]),
                "original_channel_dim": -1 if scan.array.ndim == 4 else float("nan"),
                "space": "RAS",
                "filename_or_obj": str(files_of(path)[0]),
            }
            d[key] = MetaTensor(torch.from_numpy(np.ascontiguousarray(scan.array)), meta=meta)
        return d


class CheckSameGridd(MapTransform):
    """Refuse a label that is not on the grid of "image", see :func:`samda.data.readers.refuse_other_grid`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d["image"]
        grid = tuple(image.shape[1:]), image.affine.numpy()
        for key in self.key_iterator(d):
            name = d[key].meta.get("filename_or_obj", key)
            label = uncropped(Scan(d[key][0].numpy(), d[key].affine.numpy()), grid, name)
            refuse_other_grid(label.array.shape, label.affine, grid, (name, "its image"))
            if label.array.shape != d[key].shape[1:]:
                meta = d[key].meta | {"spatial_shape": np.asarray(label.array.shape)}
                d[key] = MetaTensor(torch.from_numpy(label.array[None]), affine=image.affine, meta=meta)
        return d


def build_preprocessing(
    task: Task,
    labels: bool,
    dataset_labels: Mapping[str, tuple[int, ...]] | None = None,
    partial: PartialLabels | None = None,
) -> Preprocessing:
    """Read and preprocess the volume of a case.

    {"image": path, "label": path} -> {"image": (C, X, Y, Z) float32 in [0, 1], "label": (1, X, Y, Z) uint8 class
    indices}, both MetaTensors in RAS order on the grid of the scan. "label" is read only with `labels`; other keys are
    passed through. For `dataset_labels` and `partial`, see :class:`samda.data.labels.MapLabelsd`.
    """
    keys = ["image", "label"] if labels else ["image"]
    steps: list[Any] = [LoadScand("image", channels=task.in_channels)]
    if labels:
        mapping = MapLabelsd("label", task, dataset_labels, partial)
        steps.append(LoadScand("label", labels=True, wanted=mapping.map.wanted))
    steps.append(EnsureChannelFirstd(keys))
    steps.append(Orientationd(keys, axcodes="RAS", labels=RAS_LABELS))
    if labels:
        steps += [CheckSameGridd("label"), mapping]
    steps.append(ScaleBodyIntensityd("image", task))
    return Preprocessing(steps)


def build_augmentation(task: Task, strength: float = 1.0, tissue: float = 1.0, tissue_share: float = 0.25) -> Compose:
    """Augmentation of a slice: {"image": (C, H, W) in [0, 1], "label": (1, H, W)} -> the same, as plain tensors.

    Geometry: rotation, scale, shear and shift with an elastic deformation; where the task says `mirror`, half of the
    slices are mirrored left to right.
    Intensity: strong, so that the model meets the tissue contrasts of other scanners and contrast media: a gray value
    curve and an offset per organ (:class:`samda.data.transforms.RandTissueContrastd`), gamma, contrast and brightness,
    a bias field, noise, blur and lower resolution. Seed it with `set_random_state`.

    Args:
        task: the task.
        strength: factor of all ranges; 0 disables the augmentation.
        tissue: factor of the ranges of the tissue contrast; 0 disables it.
        tissue_share: share of the slices with another tissue contrast. More of them prepare for another modality and
            cost accuracy on scans like those of the training.
    """
    for name, value in (("strength", strength), ("tissue contrast", tissue), ("tissue share", tissue_share)):
        if value < 0:
            raise UsageError(f"the {name} of the augmentation must not be negative, got {value}")
    plain = EnsureTyped(["image", "label"], dtype=(torch.float32, torch.uint8), track_meta=False)
    if strength == 0:
        return Compose([plain])
    s, size = strength, task.image_size
    shift = 0.08 * s * size  # pixels
    steps: list[Any] = [
        Rand2DElasticd(
            ["image", "label"],
            spacing=(max(4, size // 6),) * 2,
            magnitude_range=(0, 0.015 * s * size),  # pixels, a standard deviation
            prob=0.9,
            rotate_range=np.deg2rad(20) * s,
            shear_range=(0.1 * s, 0.1 * s),
            translate_range=(shift, shift),
            scale_range=((-0.2 * s, 0.25 * s),) * 2,
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        plain,
        # rarely: offsets show where the organs are, and cost accuracy on scans of the same kind
        RandTissueContrastd(prob=min(1.0, tissue_share * s), curve=min(1.0, s * tissue), offset=0.25 * s * tissue),
        RandAdjustContrastd("image", prob=min(1.0, 0.5 * s), gamma=(1 / (1 + 0.6 * s), 1 + 0.6 * s)),
        RandScaleIntensityd("image", factors=0.2 * s, prob=min(1.0, 0.5 * s)),
        RandShiftIntensityd("image", offsets=0.1 * s, prob=min(1.0, 0.5 * s)),
        RandBiasFieldd("image", degree=3, coeff_range=(-0.15 * s, 0.15 * s), prob=min(1.0, 0.3 * s)),
        RandGaussianSmoothd("image", sigma_x=(0.3, 0.3 + s), sigma_y=(0.3, 0.3 + s), prob=min(1.0, 0.2 * s)),
        RandSimulateLowResolutiond(
            "image", prob=min(1.0, 0.2 * s), zoom_range=(1 / (1 + s), 1.0), upsample_mode="bilinear"
        ),
        RandGaussianNoised("image", std=0.1 * s, prob=min(1.0, 0.5 * s)),
        ScaleIntensityRanged("image", a_min=0.0, a_max=1.0, b_min=0.0, b_max=1.0, clip=True),
    ]
    if task.mirror:
        steps.insert(0, RandFlipd(["image", "label"], prob=0.5, spatial_axis=1))
    return Compose([*steps, plain])
