# SPDX-License-Identifier: Apache-2.0
"""Show adapters and parameter counts, or a trained model.

  samda info             backbones, adapters and their counts
  samda info -m model    backbone, adapters, classes, geometry and results of a trained model

Base weights are not needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from samda.cli.options import add_shared, print_json, print_table
from samda.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `samda info`."""
    add_shared(parser, "--model", required=False)
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> None:
    """Show it."""
    facts = describe_model(args.model) if args.model else describe_package()
    if args.json:
        print_json(facts)
    elif args.model:
        print_model(facts)
    else:
        print_package(facts)


def describe_package() -> dict[str, Any]:
    """Backbones with their size, and the adapter overlays of samda with settings and parameter counts.

    Networks are built on torch's meta device, without memory.
    """
    import warnings

    import torch

    from samda.adapters import attach, build_configs, count_parameters, detach
    from samda.io import load_yaml, packaged
    from samda.networks.backbones import BACKBONES
    from samda.networks.segmenter import SamSegmenter

    overlays = {
        path.stem: load_yaml(path.read_text(encoding="utf-8"))
        for path in sorted(packaged("configs", "adapters").glob("*"))
    }
    adapters: dict[str, Any] = {
        name: {"settings": overlay["adapters"], "parameters": {}} for name, overlay in overlays.items()
    }
    backbones, pyramids, head = {}, {}, 0
    for backbone in BACKBONES:
        with torch.device("meta"):
            network = SamSegmenter(backbone, num_classes=2, weights=None, head="sam")
            pyramid = SamSegmenter(backbone, num_classes=2, weights=None, head="pyramid")
        pyramids[backbone] = count_parameters(pyramid)["head"]
        counts = count_parameters(network)
        backbones[backbone] = {"parameters": counts["base"]}
        head = counts["head"] // 2
        for entry in adapters.values():
            configs = build_configs(entry["settings"])
            host = pyramid if any("level" in config.roles for config in configs.values()) else network
            with warnings.catch_warnings(action="ignore"):  # warnings about settings concern trainings
                attach(host, configs)
            counts = count_parameters(host)
            entry["parameters"][backbone] = counts["trainable"] - counts["head"]
            entry["encoded_once"] = not host.encoder_adapted
            detach(host)
    heads = {"head_per_class": head, "pyramid_head": pyramids}
    return {"version": __version__, "backbones": backbones, **heads, "adapters": adapters}


def print_package(facts: dict[str, Any]) -> None:
    """The table of :func:`describe_package`."""
    names = list(facts["backbones"])
    sizes = [entry["parameters"] for entry in facts["backbones"].values()]
    counts = [[name, *entry["parameters"].values()] for name, entry in facts["adapters"].items()]
    print(f"samda {facts['version']}: trainable parameters of each adapter, by backbone\n")
    print_table(["adapter", *names], [*counts, ["SAM itself", *sizes]])
    once = [name for name, entry in facts["adapters"].items() if entry["encoded_once"]]
    pyramids = ", ".join(f"{count:,} ({backbone})" for backbone, count in facts["pyramid_head"].items())
    print(
        f"\nThe class head comes on top: the head sam with {facts['head_per_class']:,} per class, background included;"
    )
    print(f"pyramid, for 2 classes, with {pyramids}.")
    print(f"With {', '.join(once)} the encoder is unchanged and slices are encoded once.")


def describe_model(folder: Path) -> dict[str, Any]:
    """Content of a model folder's JSON and safetensors files; nothing in the folder is executed."""
    from samda.models.folder import read_model
    from samda.models.versions import active_version

    file, _ = read_model(folder)
    return {
        "model": str(folder),
        "active_version": active_version(folder),
        "network": file.network,
        "base": {key: value for key, value in file.base.items() if not isinstance(value, dict | list)},
        "adapters": {name: config.to_dict() for name, config in file.adapters.items()},
        "parameters": sum(tensor.numel() for tensor in file.tensors.values()),
        "task": file.task,
        "record": file.record,
    }


def print_model(facts: dict[str, Any]) -> None:
    """The main points of :func:`describe_model`."""
    task, record = facts["task"], facts["record"]
    neighbors = ", between its two neighbors" if task.get("context") else ""
    kept = task.get("keep_largest", False)
    training, metrics = record.get("training", {}), record.get("metrics", {})
    dice = metrics.get("mean_dice")
    rows = [
        ("model", facts["model"]),
        ("active version", facts["active_version"]),
        ("backbone", facts["network"].get("backbone")),
        ("base weights", facts["base"].get("file") or "in the folder"),
        ("class head", facts["network"].get("head", {}).get("type", "sam")),
        ("adapters", ", ".join(facts["adapters"]) or "none"),
        ("saved parameters", f"{facts['parameters']:,}"),
        ("classes", ", ".join(task.get("classes", []))),
        ("modality", task.get("modality")),
        ("slices", f"{task.get('axis')}, {task.get('image_size')} pixels of {task.get('spacing')} mm" + neighbors),
        ("largest component of", ", ".join(kept) if isinstance(kept, list) else "every class" if kept else "none"),
        (
            "trained",
            f"{training.get('epochs')} epochs, best epoch {training.get('best_epoch')}; {training.get('split')}",
        ),
        ("validation Dice", f"{dice:.3f}" if isinstance(dice, float) else dice),
        ("samda", record.get("versions", {}).get("samda")),
        ("purpose", record.get("purpose")),
    ]
    for name, value in rows:
        print(f"{name:<20} {value}")
