# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a trained model to one scan: built once, then `adapt` a case at a time.

Per case: the source model predicts all slices; a few of them serve for what follows. Where the predicted Dice can
choose, gray values of the input are tried. The slices are encoded in several photometric views; alignments of the
levels are tried, and a few optimizer steps move the scope's parameters where that is not enough. What is best predicts
all slices; the guard compares both predictions; the parameters get their values back, bit for bit. Cases are
independent of each other and of their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.spatialimages import SpatialImage

from samda.adaptation.alignment import CaseAlignment, Judge
from samda.adaptation.case import (
    AdaptedCase,
    EmbeddingReplay,
    PreparedCase,
    Scan,
    Segmentation,
    ViewDecoder,
    prepare_case,
    segment,
)
from samda.adaptation.guard import Decision, after, before, good_enough
from samda.adaptation.loop import (
    Merit,
    OutOfTime,
    Trajectory,
    class_agreement,
    decision_of,
    foreground_entropy,
    keep_last,
    load,
    mean_agreement,
    optimize,
    restoring,
)
from samda.adaptation.objectives import check_settings
from samda.adaptation.record import Outcome, case_record
from samda.adaptation.settings import VIEWS
from samda.adapters.adapter_file import state_tensors
from samda.adapters.attach import attach, check_scope, default_scope, scope_parameters
from samda.adapters.base import changes_encoder, modules, sites, unmerge
from samda.adapters.intensity import Values, search
from samda.data.formats import name_of, scan_path
from samda.data.transforms import build_preprocessing
from samda.errors import AdapterError, InputError
from samda.expected_dice import Calibration, CaseQuality
from samda.inference.postprocessing import override
from samda.inference.volume import VolumeInferer
from samda.networks.head import IMAGE, Pyramid, map_levels, split_levels
from samda.networks.segmenter import SamSegmenter
from samda.progress import phase
from samda.provenance import now, path_sha256, sha256_of, tensors_sha256
from samda.quality import QualityMeter
from samda.source_statistics import STRENGTHS, FeatureTap, align_levels, level_sums
from samda.task import Task
from samda.views import mirrored_classes

INPUT = "image_encoder.input."  # names of the adapter `intensity`

logger = logging.getLogger(__name__)


