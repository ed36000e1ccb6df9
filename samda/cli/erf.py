# SPDX-License-Identifier: Apache-2.0
"""Measure the effective receptive field of a trained encoder.

Computes the gradient of the central feature with respect to each pixel, averaged over slices. No labels are needed. Two
features are measured: "block", the output of the last transformer block, and "neck", the embedding. The table shows the
side (pixels) of the smallest centered square with more than 20, 30, 50 or 99 percent of the influence, and its share of
the image; "-" if no square within the image has as much. Scales: "log" is the measure of the papers and depends on the
scale of the features; "mass" (no logarithm) and "normalized" (logarithm of the share of the maximum) do not.

  samda erf -m model -i scans
  samda erf -m dka_model lka_model -i scans --baseline -o fields     compare with the frozen SAM, write files
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samda.cli.options import add_shared, existing, pick_device, positive, print_json, print_table, say
from samda.errors import UsageError
from samda.version import __version__

if TYPE_CHECKING:
    import torch

    from samda.networks.segmenter import SamSegmenter
    from samda.receptive_field import ModelField


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda erf`."""
    parser.add_argument(
        "-m", "--model", type=Path, nargs="+", required=True, metavar="MODEL", help="model folders of one geometry"
    )
    add_shared(parser, "--input")
    add_shared(parser, "--output", required=False, metavar="FOLDER", help="a new folder for erf.json and erf.png")
    parser.add_argument("--baseline", action="store_true", help="also measure the backbones without adapters")
    parser.add_argument(
        "--slices", type=positive, default=50, metavar="N", help="maximum number of slices over all scans; default 50"
    )
    add_shared(parser, "--version", "--weights", "--section", "--modality", "--quiet", "--device", "--json")


def run(args: argparse.Namespace) -> None:
    """Run `samda erf`."""
    existing(args.input, "input")
    device = pick_device(args.device)
    import torch

    from samda.adapters.adapter_file import read_adapters
    from samda.data.datalists import find_cases
    from samda.inference.postprocessing import override
    from samda.inference.writer import PURPOSE
    from samda.models.export import check_folder
    from samda.models.versions import load_version, version_folder
    from samda.receptive_field import body_slices, check_same_slices, write_fields
    from samda.task import Task

    folder = check_folder(args.output.expanduser()) if args.output else None
    tasks = {
        str(model): Task.from_dict(read_adapters(version_folder(model, args.version)).task) for model in args.model
    }
    if len(tasks) < len(args.model):
        raise UsageError("--model lists a folder twice; keep one")
    check_same_slices(tasks)
    task = override(next(iter(tasks.values())), modality=args.modality)
    images = body_slices(find_cases(args.input, args.section), task, args.slices)
    say(f"{len(images)} slices of {task.image_size} pixels on {device}")
    models: list[ModelField] = []
    bases: set[tuple[str, str | None]] = set()
    for model in args.model:
        network, _, _, version = load_version(model, args.version, args.weights, device)
        models.append(measure(network, images, str(model), version))
        report = network.base_report
        base = (str(network.config.to_json()), report.sha256 if report else None)
        if args.baseline and base not in bases:
            bases.add(base)
            models.append(measure(unadapted(network), images, f"{network.config.name} without adapters", None))
    about = {  # common to all models, without names of scans
        "purpose": PURPOSE,
        "made_by": {"samda": __version__, "torch": torch.__version__},
        "images": len(images),
        "image_size": list(images[0].shape[1:]),
        "spacing_mm": task.spacing,
    }
    if folder is not None:
        write_fields(folder, models, about)
        say(f"{folder / 'erf.json'} and erf.png written")
    if args.json:
        print_json({**about, "models": [model.to_dict() for model in models]})
    else:
        print_fields(models)


def unadapted(network: SamSegmenter) -> SamSegmenter:
    """A network with the original base weights: baselines such as `full` train the base itself."""
    from samda.networks.segmenter import SamSegmenter

    assert network.base_report is not None  # a model folder is loaded with its base
    path, head = network.base_report.path, network.head_config
    base = SamSegmenter(network.config, network.num_classes, network.in_channels, weights=path, head=head)
    return base.to(network.pixel_mean.device)


def measure(network: SamSegmenter, images: Sequence[torch.Tensor], name: str, version: str | None) -> ModelField:
    """Both taps of a network."""
    from samda.progress import bar
    from samda.receptive_field import TAPS, ModelField, measure_erf

    fields = {}
    for tap in TAPS:
        with bar(f"{name}, {tap}", len(images), "slice", iterable=images) as shown:
            fields[tap] = measure_erf(network, shown, tap)
        if skipped := fields[tap].skipped:
            say(f"{name}, {tap}: {skipped} of {len(images)} slices skipped, their gradients are not finite")
    return ModelField.of(network, fields, name, version)


def print_fields(models: Sequence[ModelField]) -> None:
    """One row per model, tap and scale."""
    rows: list[list[object]] = []
    for model in models:
        for tap, scales in model.areas.items():
            rows += [[f"{model.name}, {tap}, {scale}", *areas.values()] for scale, areas in scales.items()]
    shares = next(iter(next(iter(models[0].areas.values())).values()))
    print_table(["side in pixels (part of the image)", *(f"{100 * share:g} %" for share in shares)], rows)
