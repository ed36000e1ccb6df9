# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a trained model to one scan: built once, then `adapt` a case at a time.

Per case: the source model predicts all slices; a few slices are seen in several photometric views, encoded once; a few
optimizer steps move the scope's parameters; the guard compares what came out with what went in; the parameters return
to where they were, bit for bit. No case can see another, so their order changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.spatialimages import SpatialImage
from torch.utils.checkpoint import checkpoint

from samda import provenance as records
from samda.adaptation.agreement import mean_agreement
from samda.adaptation.alignment import CaseAlignment
from samda.adaptation.case import (
    EmbeddingReplay,
    PreparedCase,
    Segmentation,
    choose_slices,
    cut_windows,
    encode_views,
    segment,
    slice_areas,
    slice_axis,
)
from samda.adaptation.guard import mean_plausibility
from samda.adaptation.loop import Trajectory, descend, held, keep_last, load
from samda.adaptation.objectives import log_probabilities, most_likely
from samda.adaptation.outcome import AdaptedCase, finish
from samda.adaptation.plausibility import Judge
from samda.adaptation.settings import check_settings
from samda.adaptation.views import FAMILIES, make_views, mirrored_classes, restore_view, seed_of
from samda.adapters.adapter_file import state_tensors
from samda.adapters.attach import scope_parameters
from samda.adapters.base import changes_encoder, unmerge
from samda.data.formats import name_of, scan_path
from samda.data.slices import SliceGrid, center_channels
from samda.data.transforms import build_preprocessing
from samda.errors import AdapterError
from samda.inference.postprocessing import override
from samda.inference.volume import VolumeInferer
from samda.networks.segmenter import SamSegmenter
from samda.progress import share
from samda.source_statistics import FeatureTap
from samda.task import Task

GRADIENT_PIXELS = 1 << 15  # embedding pixels decoded at once with gradients: about 1 GB


