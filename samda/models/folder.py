# SPDX-License-Identifier: Apache-2.0
"""A trained model is a folder.

====================== ================================================================== =============================
file                   holds                                                              read by
====================== ================================================================== =============================
`adapter.json`         format version, backbone, class head, base weights and their       samda
                       fingerprint, adapters and settings, classes, geometry, record
`adapter.safetensors`  adapters and class head of the best validation                     samda
`base.safetensors`     base weights, where asked for or where they came from no file      samda
`versions/`            versions that `samda adapt --site` made, each with the first two   samda
                       files, and which of them is active
`history.json`         the curve of the training                                          reports
`last.pt`              everything a resume needs                                          `samda train --resume`
`configs/` and more    the MONAI bundle around the model: `configs/`, `docs/`, `LICENSE`, MONAI
                       `models/model.pt`
====================== ================================================================== =============================

samda reads only JSON and safetensors of a model folder, which cannot run code; MONAI's configs and PyTorch's files can.
The base weights are fetched, given as a file, or part of the folder; their fingerprint must be the one of the training.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from samda.adapters.adapter_file import (
    HEADER,
    TENSORS,
    AdapterFile,
    check_shapes,
    load_adapters,
    read_adapters,
    save_adapters,
)
from samda.adapters.attach import attach
from samda.errors import InputError, UsageError, WeightsError, check_keys
from samda.expected_dice import Calibration
from samda.io import file_sha256, regular_file, replacing, write_text
from samda.networks.backbones import BACKBONES
from samda.networks.fingerprint import check_fingerprint
from samda.networks.segmenter import SamSegmenter
from samda.networks.weights import CONVERTED, KNOWN_FILES, read_state
from samda.output import HIDDEN, open_output
from samda.task import Task

BASE = "base.safetensors"
PLACE = Path(HIDDEN, "base")  # where the file with the base weights lay; of use on this machine only
NETWORK_KEYS = ("backbone", "num_classes", "in_channels", "head")
RECORDED = ("training", "metrics", "versions", "statistics", "calibration", "version")  # mappings in a record
HEAD = "sam"  # of folders that name none: samda 0.1 had no other, and reads them
BASE_KEYS = ("file", "sha256", "fingerprint")


def save_model(
    network: SamSegmenter,
    folder: str | Path,
    task: Task,
    record: Mapping[str, Any] | None = None,
    with_base: bool = False,
) -> None:
    """Write a trained model; existing files of it are replaced, each at once.

    Args:
        network: with its adapters; merged or not.
        folder: made if missing.
        task: what the network segments.
        record: plain values: what it was trained on and how, source statistics, versions, metrics. Without the
            statistics (`samda.train` takes them) the model cannot be adapted.
        with_base: also write the base weights. They are always written where they came from no file.

    Raises:
        InputError: task and network differ in their classes or channels.
        AdapterError: the record is not plain, or a trained tensor is not finite.
        WeightsError: the base weights cannot be read again.
    """
    _check_task(network.num_classes, network.in_channels, task, str(folder))
    report = network.base_report
    settings = (network.config.to_json(), network.num_classes, network.in_channels, network.head_config.to_json())
    built = {key: value for key, value in zip(NETWORK_KEYS, settings, strict=True) if value != {"type": HEAD}}
    base = (report.path.name if report else None, report.sha256 if report else None, network.fingerprint())
    folder = Path(folder)
    with open_output(folder, [HEADER, TENSORS, *([BASE] if with_base or report is None else [])]):
        if with_base or report is None:
            _save_base(network, folder / BASE)
        save_adapters(
            network,
            folder,
            network=built,
            base=dict(zip(BASE_KEYS, base, strict=True)),
            task=task.to_dict(),
            record=record,
        )
        if report is not None and not is_published(network.config.name, report.path.name):
            write_text(folder / PLACE, str(report.path.resolve()))


def load_model(
    folder: str | Path, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> tuple[SamSegmenter, Task, dict[str, Any]]:
    """Read a trained model.

    Args:
        folder: as :func:`save_model` wrote it.
        weights: file with the base weights; None takes `base.safetensors` of the folder, else the published file that
            the model was trained on, else the file where it lay when the model was saved, if it still has its sha256.
        device: where the network goes.

    Returns:
        The network in evaluation with its adapters loaded, the task, and the record.

    Raises:
        AdapterError, InputError, UsageError: a file of the folder is missing, damaged or contradicts itself.
        WeightsError: the base weights are missing or not those of the training.
    """
    folder = Path(folder)
    file, task = read_model(folder)
    with _describing(folder):
        network = SamSegmenter(**file.network, weights=base_weights(file, folder, weights))
        check_fingerprint(network, file.base["fingerprint"])
    attach(network, file.adapters)
    load_adapters(network, file)
    return network.to(device).eval(), task, file.record


def read_model(folder: str | Path) -> tuple[AdapterFile, Task]:
    """Read a model folder without its base weights; nothing is built but modules without memory.

    Raises:
        AdapterError, InputError: a file of the folder is missing, damaged or contradicts itself.
    """
    folder = Path(folder)
    file = read_adapters(folder)
    head = file.network.setdefault("head", HEAD)
    if isinstance(head, str):
        file.network["head"] = {"type": head}
    for section, keys in (("network", NETWORK_KEYS), ("base", BASE_KEYS)):
        values = getattr(file, section)
        check_keys(values, keys, f"{folder}/adapter.json: {section}")
        missing = [key for key in keys if key not in values]
        if missing:
            raise InputError(f"{folder}/adapter.json: {section} lacks {missing[0]!r}; copy the model folder again")
    if not isinstance(file.network["head"], Mapping):
        raise InputError(f"{folder}/adapter.json: head is {head!r}; copy the model folder again")
    task = _task(file.task, folder)
    with _describing(folder):
        _check_task(file.network["num_classes"], file.network["in_channels"], task, str(folder))  # before it is built
        _check_sizes(file)
    _check_record(file.record, folder)
    return file, task


@contextlib.contextmanager
def _describing(folder: Path) -> Iterator[None]:
    """Odd values in the header are the folder's fault."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # PyTorch adds its own traceback
        raise InputError(
            f"{folder}/adapter.json describes no network ({reason}); copy the model folder again"
        ) from error


