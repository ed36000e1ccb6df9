# SPDX-License-Identifier: Apache-2.0
"""From a prepared case to its outcome: adapt, judge, decide, record."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.spatialimages import SpatialImage

from samda import provenance as records
from samda.adaptation.agreement import class_agreement, foreground_entropy, mean_agreement
from samda.adaptation.case import PreparedCase, Segmentation
from samda.adaptation.guard import Decision, Evidence, after, before
from samda.adaptation.loop import NotFinite, OutOfTime, Trajectory
from samda.errors import SamdaError
from samda.inference.postprocessing import own_grid
from samda.inference.writer import label_image

if TYPE_CHECKING:
    from samda.adaptation.engine import Adaptation


logger = logging.getLogger(__name__)


@dataclasses.dataclass
class AdaptedCase:
    """What became of one scan, on the scan's own grid and in the axis order of its file.

    Attributes:
        case: name of the case.
        labels: (X, Y, Z) the map to use: the adapted one where it was accepted, else the source's byte for byte.
        source: (X, Y, Z) the plain prediction.
        uncertainty: (X, Y, Z) float32 in [0, 1], normalized entropy of the prediction in `labels`.
        affine: (4, 4) voxel index to RAS mm.
        record: the audit record.
        scan: the scan's file or DICOM folder, or the nibabel image that it came as.
        tensors: the adapted parameters, where accepted.
    """

    case: str
    labels: np.ndarray
    source: np.ndarray
    uncertainty: np.ndarray
    affine: np.ndarray
    record: dict[str, Any]
    scan: Path | SpatialImage | None = None
    tensors: dict[str, torch.Tensor] | None = None

    @property
    def image(self) -> SpatialImage:
        """The map to use as a nibabel image; affine and form codes are the scan's own."""
        return label_image(self.labels, self.scan, self.affine)

    @property
    def difference(self) -> np.ndarray:
        """(X, Y, Z) uint8: 0 as before, 1 foreground removed, 2 foreground added, 3 another class."""
        before_, now = self.source > 0, self.labels > 0
        change = np.where(before_ & now, 3, np.where(before_, 1, 2))
        return np.where(self.source == self.labels, 0, change).astype(np.uint8)


@dataclasses.dataclass
class Outcome:
    """A decision and what led to it."""

    decision: Decision
    source: Evidence
    run: Trajectory | None = None
    adapted: Segmentation | None = None
    evidence: Evidence | None = None
    error: str | None = None

    @property
    def accepted(self) -> bool:
        return self.decision.decision == "accepted" and self.adapted is not None


def decide(engine: Adaptation, prepared: PreparedCase) -> Outcome:
    """Adapt to a prepared case and let the guard decide. Whatever goes wrong while adapting ends in a fallback."""
    with torch.no_grad():
        logits = engine.logits(prepared).float()
    shown = class_agreement(logits)
    source = engine.judge.evidence(prepared, prepared.source, mean_agreement(shown), foreground_entropy(logits))
    reason = before(source, bool(shown), engine.guard)
    if reason is not None:
        return Outcome(reason, source)
    outcome = Outcome(Decision.of("fallback_error", ""), source)
    try:
        outcome.run = run = engine.optimize(prepared)
        outcome.source = source = dataclasses.replace(source, drift=run.drift[0])
        if run.best_step == 0:
            outcome.decision = Decision.of("accepted_unchanged", "no iterate was better than the source model")
            return outcome
        adapted = engine.predict(prepared, run.tensors)
        best = run.best_step
        outcome.evidence = engine.judge.evidence(
            prepared, adapted, run.agreement[best], run.entropy[best], run.drift[best]
        )
        outcome.adapted = adapted
        if np.array_equal(adapted.labels, prepared.source.labels):
            outcome.decision = Decision.of("accepted_unchanged", "the adapted model predicts the same voxel by voxel")
        else:
            # one set of classes for all: an organ that is found again must not lower the mean over those shown
            classes = {*run.by_class[0], *run.by_class[best], *run.by_class[-1]}
            was, now, last = (mean_agreement(run.by_class[i], classes) for i in (0, best, -1))
            outcome.decision = after(
                dataclasses.replace(source, agreement=was),
                dataclasses.replace(outcome.evidence, agreement=now),
                engine.guard,
                (last, run.entropy[-1]),
            )
    except Exception as error:
        outcome.adapted = None
        outcome.decision, outcome.error = _fallback(error), f"{type(error).__name__}: {error}"
        logger.debug("case fell back", exc_info=True)
    return outcome


