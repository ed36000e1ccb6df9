# SPDX-License-Identifier: Apache-2.0
"""Predict one scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.spatialimages import SpatialImage

from samda.adapters.adapter_file import state_tensors
from samda.data.formats import name_of, scan_path, source_of
from samda.data.labels import count_ids
from samda.data.transforms import build_preprocessing
from samda.expected_dice import Calibration, CaseQuality, ExpectedDice
from samda.inference.dicom_out import NIFTI, DicomOutput, dicom_path, parse_formats, write_formats
from samda.inference.postprocessing import keep_largest, override, own_grid
from samda.inference.volume import VolumeInferer
from samda.inference.writer import QUALITY, SOURCE, label_path, probability_path, write_labels, write_probabilities
from samda.io import Image
from samda.networks.segmenter import SamSegmenter
from samda.output import open_output
from samda.progress import phase
from samda.provenance import path_sha256, sha256_of, tensors_sha256
from samda.quality import QualityMeter
from samda.task import Task


@dataclasses.dataclass(frozen=True)
class Prediction(DicomOutput):
    """The label map of one scan on the grid of the scan.

    Attributes:
        case: name of the case.
        labels: (X, Y, Z) class indices, uint8 (uint16 beyond 255 classes), in the axis order of the file.
        affine: (4, 4) voxel index to RAS mm.
        classes: names of the classes, background first.
        scan: file or DICOM folder (the first of several channel files), or the nibabel image.
        probabilities: (K, X, Y, Z) float32, if requested.
        task: of the model, for the codes of the classes in DICOM output.
        quality: what Dice is to be expected; None where the model has no calibration.
        source: hashes of "model" and "scan", see :meth:`Measured.source`.
    """

    case: str
    labels: np.ndarray
    affine: np.ndarray
    classes: tuple[str, ...]
    scan: Path | SpatialImage | None = None
    probabilities: np.ndarray | None = None
    task: Task | None = None
    quality: CaseQuality | None = None
    source: Mapping[str, str] | None = None

    @property
    def expected_dice(self) -> dict[str, ExpectedDice]:
        """Class -> predicted Dice with its 90 % interval (:mod:`samda.expected_dice`); empty without a calibration."""
        return {} if self.quality is None else self.quality.dice

    @property
    def empty(self) -> bool:
        """Is everything background?"""
        return not self.labels.any()

    def volumes_ml(self) -> dict[str, float]:
        """Volume of each foreground class in ml."""
        counts = count_ids(self.labels, self.case)
        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0
        return {name: counts.get(k, 0) * voxel_ml for k, name in enumerate(self.classes) if k}

    @phase("writing")
    def save(self, folder: str | Path, formats: str | Sequence[str] = NIFTI) -> Path:
        """Write the label map (and probabilities) to `folder`; returns its path, that of the first of `formats`.

        `formats` are of "nifti" (2-D images as PNG) and, for DICOM scans, "dicom-seg", "dicom-seg-labelmap" and
        "rtstruct", each in a folder of this name.
        """
        formats = parse_formats(formats)
        files = result_files(self.case, self.scan, formats)
        with open_output(folder, [*files, f"{self.case}.json"]) as output:
            if self.probabilities is not None:
                place = probability_path(output.path, self.case)
                write_probabilities(place, self.probabilities, self.scan, self.affine)
            write_formats(formats, output.path, self.case, self.labels, self.task, self.scan)
            if NIFTI in formats:  # last: if it exists, the case is finished
                path = label_path(output.path, self.case, self.scan)
                facts = {} if self.quality is None else {QUALITY: self.quality.to_dict()}
                facts |= {} if self.source is None else {SOURCE: dict(self.source)}
                write_labels(path, self.labels, self.classes, self.scan, self.affine, facts)
            return output.path / files[0]


class Measured:
    """A network by slices, (n, C, H, W) -> (n, K, H, W) logits, that measures what Dice is to be expected of a case.

    Without a calibration in the record of the model folder (:mod:`samda.expected_dice`) it is the network alone.

    Args:
        network, task: as of :class:`Predictor`.
        record: of the model folder.
        inferer: what runs it; the first of its passes is measured.
    """

    def __init__(
        self,
        network: Callable[..., torch.Tensor],
        task: Task,
        record: Mapping[str, Any] | None,
        inferer: VolumeInferer,
    ) -> None:
        self.network, self.inferer = network, inferer
        self.task, self._model = task, ""
        self.calibration = None if record is None else Calibration.from_record(record)
        self.meter: QualityMeter | None = None
        if record is not None and self.calibration is not None and isinstance(network, SamSegmenter):
            self.meter = QualityMeter(network, task, record.get("statistics") or {})

    def begin(self) -> None:
        """Forget the case before, which may have failed."""
        if self.meter is not None:
            self.meter.clear()

    def __call__(self, slices: torch.Tensor) -> torch.Tensor:
        return self.network(slices) if self.meter is None or not self.inferer.first_pass else self.meter(slices)

    def quality(self) -> CaseQuality | None:
        """Of the case since :meth:`begin`; None without a calibration."""
        return self.calibration.expected(self.meter.features()) if self.calibration and self.meter else None

    def source(self, image: Image) -> dict[str, str]:
        """What a label map is made of: "model", the sha256 of adapters, class head and task, and "scan"."""
        if not self._model:
            tensors = state_tensors(self.network) if isinstance(self.network, torch.nn.Module) else {}
            self._model = sha256_of([tensors_sha256(tensors), self.task.to_dict()])
        return {"model": self._model, "scan": path_sha256(image)}


class Predictor:
    """A network and its task for the prediction of scans.

    Args:
        network: (n, C, H, W) slices in [0, 1] -> (n, K, H, W) logits; it is set to eval mode on `device`.
        task: classes and preprocessing; `keep_largest` applies to the label map, not to probabilities.
        batch_size: slices per forward pass.
        overlap: of windows, if a body is larger than the field of view.
        memory_budget_mb: memory for class maps on the grid of the scan, see :class:`VolumeInferer`.
        amp: "auto", "bf16", "fp16" or "off", see :class:`VolumeInferer`.
        progress: show a progress bar over the cases of a folder or the slices of a single scan.
        axes: "all" predicts along all three axes and averages, "one" along the task's; None as the task says.
        record: of the model folder; with its calibration, predictions have an expected Dice.
    """

    def __init__(
        self,
        network: Callable[..., torch.Tensor],
        task: Task,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        overlap: float = 0.5,
        memory_budget_mb: float = 512.0,
        amp: str | None = "auto",
        progress: bool = False,
        axes: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(network, torch.nn.Module):
            network = network.to(device).eval()
        self.task = override(task, axes=axes)
        self.preprocessing = build_preprocessing(task, labels=False)
        self.inferer = VolumeInferer(
            *(self.task, batch_size, overlap),
            memory_budget_mb=memory_budget_mb,
            amp=amp,
            device=device,
            progress=progress,
        )
        self.measured = Measured(network, self.task, record, self.inferer)

    def predict(self, image: str | Path | SpatialImage | Mapping[str, Any], probabilities: bool = False) -> Prediction:
        """Segment one scan; with `probabilities`, also return the class probabilities (4 K bytes per voxel).

        `image` is the path of a file or DICOM folder, a nibabel image, or a case {"image": one of these, "id": name},
        whose "image" may be a list of one file per channel.
        """
        case = {k: image[k] for k in image if k != "label"} if isinstance(image, Mapping) else {"image": image}
        scan = case["image"]
        with scan_path(scan) as path, phase("preprocessing"):
            data = self.preprocessing(case | {"image": path})
        self.measured.begin()
        labels, kept = self.inferer.segment(data["image"][None], self.measured, keep_probabilities=probabilities)
        labels = torch.from_numpy(keep_largest(labels[0, 0].cpu().numpy(), self.task.largest_only))[None, None]
        restored = self._restore(data, labels)
        return Prediction(
            case=str(case.get("id") or name_of(scan)),
            labels=restored.as_tensor()[0].numpy(),
            affine=np.asarray(restored.affine, float),
            classes=self.task.classes,
            scan=source_of(scan),
            probabilities=None if kept is None else self._restore(data, kept).as_tensor().numpy(),
            task=self.task,
            quality=self.measured.quality(),
        )

    def _restore(self, data: Mapping[str, Any], result: torch.Tensor) -> MetaTensor:
        return own_grid(self.preprocessing)({"image": data["image"], "pred": MetaTensor(result[0])})["pred"]


def result_files(case: str, image: Any, formats: Sequence[str] = (NIFTI,), probabilities: bool = False) -> list[Path]:
    """The results of a case, relative to their folder; UsageError if its id cannot name a file."""
    files = [label_path("", case, image) if kind == NIFTI else dicom_path("", case, kind) for kind in formats]
    return [*files, *([probability_path("", case)] if probabilities else [])]