def _check_record(record: Mapping[str, Any], folder: Path) -> None:
    """Refuse a record whose entries are not of the form that samda writes; it may lack some."""
    wrong = [key for key in RECORDED if not isinstance(record.get(key, {}), Mapping)]
    if wrong:
        raise InputError(f"{folder}/adapter.json: {wrong[0]} of the record is damaged; copy the model folder again")
    statistics = record.get("statistics", {})
    try:
        for key in ("features", "levels"):
            for layer in statistics.get(key) or ():
                rows = [row for moment in ("mean", "std") for row in layer[moment] if row is not None]
                if not np.isfinite(np.array(rows, float)).all():
                    raise ValueError("not finite")
        for entry in (statistics.get("classes") or {}).values():
            entry.items()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}/adapter.json: the source statistics are damaged ({error}); copy the model folder again"
        ) from error
    Calibration.from_record(record)


def _check_sizes(file: AdapterFile) -> None:
    """Refuse settings that ask for other tensors than the file holds, before the network takes memory for them."""
    classes, head = file.network["num_classes"], file.network["head"]
    if isinstance(classes, int) and isinstance(head, dict) and isinstance(head.get("added"), list):
        classes -= sum(n for n in head["added"] if isinstance(n, int))  # which are heads of their own
    sizes = {size for tensor in file.tensors.values() for size in tensor.shape}
    if isinstance(classes, int) and classes not in sizes:  # already the empty modules of many classes take long
        raise InputError(f"{file.source}: no tensor is of {classes!r} classes; copy the model folder again")
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        network = SamSegmenter(**file.network, weights=None)
        attach(network, file.adapters)
    check_shapes(network, file.tensors, file.source)


def own_base(folder: Path) -> Path | None:
    """The base weights in a model folder, if it has them."""
    try:
        return regular_file(folder / BASE, folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WeightsError(f"{folder / BASE} is not read ({error.strerror}); copy the file itself") from error


def base_weights(file: AdapterFile, folder: Path, given: str | Path | None) -> str | Path:
    """Where the base weights of a model folder are: `given`, or see :func:`load_model`."""
    if given is not None:
        return given
    base = own_base(folder)
    if base is not None:
        return base
    trained_on, backbone = file.base["file"], file.network["backbone"]
    if is_published(backbone, trained_on):
        return "pretrained"
    for root in (folder, folder.parent.parent):  # the second is the model of a version
        with contextlib.suppress(OSError, ValueError):
            path = regular_file(regular_file(root / PLACE, root).read_text(encoding="utf-8"))
            if file_sha256(path) == file.base["sha256"]:
                return path
    raise WeightsError(f"{folder} was trained on the base weights {trained_on}; give that file as weights")


def is_published(backbone: Any, file: str | None) -> bool:
    """Is the base of this name one that samda fetches by itself?"""
    published = [known.name for known in KNOWN_FILES.values()] + [CONVERTED]
    return isinstance(backbone, str) and backbone in BACKBONES and file in published


def _save_base(network: SamSegmenter, path: Path) -> None:
    """The base as it was before training: from its file, or as it stands where it came from none."""
    report = network.base_report
    state = network.full_state() if report is None else read_state(report.path)
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary)


def _task(values: Mapping[str, Any], folder: Path) -> Task:
    """The task of a model folder; what is wrong with it is the folder's fault, no wrong usage."""
    try:
        return Task.from_dict(values)
    except UsageError as error:
        raise InputError(f"{folder}/adapter.json: {error}; copy the model folder again") from error


def _check_task(num_classes: int, in_channels: int, task: Task, where: str) -> None:
    for what, own, wanted in (
        ("classes", num_classes, task.num_classes),
        ("input channels", in_channels, task.network_channels),
    ):
        if isinstance(own, int) and own != wanted:  # other types are refused where the network is built
            raise InputError(f"{where}: the network has {own} {what}, task {task.name!r} has {wanted}; they must agree")
