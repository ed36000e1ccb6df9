# SPDX-License-Identifier: Apache-2.0
"""Rows of speed.py about whole volumes: predicting one, adapting to one."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Options, Row, interleave, median, relative_error
from rivals import SliceBySlice, sam_with_original_encoder

from samda.adaptation.engine import Adaptation
from samda.cli.demo import hold_out
from samda.data.transforms import build_preprocessing
from samda.examples import fetch_examples
from samda.inference.predict import Predictor
from samda.inference.volume import VolumeInferer
from samda.models.folder import load_model
from samda.training import train

__all__ = ["adapt", "predict"]

QUICK = {"epochs": 24, "views": 1, "val_interval": 24, "patience": 0}  # not good, but no chance result either


@functools.cache
def _model(options: Options) -> tuple:
    """The given model, or one trained on patient A in a minute; network, task, record."""
    if options.model is not None:
        return load_model(options.model)
    example = fetch_examples()["A"]
    with tempfile.TemporaryDirectory() as folder:
        dataset = hold_out(example, Path(folder) / "data")
        train(dataset, Path(folder) / "model", example.task, "sam_da", "vit_t", QUICK, device=options.device)
        return load_model(Path(folder) / "model")


def predict(options: Options) -> Iterator[Row]:
    """Patient A from preprocessed volume to label map, in memory: samda against SamPredictor, slice by slice."""
    example, device = fetch_examples()["A"], options.device
    network, task, _ = _model(options)
    network.to(device)
    sam = sam_with_original_encoder(task.image_size).to(device)
    image = build_preprocessing(task, labels=False)({"image": str(example.image)})["image"]
    volume, slices = image.as_tensor()[0], image.shape[-1]
    inferers = {amp: VolumeInferer(task, amp=amp, device=device) for amp in (None, "bf16")}
    rivals = {amp: SliceBySlice(sam, task.num_classes - 1, amp, device) for amp in (None, "bf16")}
    runs = {
        "SamPredictor fp32": lambda: rivals[None](volume),
        "samda fp32": lambda: inferers[None](image[None], network),
        "SamPredictor bf16": lambda: rivals["bf16"](volume),
        "samda bf16": lambda: inferers["bf16"](image[None], network),
    }
    full, half = runs["samda fp32"](), runs["samda bf16"]()  # warms up, too
    rivals[None](volume[..., :4]), rivals["bf16"](volume[..., :4])
    seconds = interleave(runs, min(options.repeats, 2), warm_up=0, device=device)
    theirs, ours, theirs_half, ours_half = (median(values) for values in seconds.values())
    with torch.no_grad():
        pixels = torch.rand(1, 3, task.image_size, task.image_size, device=device)
        error = relative_error(network.image_encoder(pixels), sam.image_encoder(pixels))
    what = f"predicting patient A, {slices} slices, vit_t at {task.image_size} px, {task.num_classes - 1} classes"
    rate = f"{slices / ours:.1f} against {slices / theirs:.1f} slices/s"
    yield Row(
        f"{what}, fp32",
        "SamPredictor, slice by slice, fp32",
        ">= 1.3x",
        seconds,
        f"{theirs / ours:.2f}x ({rate})",
        theirs / ours >= 1.3,
        f"embeddings differ by {error:.1e}",
    )
    same = (full == half).float().mean().item()
    yield Row(
        f"{what}, bf16",
        "SamPredictor, slice by slice, fp32",
        ">= 2.5x",
        {},
        f"{theirs / ours_half:.2f}x ({slices / ours_half:.1f} slices/s)",
        theirs / ours_half >= 2.5,
        f"same run; {theirs_half / ours_half:.2f}x SamPredictor in bf16; {100 * same:.2f} % of the voxels as in fp32",
    )


def adapt(options: Options) -> Iterator[Row]:
    """Adapting to patient A (views, steps, guard, both predictions) against predicting A."""
    example = fetch_examples()["A"]
    network, task, record = _model(options)
    predictor = Predictor(network, task, options.device)
    adaptation = Adaptation(network, task, record, device=options.device)
    decisions = []
    runs = {
        "predict": lambda: predictor.predict(example.image),
        "adapt": lambda: decisions.append(adaptation.adapt(example.image).record),
    }
    seconds = interleave(runs, min(options.repeats, 2), device=options.device)
    plain, adapted = (median(values) for values in seconds.values())
    yield Row(
        "adapting to patient A, 112 slices, vit_t, the defaults of `samda adapt`",
        "predicting it",
        "<= 4x its time",
        seconds,
        f"{adapted / plain:.2f}x",
        adapted / plain <= 4,
        f"decision: {decisions[-1]['decision']} ({decisions[-1]['reason']})",
    )