def _fallback(error: Exception) -> Decision:
    """The reason code of an exception."""
    text = " ".join(str(error).split())
    if isinstance(error, NotFinite):
        return Decision.of("fallback_nonfinite", f"not finite: {text}")
    if isinstance(error, OutOfTime):
        return Decision.of("fallback_timeout", f"the time limit passed at {text}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return Decision.of("fallback_oom", "memory ran out while adapting; lower slices or views")
    if isinstance(error, SamdaError) and "not finite" in text:
        return Decision.of("fallback_nonfinite", text)
    return Decision.of("fallback_error", f"{type(error).__name__} while adapting: {text}")


def finish(engine: Adaptation, prepared: PreparedCase, started: str) -> AdaptedCase:
    """Decide, bring the maps back to the scan's own grid, and write the record."""
    outcome = decide(engine, prepared)
    begin = time.perf_counter()
    final = outcome.adapted if outcome.accepted and outcome.adapted is not None else prepared.source
    source, affine = _restore(engine, prepared, prepared.source.labels)
    labels = _restore(engine, prepared, final.labels)[0] if final is not prepared.source else source.copy()
    uncertainty = _restore(engine, prepared, final.uncertainty)[0]
    prepared.seconds["restore"] = time.perf_counter() - begin
    record = _record(engine, prepared, outcome, started)
    record["labels_sha256"] = {"source": records.sha256_of(source), "final": records.sha256_of(labels)}
    path = prepared.data["image"].meta.get("filename_or_obj")
    tensors = outcome.run.tensors if outcome.accepted and outcome.run is not None else None
    scan = Path(path) if path else None
    return AdaptedCase(prepared.name, labels, source, uncertainty, affine, record, scan, tensors)


def _restore(engine: Adaptation, prepared: PreparedCase, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map in RAS order in the axis order of the scan's file, and its affine."""
    data: dict[Any, Any] = {"image": prepared.data["image"], "pred": MetaTensor(torch.from_numpy(values)[None])}
    restored = own_grid(engine.preprocessing)(data)["pred"]
    return restored.as_tensor()[0].numpy().astype(values.dtype, copy=False), np.asarray(restored.affine, float)


def _record(engine: Adaptation, prepared: PreparedCase, outcome: Outcome, started: str) -> dict[str, Any]:
    run, source, adapted = outcome.run, outcome.source, outcome.evidence
    kept = adapted if adapted is not None else source
    absent = engine.guard.absent
    case_id = records.pseudonym(prepared.input_sha256)
    return _frame(engine, case_id, prepared.input_sha256, started) | {
        "seconds": {stage: round(seconds, 3) for stage, seconds in prepared.seconds.items()},
        "seed": prepared.seed,
        "slices": prepared.slices,
        "views": [view.describe() for view in prepared.views],
        "steps_run": len(run.loss) - 1 if run else 0,
        "best_step": run.best_step if run else 0,
        "loss": _curve(run.loss if run else []),
        "agreement": _curve(run.agreement if run else [source.agreement]),
        "entropy": _curve(run.entropy if run else [source.entropy]),
        "merit": _curve(run.merit if run else []),
        "drift": _curve(run.drift if run else []),
        "param_displacement": _curve(run.displacement if run else []),
        "volumes_ml": {c: [round(source.volumes_ml[c], 3), round(kept.volumes_ml[c], 3)] for c in source.volumes_ml},
        "dice_source_adapted": _dice(prepared.source, outcome.adapted, engine.task.classes),
        "quality": {
            "source": source.to_dict(absent),
            "adapted": None if adapted is None else adapted.to_dict(absent),
        },
        "decision": outcome.decision.decision,
        "reason": outcome.decision.reason,
        "explanation": outcome.decision.explanation,
        "error": outcome.error,
    }


def failed_record(
    engine: Adaptation, input_sha256: str | None, name: str, error: Exception, started: str
) -> dict[str, Any]:
    """The record of a scan that gave no prediction at all; `name` stands in where not even its hash is known."""
    reason = "failed_input" if isinstance(error, SamdaError) else "failed_error"
    text = " ".join(str(error).split())
    case_id = records.pseudonym(input_sha256 or records.sha256_of(name))
    empty: dict[str, Any] = {
        key: [] for key in ("loss", "agreement", "entropy", "merit", "drift", "param_displacement")
    }
    return (
        _frame(engine, case_id, input_sha256, started)
        | empty
        | {
            "seconds": {},
            "seed": None,
            "slices": [],
            "views": [],
            "steps_run": 0,
            "best_step": 0,
            "volumes_ml": {},
            "dice_source_adapted": {},
            "quality": {"source": None, "adapted": None},
            "decision": "failed",
            "reason": reason,
            "explanation": "the scan cannot be used" if reason == "failed_input" else "an unexpected error",
            "labels_sha256": None,
            "error": f"{type(error).__name__}: {text}",
        }
    )


def _frame(engine: Adaptation, case_id: str, input_sha256: str | None, started: str) -> dict[str, Any]:
    """The fields that say who adapted what with which settings."""
    return {
        "record_version": records.RECORD_VERSION,
        "time_start": started,
        "time_end": records.now(),
        "case_id": case_id,
        "input_sha256": input_sha256,
        **engine.hashes,
        "model_version": engine.version,
        "config": engine.config,
        "config_sha256": records.sha256_of(engine.config),
        "method": engine.objective.name,
        "scope": engine.scope,
        "device": str(engine.device),
        "versions": records.versions(),
        "parameters_moved": sum(p.numel() for p in engine.parameters.values()),
        "output_files": {},
    }


def _curve(values: list[float]) -> list[float | None]:
    """Seven digits; None where there is no value, as JSON has it."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def _dice(source: Segmentation, adapted: Segmentation | None, classes: tuple[str, ...]) -> Mapping[str, float | None]:
    """Dice between source and adapted prediction per class; None where neither has it, {} where nothing was adapted."""
    if adapted is None:
        return {}
    result: dict[str, float | None] = {}
    for k, name in enumerate(classes):
        if k:
            a, b = source.labels == k, adapted.labels == k
            total = int(a.sum()) + int(b.sum())
            result[name] = round(2 * int((a & b).sum()) / total, 6) if total else None
    return result
