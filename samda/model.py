# SPDX-License-Identifier: Apache-2.0
"""A trained model as one object: load, predict, adapt, save.

    model = samda.load("model")
    prediction = model.predict("scan.nii.gz")
    adapted = model.adapt("scan.nii.gz")

Its parts are also public: :func:`samda.load_model`, :class:`samda.Predictor`, :class:`samda.Adaptation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nibabel.spatialimages import SpatialImage

from samda.adaptation import Adaptation, AdaptedCase
from samda.inference.postprocessing import override
from samda.inference.predict import Prediction, Predictor
from samda.models.folder import save_model
from samda.models.versions import load_version
from samda.networks.segmenter import SamSegmenter
from samda.task import Task


class Model:
    """A trained network with task and record, for prediction and adaptation; see :func:`load`.

    Args:
        network: a trained segmenter.
        task: classes and geometry it was trained with.
        record: record of the training with source statistics, which adaptation requires.
        version: name of the version in its model folder.
        device: torch device of predictions and adaptations.
    """

    def __init__(
        self,
        network: SamSegmenter,
        task: Task,
        record: Mapping[str, Any] | None = None,
        version: str = "source",
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.task, self.record = network, task, dict(record or {})
        self.version, self.device = version, device

    def predict(
        self,
        scan: str | Path | SpatialImage | Mapping[str, Any],
        probabilities: bool = False,
        modality: str | None = None,
        keep_largest: bool | str | Sequence[str] | None = None,
        **settings: Any,
    ) -> Prediction:
        """Segment one scan; `prediction.image` is the label map on the grid of the scan, `prediction.expected_dice` the
        predicted Dice of each class.

        Args:
            scan: path of a file or DICOM folder, a nibabel image, or a case {"image": one of these, "id": name}.
            probabilities: also return the class probabilities.
            modality: "CT" or "MR", if other than that of the training.
            keep_largest: classes of which only the largest component is kept; overrides the task.
            settings: of :class:`samda.Predictor`, for instance `batch_size` or `amp`.
        """
        task = override(self.task, keep_largest, modality)
        predictor = Predictor(self.network, task, self.device, record=self.record, **settings)
        return predictor.predict(scan, probabilities)

    def adapt(self, scan: str | Path | SpatialImage | Mapping[str, Any], **settings: Any) -> AdaptedCase:
        """Adapt to one scan without labels and segment it; then restore the parameters bitwise.

        Args:
            scan: as in :meth:`predict`.
            settings: of :class:`samda.Adaptation`, for instance `method` or `modality`.
        """
        adaptation = Adaptation(
            self.network, self.task, self.record, device=self.device, version=self.version, **settings
        )
        return adaptation.adapt(scan)

    def save(self, folder: str | Path, with_base: bool = False) -> None:
        """Write a model folder, optionally with the base weights; see :func:`samda.save_model`."""
        save_model(self.network, folder, self.task, self.record, with_base)


def load(
    folder: str | Path,
    version: str | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Read a trained model from its folder.

    Args:
        folder: a model folder of `samda train`, :meth:`Model.save` or :func:`samda.save_model`.
        version: name of a version (`samda site list`); None takes the active one.
        weights: file with the base weights; None takes those of the training.

    Raises:
        AdapterError, InputError: a file of the folder is missing or damaged.
        UsageError: there is no such version.
        WeightsError: the base weights are missing or not those of the training.
    """
    network, task, record, name = load_version(folder, version, weights, device)
    return Model(network, task, record, name, device)