class Adaptation:
    """Adapts a trained model to scans, one at a time.

    Args:
        network: a trained segmenter; its base and class head never move.
        task: what it segments.
        record: the model folder's record, with the source statistics.
        device: torch device.
        version: name of the model's version, for the record.
        settings: of :class:`samda.adaptation.settings.AdaptationSettings`, for instance `steps=4`; None takes the
            default.

    Raises:
        AdapterError: the model lacks the scope, or was never trained.
        InputError: the model has no source statistics.

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
        *,
        device: torch.device | str = "cpu",
        version: str = "source",
        **settings: Any,
    ) -> None:
        self.settings, self.objective = check_settings(settings)
        self.guard = self.settings.thresholds
        self.inversion = task.modality != "CT"  # may dark be bright? As the calibration of the training tried
        task = override(task, self.settings.keep_largest, self.settings.modality)
        unmerge(network)  # a merged adapter has no parameters of its own to move
        self.network, self.task, self.device = network.to(device).eval(), task, torch.device(device)
        self.version = version
        self.judge = Judge(task, record)
        self.calibration = Calibration.from_record(record)
        scope = self.settings.scope or self._scope()
        self.choosing = self.objective.gradient_free and not math.isnan(self.margin)  # by predicted Dice
        views = self.settings.views or VIEWS[self.choosing]
        self.settings = dataclasses.replace(self.settings, scope=scope, views=views)
        self.hashes = {
            "model_sha256": tensors_sha256(network.full_state()),
            "adapter_sha256": adapter_sha256(network),
        }
        self.intensity = self._intensity(scope)
        self.parameters = scope_parameters(network, scope)
        self.stepped = {name: p for name, p in self.parameters.items() if name not in self.intensity}
        _check_trained(network, self.parameters)
        rate = self.settings.lr or 0.0
        self.rates = {
            f"{path}.{name}": rate * adapter.pace
            for path, _, adapter in modules(network)
            for name in adapter.adapter_params()
        }
        self.meter = None if self.calibration is None else QualityMeter(network, task, record["statistics"])
        self.embedded = not changes_encoder(network, self.stepped)  # then views are encoded once
        self.views = ViewDecoder(network, self.embedded, self.settings.batch_size, mirrored_classes(task.classes))
        self.preprocessing = build_preprocessing(task, labels=False)
        self.inferer = VolumeInferer(task, self.settings.batch_size, device=device)

    def _scope(self) -> str:
        """The scope of the model without a choice; with the intensities, where the predicted Dice can choose them."""
        found = default_scope(self.network)
        choosable = self.objective.gradient_free and not math.isnan(self.margin)
        return "+".join(check_scope(f"intensity+{found}")) if choosable else found

    def _intensity(self, scope: str) -> dict[str, torch.nn.Parameter]:
        """The parameters of the adapter `intensity`, which is attached where the scope names it; {} where it does not.

        It changes nothing before a scan is adapted to.
        """
        if "intensity" not in check_scope(scope):
            return {}
        if math.isnan(self.margin):
            raise InputError("the scope 'intensity' is chosen by predicted Dice, whose calibration this model lacks")
        if not sites(self.network)["encoder.input"].adapters:
            attach(self.network, "intensity")
        return scope_parameters(self.network, "intensity")

    @property
    def config(self) -> dict[str, Any]:
        """Every setting that decides the outcome, resolved; plain values."""
        values = self.settings.to_dict() | {"objective": self.objective.settings(), "modality": self.task.modality}
        del values["keep_largest"]  # the task's own is not a setting
        return values | ({"keep_largest": self.task.to_dict()["keep_largest"]} if self.task.largest_only else {})

    @property
    def margin(self) -> float:
        """Predicted gain of the mean Dice from which the adapted map replaces the other; NaN where it is unknown."""
        margin = None if self.calibration is None else self.calibration.margin
        return math.nan if margin is None else margin

    @property
    def least(self) -> float:
        """Predicted Dice from which a scan is like those of the training: it has that of the middle one of them."""
        return math.nan if self.calibration is None or math.isnan(self.margin) else self.calibration.usual

    def describe(self) -> dict[str, Any]:
        """Model and settings as a record has them."""
        config = self.config
        return {
            **self.hashes,
            "model_version": self.version,
            "config": config,
            "config_sha256": sha256_of(config),
            "method": self.settings.method,
            "scope": self.settings.scope,
            "device": str(self.device),
            "parameters_moved": sum(p.numel() for p in self.parameters.values()),
        }

    @classmethod
    def from_record(
        cls, network: SamSegmenter, task: Task, record: Mapping[str, Any], case: Mapping[str, Any], **settings: Any
    ) -> Adaptation:
        """The adaptation that a case's record describes; adapting the same scan again gives the same label map.

        Args:
            network, task, record: the model; AdapterError where it is not the one of the case.
            case: the record of the case.
            settings: those without influence on the result: device, memory_mb.
        """
        adaptation = cls(network, task, record, version=case["model_version"], **case["config"], **settings)
        for key, value in adaptation.hashes.items():
            if case[key] != value:
                raise AdapterError(
                    f"the record was made with another model ({key} {case[key][:12]}, here {value[:12]})"
                )
        return adaptation

    def adapt(self, image: Scan) -> AdaptedCase:
        """Adapt to one scan and decide; afterwards the model is as it was, bit for bit.

        Args:
            image: path of a file or DICOM folder, a nibabel image, or a case {"image": one of these, "id": name};
                labels are never read. A nibabel image is adapted to as the `.nii` file that nibabel saves of it: the
                views' seed follows from the content of the file.

        Raises:
            InputError: the scan cannot be read or used. Errors while adapting do not raise: the case falls back.
        """
        case = self.prepare(image)
        outcome = self.decide(case)
        case.data["image"] = MetaTensor(torch.empty(0), meta=case.data["image"].meta)  # its voxels have served
        return self.restore(case, outcome)

    def decide(self, case: PreparedCase) -> Outcome:
        """Adapt to a prepared case and let the guard decide; any error while adapting ends in a fallback."""
        outcome = Outcome(self.judge.evidence(case, case.source))
        limit = self.settings.time_limit_s
        case.deadline = None if limit is None else time.monotonic() + limit
        try:
            self.judge_source(case, outcome)
            if outcome.decision is not None:
                return outcome
            outcome.run = self.optimize(case)
            outcome.source = dataclasses.replace(outcome.source, drift=outcome.run.drift[0])
            outcome.decision = self.too_little(case, outcome.run)
            if outcome.decision is None:
                outcome.adapted = self.predict(case, outcome.run.tensors)
                outcome.evidence = self.judge.evidence(case, outcome.adapted, *outcome.run.measures())
                outcome.decision = self.compare(case, outcome)
        except Exception as error:
            outcome.adapted, case.intensity = None, {}
            outcome.decision, outcome.error = decision_of(error), f"{type(error).__name__}: {error}"
            logger.debug("case fell back", exc_info=True)
        return outcome

    def prepare(self, image: Scan) -> PreparedCase:
        """Read and predict a scan, choose slices, make their views and encode them.

        A case may have the "input_sha256" of its files, which are hashed otherwise. InputError: the scan is unusable.
        """
        started, begin = now(), time.perf_counter()
        case: dict[str, Any] = {"image": image}
        if isinstance(image, Mapping):
            case = {key: value for key, value in image.items() if key != "label"}
        scan, sha256 = case["image"], case.pop("input_sha256", None)
        with scan_path(scan) as path, phase("preprocessing"):
            sha256 = sha256 or path_sha256(path)
            data = self.preprocessing(case | {"image": path})
        name = str(case.get("id") or name_of(scan))
        replay, seconds = self._replay(), {"read": time.perf_counter() - begin}
        prepared = prepare_case(self.inferer, replay, self.settings, name, sha256, data, started, seconds)
        if isinstance(scan, SpatialImage):
            prepared.scan = scan
        return prepared

    def prepare_data(self, data: Mapping[str, Any], name: str) -> PreparedCase:
        """As :meth:`prepare`, for a case that is preprocessed already: {"image": MetaTensor (C, X, Y, Z) in [0, 1]}."""
        sha256 = sha256_of(np.asarray(data["image"].as_tensor().cpu()))
        return prepare_case(self.inferer, self._replay(), self.settings, name, sha256, dict(data), now(), {})

    def _replay(self) -> EmbeddingReplay:
        memory_mb = self.settings.memory_mb if self.embedded else None
        return EmbeddingReplay(self.network, memory_mb, self.meter, self.calibration)

    def judge_source(self, case: PreparedCase, outcome: Outcome) -> None:
        """Decide where there is a reason not to adapt at all; else choose gray values, and add what the views show.

        What the predicted Dice decides needs no view, so none is encoded, and agreement and entropy stay NaN. Views
        have the gray values that are chosen for the case here.
        """
        source = outcome.source
        outcome.decision = good_enough(source, self.guard, self.least)
        if outcome.decision is not None:
            return
        case.intensity = self.choose_intensity(case)
        with torch.no_grad(), self._with_intensity(case):
            logits = self.logits(case).float()
        shown = class_agreement(logits)
        agreement, entropy = mean_agreement(shown), foreground_entropy(logits)
        outcome.source = dataclasses.replace(source, agreement=agreement, entropy=entropy)
        outcome.decision = before(outcome.source, bool(shown), self.guard, calibrated=not math.isnan(self.least))

    @phase("intensities")
    @torch.no_grad()
    def choose_intensity(self, case: PreparedCase) -> Values:
        """Gray values of the input by which the predicted Dice of the chosen slices rises by the margin; else {}."""
        if not self.intensity or not self.objective.gradient_free:
            return {}
        begin = time.perf_counter()

        def judge(values: Values) -> CaseQuality:
            if case.deadline is not None and time.monotonic() > case.deadline:
                raise OutOfTime("a change of gray values")
            case.intensity = values
            with self._with_intensity(case):
                return self._expected(case)

        plain = self._source_quality(case)
        found = search(lambda values: judge(values).gain_over(plain), self.inversion, self.margin)
        case.seconds["intensities"] = time.perf_counter() - begin
        return found

    @contextlib.contextmanager
    def _with_intensity(self, case: PreparedCase) -> Iterator[None]:
        """Within the block, the network sees the gray values chosen for the case."""
        with restoring(self.network, self.intensity):
            load(self.intensity, self._tensors(case))
            yield

    def _tensors(self, case: PreparedCase) -> dict[str, torch.Tensor]:
        """Values of the adapter `intensity` for the case."""
        changes = {name: case.intensity.get(name.rpartition(".")[2], 0.0) for name in self.intensity}
        return {name: self.intensity[name].detach() + change for name, change in changes.items()}

    @phase("gradient steps")
    def optimize(self, case: PreparedCase) -> Trajectory:
        """Adapt to a prepared case; the model keeps its values, the result is in the trajectory."""
        begin, chosen = time.perf_counter(), self._tensors(case)
        means: list[float] = []  # predicted Dice of the iterates
        merit = self._merit(case, means)
        with self._with_intensity(case), restoring(self.network, self.stepped), FeatureTap(self.network) as tap:
            head, shape = self.network.head, (len(case.views), len(case.slices))
            ratio = head.feature_stride // head.stride
            align = CaseAlignment(self.judge.alignment, tap, shape, case.shown(self.task.num_classes), ratio)
            seen: list[torch.Tensor] = []  # the latest logits, flips not undone

            def logits() -> torch.Tensor:
                tap.clear()
                seen[:] = [self.views.seen(case)]
                return self.views.mapped_back(case, seen[0])

            run = optimize(
                logits,
                self.stepped,
                self.objective,
                self.settings.steps or 0,
                self.rates,
                merit=merit,
                enough=(lambda index: means[index] >= self.least) if self._saves_steps() else None,
                deadline=case.deadline,
                alignment=lambda: align(seen[0]),
                starts=self.aligned_levels(case),
            )
        case.seconds["adapt"] = time.perf_counter() - begin
        run.tensors, run.last = run.tensors | chosen, run.last | chosen
        return run

    def _merit(self, case: PreparedCase, means: list[float]) -> Merit:
        """What decides which iterates may be kept: with a calibration, the predicted Dice less the source model's.

        Their predicted Dice, over the classes of both, are added to `means`.
        """
        if self.settings.keep == "last":
            return keep_last
        if self.meter is None:
            return functools.partial(self.judge.merit, case, self.guard.absent)
        source = self._source_quality(case)
        shown = {name for name, one in source.dice.items() if one.predicted}

        def gain(logits: torch.Tensor, by_class: Mapping[int, float]) -> float:
            plain = map_levels(lambda level: level[0], case.inputs) if self.embedded else None
            found = self._expected(case, plain)
            means.append(found.mean_over([name for name, one in found.dice.items() if one.predicted or name in shown]))
            return found.gain_over(source)

        return gain

    def _source_quality(self, case: PreparedCase) -> CaseQuality:
        """What the source model promises for the chosen slices; parameters must be as they were."""
        if case.quality is None:
            case.quality = self._expected(case)
        return case.quality

    def _saves_steps(self) -> bool:
        """Does no step follow where the predicted Dice is that of scans like the training's?"""
        return self.choosing and self.guard.skip_agreement <= 1 and self.settings.keep != "last"

    @torch.no_grad()
    def aligned_levels(self, case: PreparedCase) -> list[dict[str, torch.Tensor]]:
        """Values of the adapter `ssf` by strength of the alignment; none without it, its statistics or a step."""
        if not (self.objective.gradient_free and self.settings.steps and self.judge.levels):
            return []
        shown = case.shown(self.task.num_classes)
        pyramid = map_levels(lambda level: level[0][shown], case.inputs)  # of the slices themselves
        pyramid = pyramid if self.embedded else self.network.encode(pyramid[IMAGE])
        found = level_sums(self.network, pyramid, case.bodies[shown])
        pairs = [align_levels(self.network, self.parameters, self.judge.levels, found, a) for a in STRENGTHS]
        return [tensors for tensors in pairs if tensors]

    def too_little(self, case: PreparedCase, run: Trajectory) -> Decision | None:
        """The decision where nothing changed, or where the chosen slices gain too little to predict the scan again."""
        if not (run.best_step or case.intensity):
            return Decision.of("accepted_unchanged", "no iterate was better than the source model")
        gain = max(run.merit)
        if self.meter is not None and self.settings.keep != "last" and gain <= self.margin:
            text = f"predicted Dice {gain:+.3f} in the chosen slices, margin {self.margin:.3f}"
            return Decision.of("fallback_expected", text)
        return None

    def predict(self, case: PreparedCase, tensors: Mapping[str, torch.Tensor]) -> Segmentation:
        """Predict all slices of a prepared case with other values of the scope's parameters."""
        begin = time.perf_counter()
        with restoring(self.network, self.parameters):
            if any(not torch.equal(self.intensity[name], tensors[name]) for name in self.intensity if name in tensors):
                case.replay.rewind(forget=True)  # the encoder sees other images
            load(self.parameters, tensors)
            adapted = segment(self.inferer, case.data["image"].as_tensor(), case.grids, case.replay)
        case.seconds["predict_adapted"] = time.perf_counter() - begin
        return adapted

    def compare(self, case: PreparedCase, outcome: Outcome) -> Decision:
        """The guard's decision on what was adapted."""
        run, adapted, evidence = outcome.run, outcome.adapted, outcome.evidence
        assert run is not None and adapted is not None and evidence is not None
        if np.array_equal(adapted.labels, case.source.labels):
            return Decision.of("accepted_unchanged", "the adapted prediction is equal in every voxel")
        was, now_, last = run.agreements()
        return after(
            dataclasses.replace(outcome.source, agreement=was),
            dataclasses.replace(evidence, agreement=now_),
            self.guard,
            (last, run.entropy[-1]),
            self.margin,
        )

    def restore(self, case: PreparedCase, outcome: Outcome) -> AdaptedCase:
        """Bring the maps back to the scan's own grid, and write the record."""
        begin = time.perf_counter()
        case.replay.rewind(forget=True)  # makes room for maps of the size of the scan
        final = outcome.adapted if outcome.accepted and outcome.adapted is not None else case.source
        source, affine = case.own_grid(case.source.labels)
        labels = source.copy() if final is case.source else case.own_grid(final.labels)[0]
        uncertainty = case.own_grid(final.uncertainty, np.float32)[0]
        case.seconds["restore"] = time.perf_counter() - begin
        record = case_record(self.describe(), case, outcome, self.guard.absent, self.task.classes)
        record["labels_sha256"] = {"source": sha256_of(source), "final": sha256_of(labels)}
        tensors = outcome.run.tensors if outcome.accepted and outcome.run is not None else None
        return AdaptedCase(
            case.name, labels, source, uncertainty, affine, record, case.scan, tensors, self.task, final.expected
        )

    def logits(self, case: PreparedCase) -> torch.Tensor:
        """Logits (V, m, K, h, w) of all views of the chosen slices at the present parameters, views mapped back."""
        return self.views.mapped_back(case, self.views.seen(case))

    @torch.no_grad()
    def _expected(self, case: PreparedCase, levels: Pyramid | None = None) -> CaseQuality:
        """Predicted Dice of the chosen slices, whose levels may be known, at the present parameters."""
        assert self.meter is not None and self.calibration is not None
        size = self.settings.batch_size
        parts = [None] * len(case.images) if levels is None else split_levels(levels, size)
        bodies = np.split(case.bodies, range(size, len(case.bodies), size))
        self.meter.clear()
        with self.inferer.autocast(self.device):
            for images, part, body in zip(case.images.split(size), parts, bodies, strict=False):
                self.meter(images.to(self.device), part, body)
        return self.calibration.expected(self.meter.features())


def adapter_sha256(network: SamSegmenter) -> str:
    """sha256 of adapters and class head, without an adapter `intensity` that changes nothing, as an adaptation
    attaches it.
    """
    tensors = state_tensors(network)
    return tensors_sha256({name: t for name, t in tensors.items() if not name.startswith(INPUT) or t.any()})


def _check_trained(network: SamSegmenter, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse a class head in its initial state, and SAM-DA tensors whose gates never opened."""
    if not network.head_trained:
        raise AdapterError("the class head was never trained; train the model before adapting it")
    scopes = [(path, adapter.scope_params()) for path, _, adapter in modules(network)]
    names = [f"{path}.{name}" for path, scope in scopes for name in scope.get("gate", ())]
    gates = [parameters[name] for name in names if name in parameters]
    if gates and not any(bool(gate.any()) for gate in gates):
        raise AdapterError(
            "the SAM-DA adapter was never trained (its gates are zero); train the model before adapting it"
        )
