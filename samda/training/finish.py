# SPDX-License-Identifier: Apache-2.0
"""The end of a training: the best parameters become a model folder, which is a MONAI bundle of its own."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samda.adapters.base import count_parameters
from samda.data.splits import Split
from samda.embeddings import EmbeddingDataset
from samda.io import copy_file, packaged, replacing, save_tensors, write_json
from samda.models.folder import BASE, is_published, save_model
from samda.networks.segmenter import SamSegmenter
from samda.output import open_output, release_output
from samda.processes import is_main
from samda.source_statistics import feature_statistics
from samda.task import Task
from samda.training.calibration import calibrate
from samda.training.config_check import literal
from samda.training.datasets import SliceDataset
from samda.training.handlers import TrainingRecord
from samda.training.parent import Parent
from samda.version import __version__

PACKAGES = ("torch", "monai", "segment-anything", "numpy", "nibabel", "SimpleITK")


def save_training(
    network: SamSegmenter,
    record: TrainingRecord,
    task: Task,
    cases: Split,
    folder: str | Path,
    bundle_root: str | Path,
    settings: Mapping[str, Any],
    dataset: SliceDataset | EmbeddingDataset,
    with_base: bool = False,
    validation: SliceDataset | EmbeddingDataset | None = None,
    parent: Parent | None = None,
) -> dict[str, Any]:
    """Restore the best parameters and write the model folder with a bundle around it.

    Of several processes the first writes; all return the same.

    Args:
        bundle_root: the bundle whose configs and docs are copied; the packaged one where it has no configs/train.json.
        settings: the keys that shaped the training.
        dataset: the training data, for its statistics and the cost of its embeddings.
        with_base: copy the base weights into the folder.
        validation: the validation data, for the calibration of predicted Dice; None leaves it out.
        parent: the model that the training started from: its line of descent, and statistics of classes without labels.

    Returns:
        {"model", "epochs", "best_epoch", "mean_dice", "dice", "seconds", "parameters", "split", "embeddings"}; Dice on
        the validation slices, at the task's spacing.
    """
    record.restore_best(network)
    cost = getattr(dataset, "cost", None)
    slices: Any = getattr(dataset, "slices", dataset)
    best = next((row for row in record.history if row["epoch"] == record.best_epoch), {})
    summary = {
        "model": str(folder),
        "epochs": len(record.history),
        "best_epoch": record.best_epoch,
        "mean_dice": best.get("mean_dice"),
        "dice": best.get("dice", {}),
        "seconds": round(sum(row["seconds"] for row in record.history), 1),
        "parameters": count_parameters(network),
        "split": cases.note,
        "embeddings": cost,
    }
    if not is_main():
        return summary
    training = {key: value for key, value in summary.items() if key not in ("model", "mean_dice", "dice")}
    training |= {"cases": {"training": len(cases.training), "validation": len(cases.validation)}}
    training |= {"settings": {key: value for key, value in settings.items() if key != "task"}}
    shown = dataset.foreground.nonzero().flatten().tolist()
    statistics = slices.statistics.to_dict() | feature_statistics(network, task, dataset, shown)
    if parent is not None:
        training["parent"] = parent.descent()
        statistics = _with_old(statistics, parent.file.record.get("statistics", {}))
    calibration = None
    if validation is not None:
        held_out: Any = getattr(validation, "slices", validation)
        record.restore_apart(network)
        spent = summary["seconds"] + (cost or {}).get("seconds", 0.0)
        calibration = calibrate(network, held_out, cases, statistics, spent)
        record.restore_best(network)
    content = {
        "purpose": "research use only",
        "versions": package_versions(),
        "training": training,
        "metrics": {
            "where": "validation cases, slices at the task's spacing, pooled per case",
            "mean_dice": summary["mean_dice"],
            "dice": summary["dice"],
        },
        "statistics": statistics,
        **({} if calibration is None else {"calibration": calibration}),
    }
    with open_output(folder):
        save_model(network, folder, task, content, with_base)
        copy_bundle(bundle_root, folder, task, network, settings)
    release_output(folder)
    return summary


def _with_old(statistics: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Source statistics in which classes without labels have the values that they have in `old`."""
    classes = {
        name: old.get("classes", {}).get(name, entry) if not entry["slices"] else entry
        for name, entry in statistics["classes"].items()
    }
    features = []
    for layer, before in zip(statistics["features"], old.get("features") or statistics["features"], strict=True):
        rows = {key: [*before[key], *[None] * (len(layer[key]) - len(before[key]))] for key in layer}
        features.append({key: [a or b for a, b in zip(layer[key], rows[key], strict=True)] for key in layer})
    return {**statistics, "classes": classes, "features": features}


def package_versions() -> dict[str, str]:
    """Versions of samda, Python and the packages that shape the numbers."""
    return {"samda": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def copy_bundle(
    bundle_root: str | Path, folder: str | Path, task: Task, network: SamSegmenter, settings: Mapping[str, Any]
) -> None:
    """Make a model folder a MONAI bundle: configs, docs, license, metadata that name the classes, models/model.pt.

    models/model.pt repeats adapter.safetensors for MONAI's own tools; samda does not read it. configs/train.json takes
    task, backbone, base weights, head and adapters of this training as its defaults, so model.pt fits `network_def`.
    """
    source, folder = Path(bundle_root), Path(folder)
    if not (source / "configs" / "train.json").is_file():
        source = packaged("bundles", "sam_segmentation")
    if source.resolve() != folder.resolve():
        for name in ("configs", "docs"):
            if (source / name).is_dir():
                for file in sorted((source / name).rglob("*")):
                    if file.is_file() and not file.suffix.startswith(".py"):
                        copy_file(file, folder / file.relative_to(source))
        copy_file(source / "LICENSE", folder / "LICENSE")
    path = folder / "configs" / "train.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"task": literal(task.to_dict()), "image_size": None, "spacing": None}
    report = network.base_report
    name = report.path.name if report else BASE
    config["weights"] = "pretrained" if is_published(network.config.name, name) else literal(name)
    write_json(
        path, config | {key: literal(settings[key]) for key in ("backbone", "adapters", "head") if key in settings}
    )
    path = folder / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    metadata["name"] = literal(f"{task.name}: SAM segmentation with adapters")
    metadata["network_data_format"]["inputs"]["image"] |= {"modality": task.modality, "num_channels": task.in_channels}
    channels = literal({str(k): name for k, name in enumerate(task.classes)})
    metadata["network_data_format"]["outputs"]["pred"] |= {"num_channels": task.num_classes, "channel_def": channels}
    write_json(path, metadata)
    with replacing(folder / "models" / "model.pt") as temporary:
        save_tensors(network.state_dict(), temporary)
