# SPDX-License-Identifier: Apache-2.0
"""Postprocessing of label maps: largest connected component, inverse transform to the grid of the scan, saving.

Used by `samda predict` and the MONAI bundle.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    Invertd,
    InvertibleTransform,
    MapTransform,
    SaveImaged,
    get_largest_connected_component_mask,
)
from scipy import ndimage

from samda.data.formats import stem
from samda.errors import UsageError
from samda.inference.dicom_out import NIFTI, parse_formats, write_formats
from samda.inference.writer import QUALITY, SOURCE, label_path, write_labels
from samda.output import check_output_folder, open_output
from samda.task import Task

logger = logging.getLogger(__name__)


def keep_largest(labels: np.ndarray, classes: Iterable[int]) -> np.ndarray:
    """Set all but the largest 3-D component (26-connected) of each of `classes` to background.

    Each class is processed in its bounding box, which limits the memory. Of components of equal size, the first in the
    order of the array is kept. Returns (X, Y, Z) of the same dtype; the array itself if nothing changes.
    """
    chosen = sorted(set(classes))
    boxes = ndimage.find_objects(labels, max_label=max(chosen)) if chosen and labels.any() else []
    result = labels
    for k in chosen:
        box = boxes[k - 1] if k <= len(boxes) else None
        if box is None:
            continue
        mask = labels[box] == k
        stray = mask & ~np.asarray(get_largest_connected_component_mask(mask))
        if stray.any():
            result = labels.copy() if result is labels else result
            result[box][stray] = 0
    return result


class KeepLargestd(MapTransform):
    """:func:`keep_largest` for label maps (1, X, Y, Z) in a dictionary; the classes are `task.largest_only`."""

    def __init__(self, keys: KeysCollection, task: Task | Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.task = task if isinstance(task, Task) else Task.from_dict(task)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            volume = d[key]
            plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
            kept = keep_largest(plain[0].cpu().numpy(), self.task.largest_only)
            result = torch.from_numpy(kept)[None].to(plain.device)
            d[key] = MetaTensor(result).copy_meta_from(volume) if isinstance(volume, MetaTensor) else result
        return d


def override(
    task: Task, classes: bool | str | Sequence[str] | None = None, modality: str | None = None, axes: str | None = None
) -> Task:
    """The task with another modality, axes or `keep_largest`; None leaves the task's, UsageError refuses others.

    `classes`, of which the largest piece stays, are names, true or "all", false or "none".
    """
    task = dataclasses.replace(task, modality=modality or task.modality, axes=axes or task.axes)
    if classes is None:
        return task
    if isinstance(classes, str):
        classes = {"all": True, "none": False}.get(classes, [name.strip() for name in classes.split(",")])
    if not isinstance(classes, bool) and not all(classes):
        raise UsageError(f"keep_largest {list(classes)} contains an empty name; give names of classes, or all, or none")
    return dataclasses.replace(task, keep_largest=classes if isinstance(classes, bool) else tuple(classes))


def build_postprocessing(
    task: Task | Mapping[str, Any],
    preprocessing: InvertibleTransform,
    output_dir: str | Path | None = None,
    keys: KeysCollection = "pred",
    keep_largest: bool | str | Sequence[str] | None = None,
    formats: str | Sequence[str] = NIFTI,
) -> Compose:
    """Keep largest components, restore the axis order of the file, and save predictions.

    Args:
        task: a Task or its values.
        preprocessing: the same object that preprocessed the image.
        output_dir: folder of the label maps; None does not save.
        keys: keys of the predictions, (1, X, Y, Z) class indices.
        keep_largest: overrides the task, see :func:`override`.
        formats: of the label maps, see :meth:`samda.inference.predict.Prediction.save`.
    """
    task = override(task if isinstance(task, Task) else Task.from_dict(task), keep_largest)
    steps: list[Any] = [KeepLargestd(keys, task)] if task.largest_only else []
    steps.append(own_grid(preprocessing, keys))
    if output_dir is not None:
        steps.append(SaveLabelMapd(keys, output_dir, task, formats=formats))
    return Compose(steps)


def own_grid(preprocessing: InvertibleTransform, keys: KeysCollection = "pred") -> Invertd:
    """MONAI's Invertd for predictions (C, X, Y, Z) of the preprocessed "image"; restores the axis order."""
    return Invertd(keys, transform=preprocessing, orig_keys="image", nearest_interp=True, to_tensor=True)


class SaveLabelMapd(SaveImaged):
    """Save label maps, MetaTensors (1, X, Y, Z) in the axis order of the file, see `writer.write_labels`.

    Derived from MONAI's SaveImaged, because MONAI Label removes such transforms and writes the result itself. The file
    is named after the case ("id"), else after the file of the image. A map without foreground causes a warning. What
    Dice is to be expected ("quality") goes into `<case>.json`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        task: Task | Mapping[str, Any],
        image_key: str = "image",
        formats: str | Sequence[str] = NIFTI,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.folder = check_output_folder(output_dir)
        self.task = task if isinstance(task, Task) else Task.from_dict(task)
        self.image_key, self.formats = image_key, parse_formats(formats)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            labels: MetaTensor = d[key]
            image = str(d[self.image_key].meta["filename_or_obj"])
            case = str(d.get("id") or stem(image))
            array = labels.as_tensor()[0].cpu().numpy()
            if not array.any():
                warn_empty(case)
            affine = np.asarray(labels.affine, float)
            with open_output(self.folder):
                write_formats(self.formats, self.folder, case, array, self.task, image)
                if NIFTI in self.formats:
                    facts = {key: d[key] for key in (QUALITY, SOURCE) if d.get(key)}
                    write_labels(label_path(self.folder, case, image), array, self.task.classes, image, affine, facts)
        return d


def warn_empty(case: str) -> None:
    """Warn that a label map has no foreground."""
    logger.warning("case %s: no foreground found; check modality, units and field of view of the scan", case)
