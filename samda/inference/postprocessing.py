# SPDX-License-Identifier: Apache-2.0
"""From the label map of the network's grid to the file: what `samda predict` and the MONAI bundle share."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, InvertibleTransform, MapTransform, SaveImaged

from samda.data.formats import stem
from samda.data.task import Task
from samda.inference.components import KeepLargestd, override
from samda.inference.writer import check_output_folder, label_path, write_labels

__all__ = ["SaveLabelMapd", "build_postprocessing", "own_grid"]

logger = logging.getLogger(__name__)


def build_postprocessing(
    task: Task | Mapping[str, Any],
    preprocessing: InvertibleTransform,
    output_dir: str | Path | None = None,
    keys: KeysCollection = "pred",
    keep_largest: bool | str | Sequence[str] | None = None,
) -> Compose:
    """Keep the largest pieces of the task's classes, bring predictions back to the axis order of the file, save them.

    Args:
        task: a Task or its values.
        preprocessing: the very object that preprocessed the image.
        output_dir: folder of the label maps; None saves nothing.
        keys: keys of the predictions, (1, X, Y, Z) class indices.
        keep_largest: classes of which only the largest piece stays, instead of the task's; see
            :func:`samda.inference.components.override`.

    Raises:
        UsageError: the folder cannot be written to, or `keep_largest` names no class.
    """
    task = override(task if isinstance(task, Task) else Task.from_dict(task), keep_largest)
    steps: list[Any] = [KeepLargestd(keys, task)] if task.largest_only else []
    steps.append(own_grid(preprocessing, keys))
    if output_dir is not None:
        steps.append(SaveLabelMapd(keys, output_dir, task))
    return Compose(steps)


def own_grid(preprocessing: InvertibleTransform, keys: KeysCollection = "pred") -> Invertd:
    """MONAI's Invertd for predictions (C, X, Y, Z) of the preprocessed "image"; only the axis order changes."""
    return Invertd(keys, transform=preprocessing, orig_keys="image", nearest_interp=True, to_tensor=True)


class SaveLabelMapd(SaveImaged):
    """Save label maps on their own grid, see :func:`samda.inference.writer.write_labels`.

    It is one of MONAI's SaveImaged by descent only: MONAI Label leaves those out, since it writes the result itself.

    The file is named as the case ("id"), else as the file of the image. A map without any foreground is saved with a
    warning.

    Args:
        keys: keys of the label maps, MetaTensors (1, X, Y, Z) in the axis order of the scan's file.
        output_dir: folder, made if only it is missing.
        task: a Task or its values.
        image_key: key of the image.

    Raises:
        UsageError: the folder cannot be written to.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        task: Task | Mapping[str, Any],
        image_key: str = "image",
    ) -> None:
        MapTransform.__init__(self, keys)
        self.folder = check_output_folder(output_dir)
        self.task = task if isinstance(task, Task) else Task.from_dict(task)
        self.image_key = image_key

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
            write_labels(label_path(self.folder, case, image), array, self.task.classes, image, affine)
        return d


def warn_empty(case: str) -> None:
    """Say that a case has no foreground at all."""
    logger.warning("case %s: no foreground found; check modality, units and field of view of the scan", case)
