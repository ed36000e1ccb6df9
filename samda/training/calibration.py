# SPDX-License-Identifier: Apache-2.0
"""The calibration of predicted Dice (:mod:`samda.expected_dice`), at the end of a training.

Validation patients are predicted by parameters that had not seen them, as they are and under intensity changes of
several strengths (:mod:`samda.views`); also after what an adaptation tries first, other gray values of the input and
the alignments of levels, which shows how gains are predicted. The cost is bounded: at most so many patients and slices,
and a share of the training's time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.utils import eval_mode

from samda.adapters.attach import scope_parameters
from samda.adapters.intensity import IntensityAdapter, tried
from samda.data.labels import OPEN
from samda.data.slices import center_channels
from samda.data.splits import Split, patient_of
from samda.errors import AdapterError
from samda.expected_dice import Row, fit_calibration
from samda.inference.volume import VolumeInferer
from samda.metrics import confusion_matrix
from samda.networks.head import Pyramid, cat_levels, map_levels, split_levels
from samda.networks.ops import argmax
from samda.networks.segmenter import SamSegmenter
from samda.progress import bar
from samda.quality import QualityMeter
from samda.source_statistics import STRENGTHS as ALIGNMENTS
from samda.source_statistics import align_levels, level_sums, slice_bodies
from samda.training import pace
from samda.training.datasets import SliceDataset
from samda.views import FAMILIES, View, apply_view, make_views, seed_of

MOST_CASES, MOST_SLICES = 8, 12  # cases, and slices of each
STRENGTHS = (2.0, 4.0, 1.0)  # of the changes
ROUNDS = len(FAMILIES) * len(STRENGTHS)  # every case under every change
LEAST_SECONDS = 5.0

logger = logging.getLogger(__name__)


def calibrate(
    network: SamSegmenter,
    slices: SliceDataset,
    cases: Split,
    statistics: Mapping[str, Any],
    training_seconds: float,
    batch_size: int = 4,
) -> dict[str, Any] | None:
    """The calibration as the record of the model folder has it; None, with a warning, where there is too little.

    Args:
        network: with parameters that have not seen the patients of `slices`.
        slices: the validation slices, without augmentation.
        cases: of the training, for the patients of `slices`.
        statistics: source statistics of the record.
        training_seconds: the calibration takes at most a share of it, or 5 s.
        batch_size: slices encoded at once.
    """
    end = pace.clock() + max(LEAST_SECONDS, pace.CALIBRATING * training_seconds)
    meter = QualityMeter(network, slices.task, statistics)
    chosen = _choose(slices)
    changes = tried(inversion=slices.task.modality != "CT")
    rows: list[Row] = []
    progress = bar("calibrating", (ROUNDS + 1) * len(chosen), "scan")
    with torch.no_grad(), eval_mode(network):
        for turn in range(ROUNDS + 1):
            for number, (case, indices) in enumerate(chosen.items()):
                if pace.clock() < end:
                    view = _view(turn, number, slices.names[case])
                    patient = patient_of(cases.validation[case])
                    values = changes[(turn + number) % len(changes)]
                    rows += _rows(meter, slices, indices, view, values, patient, f"{case}/{turn}", batch_size)
                progress.update()
    progress.close()
    where = "validation patients" if cases.apart else "held-out slices of the training patient"
    fitted = fit_calibration(rows, {"from": f"{where}, as they are and under changes of intensity"})
    if fitted is None:
        logger.warning("too few validation scans with foreground to calibrate the predicted Dice; none will be given")
        return None
    about = fitted.about
    logger.info("predicted Dice: error %(mean_absolute_error).3f in %(rows)d predictions of %(from)s", about)
    return fitted.to_dict()


def _choose(slices: SliceDataset) -> dict[int, list[int]]:
    """Case -> items, evenly over those with foreground and half as many others."""
    chosen: dict[int, list[int]] = {}
    for case in _evenly(range(len(slices.names)), MOST_CASES):
        own = [index for index, (number, _) in enumerate(slices.items) if number == case]
        shown = [index for index in own if slices.foreground[index]]
        empty = [index for index in own if not slices.foreground[index]]
        if shown:
            chosen[case] = sorted(_evenly(shown, MOST_SLICES) + _evenly(empty, MOST_SLICES // 4))
    return chosen


def _evenly(items: Sequence[int], count: int) -> list[int]:
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def _view(turn: int, number: int, name: str) -> View:
    """The change of a case in a round: none first, then another family and strength in every round and case."""
    if turn == 0:
        return View()
    step = turn - 1 + number
    family, strength = FAMILIES[step % len(FAMILIES)], STRENGTHS[(turn - 1 + number // len(FAMILIES)) % len(STRENGTHS)]
    return make_views(2, seed_of(name, turn), (family,), strength)[1]


def _rows(
    meter: QualityMeter,
    slices: SliceDataset,
    indices: Sequence[int],
    view: View,
    values: Mapping[str, float],
    patient: str,
    scan: str,
    batch_size: int,
) -> list[Row]:
    """Rows of the plain prediction, of that with other gray `values` and, with the adapter `ssf`, of aligned levels."""
    network, task = meter.network, slices.task
    items = [slices.view(index, 0) for index in indices]
    images = apply_view(view, torch.stack([item["image"] for item in items]), range(len(items)))
    images = images.to(network.pixel_mean)
    labels = torch.cat([item["label"] for item in items]).numpy().astype(np.int64)
    pyramid, changed = (
        _encode(meter, inputs, batch_size) for inputs in (images, IntensityAdapter.of(values).to(images)(images))
    )
    possible = None if slices.partial is None else slices.partial.possible().numpy()
    counts, rows = _counts(meter, images, pyramid, labels, batch_size, possible), []
    variants = [(meter.features(), counts)]
    counts = _counts(meter, images, changed, labels, batch_size, possible)
    variants.append((meter.features(), counts))
    parameters = _alignable(network)
    shown = torch.from_numpy(((labels > 0) & (labels < OPEN)).reshape(len(labels), -1).any(1))
    if parameters and meter.statistics.get("levels"):
        bodies = slice_bodies(center_channels(images[shown], task), task)
        found = level_sums(network, map_levels(lambda level: level[shown], pyramid), bodies)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        aligned = [align_levels(network, parameters, meter.statistics["levels"], found, a) for a in ALIGNMENTS]
        try:
            for tensors in aligned:
                for name, tensor in tensors.items():
                    parameters[name].copy_(tensor)
                counts = _counts(meter, images, pyramid, labels, batch_size, possible)
                variants.append((meter.features(), counts))
        finally:
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
    for variant, (features, counts) in enumerate(variants):
        for k, name in enumerate(task.classes[1:], start=1):
            true, predicted = counts[k].sum(), counts[:, k].sum()
            if true or predicted:
                dice = float(2 * counts[k, k] / (true + predicted))
                rows.append(Row(patient, scan, variant, name, features[name], dice, view != View(), bool(true)))
    return rows


def _autocast(meter: QualityMeter) -> torch.autocast:
    """The precision of `samda predict`."""
    return VolumeInferer(meter.task).autocast(meter.network.pixel_mean.device)


def _encode(meter: QualityMeter, images: torch.Tensor, batch_size: int) -> Pyramid:
    with _autocast(meter):
        return cat_levels([meter.network.encode(part) for part in images.split(batch_size)])


def _counts(
    meter: QualityMeter,
    images: torch.Tensor,
    pyramid: Pyramid,
    labels: np.ndarray,
    batch_size: int,
    possible: np.ndarray | None,
) -> np.ndarray:
    """Predict a scan, which the meter sees; pixels by class of the label and of the prediction, (K, K).

    What partial labels leave `possible` (256, K) counts as background of both.
    """
    meter.clear()
    parts = zip(images.split(batch_size), split_levels(pyramid, batch_size), strict=True)
    with _autocast(meter):
        found = torch.cat([argmax(meter(part, levels), 1).cpu() for part, levels in parts]).numpy()
    if possible is not None:
        found = np.where((labels >= OPEN) & possible[labels, found], 0, found)
        labels = np.where(labels < OPEN, labels, 0)
    return confusion_matrix(found, labels, meter.task.num_classes)


def _alignable(network: SamSegmenter) -> dict[str, torch.nn.Parameter]:
    try:
        return scope_parameters(network, "ssf")
    except AdapterError:
        return {}