class Adaptation:
    """Adapts a trained model to scans, one at a time. None takes a setting's default, whichever it is.

    Args:
        network: a trained segmenter; its base and class head never move.
        task: what it segments.
        record: the model folder's record; its "statistics" are what the guard judges by.
        method: name of an objective, see :data:`samda.adaptation.objectives.OBJECTIVES`.
        scope: what moves, see :mod:`samda.adapters.attach`.
        steps: optimizer steps; None takes the objective's own.
        lr: learning rate; None takes the objective's own.
        views: number of views, the slice itself included.
        families: kinds of views, or one of them, see :mod:`samda.adaptation.views`.
        strength: multiplies how far views depart from the slice, 0 to 10.
        flips: mirror every second view; organs have sides, so not by default.
        slices: number of slices that are adapted on; all are predicted.
        seed: of the views, together with the input.
        keep: "best" keeps the latest iterate of nearly the highest :meth:`merit`, "last" the last one.
        objective: further settings of the objective.
        guard: thresholds of the guard, see :class:`samda.adaptation.guard.GuardSettings`.
        time_limit_s: seconds after which a case falls back; None sets no limit.
        batch_size: slices in one call of the encoder.
        memory_mb: memory for kept embeddings (MB); beyond it slices are encoded again.
        modality: "CT" or "MR" where the scans are of another kind than those of the training; it decides how
            intensities are mapped to [0, 1].
        keep_largest: classes of which every prediction keeps only the largest piece, instead of the task's; see
            :func:`samda.inference.postprocessing.override`.
        device: torch device.
        version: name of the model's version, for the record.

    Raises:
        UsageError: an unknown name, or a value of the wrong type or out of range.
        AdapterError: the model lacks the scope, or was never trained.
        InputError: the model carries no source statistics.

    Example:
        >>> adaptation = Adaptation(*load_model("model"))  # doctest: +SKIP
        >>> adaptation.adapt("scan.nii.gz").record["decision"]  # doctest: +SKIP
        'accepted'
    """

    def __init__(
        self,
        network: SamSegmenter,
        task: Task,
        record: Mapping[str, Any],
        method: str = "default",
        scope: str = "decoder",
        steps: int | None = None,
        lr: float | None = None,
        views: int = 8,
        families: Sequence[str] = FAMILIES,
        strength: float = 1.0,
        flips: bool = False,
        slices: int = 12,
        seed: int = 0,
        keep: str = "best",
        objective: Mapping[str, Any] | None = None,
        guard: Mapping[str, Any] | None = None,
        time_limit_s: float | None = None,
        batch_size: int = 8,
        memory_mb: float = 2048.0,
        modality: str | None = None,
        keep_largest: bool | str | Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        version: str = "source",
    ) -> None:
        self.objective, self.guard, values = check_settings(
            {"method": method, "objective": objective, "scope": scope, "guard": guard, "steps": steps, "lr": lr}
            | {"views": views, "families": families, "strength": strength, "flips": flips, "slices": slices}
            | {"seed": seed, "keep": keep, "time_limit_s": time_limit_s, "batch_size": batch_size}
            | {"memory_mb": memory_mb}
        )
        self.view_settings = {key: values[key] for key in ("families", "strength", "flips")}
        task = override(task, keep_largest, modality)
        unmerge(network)  # a merged adapter has no parameters of its own to move
        self.network, self.task, self.device = network.to(device).eval(), task, torch.device(device)
        self.version, self.memory_mb, self.time_limit_s = version, values["memory_mb"], time_limit_s
        self.scope: str = values["scope"]
        self.parameters = scope_parameters(network, self.scope)
        _check_trained(network, self.parameters)
        self.judge = Judge(task, record)
        self.steps, self.lr, self.seed = values["steps"], values["lr"], values["seed"]
        self.views, self.slices, self.keep = values["views"], values["slices"], values["keep"]
        self.batch_size = values["batch_size"]
        self.embedded = not changes_encoder(network, self.parameters)  # then views are encoded once
        self.mirror = mirrored_classes(task.classes)
        self.preprocessing = build_preprocessing(task, labels=False)
        self.inferer = VolumeInferer(task, self.batch_size, device=device)
        self.hashes = {
            "model_sha256": records.tensors_sha256(network.full_state()),
            "adapter_sha256": records.tensors_sha256(state_tensors(network)),
        }

    @property
    def config(self) -> dict[str, Any]:
        """Every setting that decides the outcome, resolved; plain values."""
        return {
            "method": self.objective.name,
            "objective": self.objective.settings(),
            "scope": self.scope,
            "steps": self.steps,
            "lr": self.lr,
            "views": self.views,
            **{key: list(v) if isinstance(v, tuple) else v for key, v in self.view_settings.items()},
            "slices": self.slices,
            "seed": self.seed,
            "modality": self.task.modality,
            "keep": self.keep,
            "guard": self.guard.to_dict(),
            "time_limit_s": self.time_limit_s,
            "batch_size": self.batch_size,
        } | ({"keep_largest": self.task.to_dict()["keep_largest"]} if self.task.largest_only else {})

    @classmethod
    def from_record(
        cls, network: SamSegmenter, task: Task, record: Mapping[str, Any], case: Mapping[str, Any], **settings: Any
    ) -> Adaptation:
        """The adaptation that a case's record describes; adapting the same scan again gives the same label map.

        Args:
            network, task, record: the model.
            case: the record of the case.
            settings: what decides nothing: device, memory_mb.

        Raises:
            AdapterError: the model is not the one of the record.
        """
        adaptation = cls(network, task, record, version=case["model_version"], **case["config"], **settings)
        for key, value in adaptation.hashes.items():
            if case[key] != value:
                raise AdapterError(
                    f"the record was made with another model ({key} {case[key][:12]}, here {value[:12]})"
                )
        return adaptation

    def adapt(self, image: str | Path | SpatialImage | Mapping[str, Any]) -> AdaptedCase:
        """Adapt to one scan and decide; afterwards the model is as it was, bit for bit.

        Args:
            image: path of a file or DICOM folder, a nibabel image, or a case {"image": one of these, "id": name};
                labels are never read. A nibabel image is adapted to as the `.nii` file that nibabel saves of it: the
                views' seed follows from the content of the file.

        Raises:
            InputError: the scan cannot be read or used. Errors while adapting do not raise: the case falls back.
        """
        started = records.now()
        result = finish(self, self.prepare(image), started)
        scan = image["image"] if isinstance(image, Mapping) else image
        return dataclasses.replace(result, scan=scan) if isinstance(scan, SpatialImage) else result

    def prepare(self, image: str | Path | SpatialImage | Mapping[str, Any]) -> PreparedCase:
        """Everything of a case that does not depend on the objective: source prediction, chosen slices, encoded views.

        A prepared case serves every objective of the same scope, views, slices and seed.
        """
        case = {k: image[k] for k in image if k != "label"} if isinstance(image, Mapping) else {"image": image}
        begin = time.perf_counter()
        with scan_path(case["image"]) as path:
            sha256 = records.path_sha256(path)
            data = self.preprocessing(case | {"image": path})
        read = time.perf_counter()
        return self._prepared(str(case.get("id") or name_of(case["image"])), sha256, data, {"read": read - begin})

    def prepare_data(self, data: Mapping[str, Any], name: str) -> PreparedCase:
        """As :meth:`prepare`, for a case that is preprocessed already: {"image": MetaTensor (C, X, Y, Z) in [0, 1]}."""
        image = data["image"]
        return self._prepared(name, records.sha256_of(np.asarray(image.as_tensor().cpu())), dict(data), {})

    def _prepared(self, name: str, sha256: str, data: dict[str, Any], seconds: dict[str, float]) -> PreparedCase:
        volume = data["image"].as_tensor()
        begin = time.perf_counter()
        grid = SliceGrid.from_volume(volume, data["image"].affine, self.task)
        replay = EmbeddingReplay(self.network, self.memory_mb if self.embedded else 0.0)
        source = segment(self.inferer, data, grid, replay)
        predicted = time.perf_counter()
        share(0.2)
        axis = slice_axis(self.task)
        areas = slice_areas(source.labels, self.task.num_classes, axis)
        others = tuple(a for a in range(3) if a != axis)
        slices = choose_slices(areas, source.uncertainty.sum(axis=others), self.slices)
        seed = seed_of(sha256, self.seed)
        views = make_views(self.views, seed, **self.view_settings)
        labels = torch.from_numpy(source.labels)[None]
        images = cut_windows(grid.inputs(volume, slices), grid.extract_labels(labels, slices), self.task.image_size)
        encode = self.network.encode if self.embedded else None
        inputs = encode_views(images, slices, views, encode, self.batch_size, self.device)
        seconds |= {"predict": predicted - begin, "views": time.perf_counter() - predicted}
        return PreparedCase(
            name, sha256, data, grid, replay, source, slices, images, views, inputs, self.embedded, seed, seconds
        )

    def logits(self, prepared: PreparedCase) -> torch.Tensor:
        """Logits (V, m, K, h, w) of all views of the chosen slices at the present parameters, views mapped back."""
        return self._restored(prepared, self._seen(prepared))

    def _seen(self, prepared: PreparedCase) -> torch.Tensor:
        """The same, views as they are."""
        inputs = prepared.inputs.flatten(0, 1)
        chunks = inputs.split(self._chunk(inputs))
        if len(chunks) > 1 and torch.is_grad_enabled():  # bounds memory at the price of a second forward pass
            parts = [checkpoint(self._decode, chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [self._decode(chunk) for chunk in chunks]
        return torch.cat(parts).unflatten(0, prepared.inputs.shape[:2])

    def _restored(self, prepared: PreparedCase, logits: torch.Tensor) -> torch.Tensor:
        if not any(view.flip for view in prepared.views):
            return logits
        return torch.stack(
            [restore_view(view, part, self.mirror) for view, part in zip(prepared.views, logits, strict=True)]
        )

    def _decode(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network.decode(inputs if self.embedded else self.network.encode(inputs))

    def _chunk(self, inputs: torch.Tensor) -> int:
        """Slices in one pass with gradients."""
        if not self.embedded:
            return self.batch_size
        return max(1, GRADIENT_PIXELS // (inputs.shape[-2] * inputs.shape[-1]))

    def optimize(self, prepared: PreparedCase) -> Trajectory:
        """Adapt to a prepared case; the model is as it was afterwards, the result is in the trajectory.

        Raises:
            NotFinite, OutOfTime: the case should fall back.
        """
        begin = time.perf_counter()
        deadline = None if self.time_limit_s is None else time.monotonic() + self.time_limit_s
        with held(self.network, self.parameters), FeatureTap(self.network) as tap:
            merit = keep_last if self.keep == "last" else functools.partial(self.merit, prepared)

            align = CaseAlignment(self.judge.alignment, tap, prepared.inputs.shape[:2], self._shown(prepared))
            seen: list[torch.Tensor] = []  # the latest logits, flips not undone

            def logits() -> torch.Tensor:
                tap.clear()
                seen[:] = [self._seen(prepared)]
                return self._restored(prepared, seen[0])

            run = descend(
                logits,
                self.parameters,
                self.objective,
                self.steps,
                self.lr,
                merit,
                deadline,
                lambda: align(seen[0]),
            )
        prepared.seconds["adapt"] = time.perf_counter() - begin
        return run

    def _shown(self, prepared: PreparedCase) -> list[int]:
        """Which chosen slices show foreground, as the slices did whose features the model remembers; all, if few do."""
        areas = slice_areas(prepared.source.labels, self.task.num_classes, slice_axis(self.task)).sum(0)
        shown = [place for place, index in enumerate(prepared.slices) if areas[index]]
        return shown if 2 * len(shown) >= len(prepared.slices) else list(range(len(prepared.slices)))

    def merit(self, prepared: PreparedCase, logits: torch.Tensor, by_class: Mapping[int, float]) -> float:
        """Plausibility^2 x agreement of the chosen slices: it decides which iterates may be kept. No objective sees it.

        Either alone can be fooled: views agree perfectly on one big blob, and a speck at the right place looks fine.
        Agreement rises with every step of most objectives, so plausibility counts twice. Where slices exceed the field
        of view, their windows are judged.

        Args:
            prepared: the case.
            logits: (V, m, K, h, w), the slice itself first.
            by_class: agreement of the classes shown; a class of the task that no view shows counts 0.

        Returns:
            A number in [0, 1]; with a single view plausibility^2 alone.
        """
        images = prepared.images
        labels = most_likely(log_probabilities(F.interpolate(logits[0], images.shape[-2:], mode="bilinear")))
        plausibility = self.judge.plausibility(center_channels(images, self.task), labels.cpu())
        agreed = mean_agreement(by_class, range(1, self.task.num_classes))
        return mean_plausibility(plausibility, self.guard.absent) ** 2 * (1.0 if math.isnan(agreed) else agreed)

    def predict(self, prepared: PreparedCase, tensors: Mapping[str, torch.Tensor]) -> Segmentation:
        """Predict all slices of a prepared case with other values of the scope's parameters; they are put back."""
        begin = time.perf_counter()
        with held(self.network, self.parameters):
            load(self.parameters, tensors)
            adapted = segment(self.inferer, prepared.data, prepared.grid, prepared.replay)
        prepared.seconds["predict_adapted"] = time.perf_counter() - begin
        return adapted


def _check_trained(network: SamSegmenter, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse a class head that still has SAM's equal mask tokens, and SAM-DA tensors whose gates never opened.

    Raises:
        AdapterError: naming what was never trained.
    """
    tokens = network.mask_decoder.mask_tokens.weight
    if bool((tokens == tokens[0]).all()):
        raise AdapterError("the class head was never trained; train the model before adapting it")
    gates = [parameter for name, parameter in parameters.items() if name.endswith((".gate", ".residual"))]
    if gates and not any(bool(gate.any()) for gate in gates):
        raise AdapterError(
            "the SAM-DA adapter was never trained (its gates are zero); train the model before adapting it"
        )
