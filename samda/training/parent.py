# SPDX-License-Identifier: Apache-2.0
"""A training that starts from a trained model, its parent: same base, adapters and head, perhaps further classes.

By default all parameters train on, and where labels leave open what a voxel is, the parent's prediction is a soft
target (distillation), so that classes without new labels are not forgotten. Without new classes the result is a mean of
the parameters of both. With `keep_classes: exact` the parent's parameters are frozen and new classes get a branch of
the head: the old logits stay bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from samda.adapters.adapter_file import TENSORS, AdapterFile, load_adapters, state_tensors
from samda.adapters.base import trainable_parameters
from samda.data.labels import PartialLabels
from samda.data.splits import Split
from samda.errors import UsageError
from samda.io import file_sha256
from samda.models.folder import base_weights, own_base, read_model
from samda.models.versions import active_version, version_folder
from samda.networks.fingerprint import check_fingerprint
from samda.networks.head import Pyramid
from samda.networks.pyramid_head import PyramidHead
from samda.networks.segmenter import SamSegmenter
from samda.task import Task
from samda.training.datasets import prepare_batch
from samda.training.loss import open_targets

logger = logging.getLogger(__name__)

EXACT = "exact"
PADDING = -1  # label of padded items, see samda.training.ddp
GEOMETRY = ("modality", "window", "percentiles", "spacing", "picture_size", "axis")


@dataclasses.dataclass(frozen=True)
class Parent:
    """The active version of a model folder; nothing in it is executed."""

    model: Path
    version: str
    folder: Path  # of the version
    file: AdapterFile
    task: Task

    def settings(self, task: Task, keep_classes: str | None) -> dict[str, Any]:
        """Keys of train.json that its children share, but for the base weights; for `task` with further classes."""
        head = dict(self.file.network["head"])
        new = task.num_classes - self.task.num_classes
        if new > 0 and head.get("added") and keep_classes != EXACT:
            raise UsageError(f"{self.model} has classes beside frozen ones; add further ones with keep_classes {EXACT}")
        if keep_classes == EXACT and new > 0:
            if head["type"] != "pyramid":
                raise UsageError(f"keep_classes exact needs the head pyramid, {self.model} has {head['type']!r}")
            head["added"] = [*head.get("added", ()), new]
        adapters = {name: config.to_dict() for name, config in self.file.adapters.items()}
        return {
            "backbone": self.file.network["backbone"],
            "head": head,
            "adapters": adapters,
            "task": task.to_dict(),
        }

    def weights(self) -> str:
        """Where its base weights are; WeightsError where they are not to be found."""
        return str(base_weights(self.file, self.folder, own_base(self.model)))

    def descent(self) -> dict[str, Any]:
        """For the record of a child: which model this is, and what it was trained on."""
        record, training = self.file.record, self.file.record.get("training", {})
        kept = ("cases", "epochs", "split", "parent")
        return {
            "model": self.model.resolve().name,
            "version": self.version,
            "sha256": file_sha256(self.folder / TENSORS),
            "task": self.task.name,
            "classes": list(self.task.classes),
            "training": {key: training[key] for key in kept if key in training},
            "metrics": record.get("metrics", {}),
            "samda": record.get("versions", {}).get("samda"),
        }


def read_parent(model: str | Path | None) -> Parent | None:
    """The model that a training starts from; None for none."""
    if model is None:
        return None
    model = Path(model).expanduser()
    if not model.is_dir():
        raise UsageError(f"there is no model folder {model} to start from; give the folder of a trained model")
    version = active_version(model)
    folder = version_folder(model, version)
    return Parent(model, version, folder, *read_model(folder))


def start_from(
    network: SamSegmenter, parent: Parent | None, task: Task, keep_classes: str | None = None
) -> SamSegmenter:
    """Give a fresh network the parameters of `parent`; None leaves it as it is.

    New classes start as copies of background (then in closed form, where the head has such a start), or with "exact" as
    a branch beside frozen parameters.

    Raises:
        UsageError: another backbone, head or task than the parent's; "exact" without new classes.
        AdapterError: other adapters.
        WeightsError: another base.
    """
    if keep_classes not in (None, EXACT):
        raise UsageError(f"keep_classes must be null or {EXACT}, got {keep_classes!r}")
    if parent is None:
        if keep_classes:
            raise UsageError("keep_classes needs a model to start from; give its folder as parent (--from)")
        return network
    old, new = parent.task.classes, task.num_classes - parent.task.num_classes
    if task.classes[: len(old)] != old:
        missing = [name for name in old if name not in task.classes]
        what = f"lacks the class {missing[0]!r}" if missing else f"orders the classes {', '.join(old)} otherwise"
        raise UsageError(
            f"the task {what} of {parent.model}; list its classes first and in their order, new ones after"
        )
    if keep_classes and not new:
        raise UsageError(f"keep_classes {keep_classes}: the task has no class beyond those of {parent.model}; add one")
    own = {"backbone": network.config.to_json(), "head": network.head_config.to_json()}
    theirs = parent.settings(task, keep_classes)
    for key in own:
        if own[key] != theirs[key]:
            raise UsageError(f"{parent.model} has the {key} {theirs[key]}, this training {own[key]}; leave {key} out")
    if network.in_channels != parent.file.network["in_channels"]:
        channels = parent.file.network["in_channels"]
        raise UsageError(f"{parent.model} takes {channels} input channels, this task {network.in_channels}")
    check_fingerprint(network, parent.file.base["fingerprint"])
    for key in GEOMETRY:
        if getattr(task, key) != getattr(parent.task, key):
            logger.warning("%s was trained with %s %s", parent.model, key, getattr(parent.task, key))
    file = dataclasses.replace(parent.file, tensors=_grown(network, parent.file.tensors, len(old), new))
    load_adapters(network, file)
    network.head.kept = len(old)
    if keep_classes == EXACT:
        branch = f"class_head.branches.{len(network.head.branches) - 1}."  # type: ignore[arg-type]
        for name, parameter in trainable_parameters(network).items():
            parameter.requires_grad_(name.startswith(branch))
    return network


def parent_share(parent: Parent | None, task: Task, cases: Split, given: float | None = None) -> float:
    """Share of the parent's parameters in those that a training from it gives, see
    :class:`samda.training.ParameterAverage`; 0 without a parent, or with new classes.

    None takes that of the parent's cases among all cases, at most a half: between two models that share their start the
    mean of the parameters keeps what both have learned, where more steps on few cases forget the old ones.
    """
    if parent is None or task.num_classes != parent.task.num_classes:
        return 0.0
    if given is not None:
        return given
    before = sum(parent.file.record.get("training", {}).get("cases", {}).values())
    now = len(cases.training) + len(cases.validation)
    return min(0.5, before / max(1, before + now))


def _grown(network: SamSegmenter, tensors: Mapping[str, torch.Tensor], old: int, new: int) -> dict[str, torch.Tensor]:
    """Tensors of a model with `new` further classes: rows, or modules, of background again; branches as they are."""
    grown = dict(tensors)
    for name, own in state_tensors(network).items():
        if name in tensors:
            rows = tensors[name]
            if rows.shape != own.shape and rows.shape[1:] == own.shape[1:] and len(own) == len(rows) + new:
                grown[name] = torch.cat([rows, rows[:1].expand(new, *rows.shape[1:])])
        elif isinstance(network.head, PyramidHead):
            grown[name] = own
        else:  # hypernetwork k of the head sam
            number = next(part for part in name.split(".") if part.isdigit())
            twin = name.replace(f".{number}.", ".0.", 1)
            if int(number) >= old and twin in tensors:
                grown[name] = tensors[twin]
    return grown


class SoftTargets:
    """`prepare_batch` of a training: where labels leave open what a pixel is, the parent's prediction is the target.

    For a pixel that may be one of the classes S, all known to the parent with probabilities q,
    t_k = q_k / sum_{j in S} q_j for k in S. Sets with classes that the parent does not know stay sets.

    Args:
        network: right after :func:`start_from`; the parent is copied, the frozen base is shared.
        parent: without one, and with "exact", or where nothing is open, batches are what :func:`prepare_batch` gives.
        partial: what the labels leave open.
        keep_classes: see :func:`start_from`.
    """

    def __init__(
        self, network: SamSegmenter, parent: Parent | None, partial: PartialLabels | None, keep_classes: str | None
    ) -> None:
        self.teacher: nn.Module | None = None
        if parent is None or partial is None or keep_classes == EXACT:
            return
        own = trainable_parameters(network)
        shared = {id(value): value for name, value in network.named_parameters() if name not in own}
        self.teacher = copy.deepcopy(network, shared).eval().requires_grad_(False)  # type: ignore[arg-type]
        self.possible, self.old = partial.possible(), parent.task.num_classes

    def __call__(
        self, batch: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor | Pyramid, torch.Tensor]:
        """Inputs, and labels (B, 1, H, W) or targets (B, K, H, W), see :func:`samda.training.loss.open_targets`."""
        inputs, label = prepare_batch(batch, device, non_blocking, **kwargs)
        if self.teacher is None:
            return inputs, label
        with torch.no_grad():
            logits = self.teacher(inputs)[:, : self.old]
            possible = self.possible.to(label.device)[label[:, 0].long().clamp_min(0)].movedim(-1, 1)
            target = open_targets(possible, logits.dtype)
            q = logits.softmax(1) * possible[:, : self.old]
            told = (possible.sum(1, keepdim=True) > 1) & ~possible[:, self.old :].any(1, keepdim=True)
            soft = torch.zeros_like(target)
            soft[:, : self.old] = q / q.sum(1, keepdim=True).clamp_min(1e-9)
            target = torch.where(told, soft, target)
            return inputs, torch.where(label < 0, torch.full_like(target, PADDING), target)
