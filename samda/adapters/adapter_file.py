# SPDX-License-Identifier: Apache-2.0
"""Adapter files: `adapter.json` (description) and `adapter.safetensors` (parameters). Neither can run code.

`adapter.json` (format version 1) has exactly these keys:

================ ===================================================================================
format_version   1
sha256           of `adapter.safetensors`
adapters         adapter name -> `type` and all settings
network          how to build the network (backbone, channels, ...)
base             source and fingerprint of the base weights
task             classes, labels, geometry and intensities
record           training data and settings, source statistics, versions, metrics
================ ===================================================================================

The last four are plain values, validated by their users. `adapter.safetensors` contains the parameters of adapters and
class head, those trained by a baseline, and signatures of base weights (SALT), under their names in the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors import torch as safetensors

from samda.adapters.attach import build_configs
from samda.adapters.base import AdapterConfig, attached, is_int, modules, trainable_parameters, unmerge
from samda.errors import AdapterError, UsageError, check_keys
from samda.io import parse_json, plain, regular_file, replacing, write_text

FORMAT_VERSION = 1
HEADER = "adapter.json"
TENSORS = "adapter.safetensors"
NEXT = ".adapter.json.next"  # the description of new tensors until it takes its place: a kill leaves one whole model
SECTIONS = ("network", "base", "task", "record")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """Content of an adapter folder, validated as far as possible without a network."""

    source: str  # the folder, for messages
    adapters: dict[str, AdapterConfig]
    network: dict[str, Any]
    base: dict[str, Any]
    task: dict[str, Any]
    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def state_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of `model` to save, by full name: trained parameters, persistent buffers of adapters and class head."""
    found: dict[str, torch.Tensor] = dict(trainable_parameters(model))
    found |= {name: model.get_buffer(name) for name in getattr(model, "head_buffers", list)()}
    for path, _, adapter in modules(model):
        found |= {f"{path}.{key}": tensor for key, tensor in adapter.state_dict().items()}
    return {name: found[name].detach() for name in sorted(found)}


def save_adapters(
    model: nn.Module,
    folder: str | Path,
    network: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write `adapter.json` and `adapter.safetensors`; the model before stays readable until the new one is.

    `network`, `base`, `task` and `record` are plain values (see the module); NaN and infinities become null.

    Raises:
        AdapterError: a value is not plain, or a tensor is not finite; nothing is written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state_tensors(model).items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {name} holds values that are not finite; nothing was saved")
    content = safetensors.save(tensors)
    header = {
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "adapters": {name: config.to_dict() for name, config in attached(model).items()},
    }
    for key, values in zip(SECTIONS, (network, base, task, record), strict=True):
        header[key] = plain(values or {})
        try:
            json.dumps(header[key])
        except TypeError as error:
            raise AdapterError(f"{folder}: {key} of {HEADER} takes plain values only ({error})") from error
    text = json.dumps(header, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NEXT, text)  # from here on the new tensors have their description, before the old ones go
    with replacing(folder / TENSORS) as temporary:
        temporary.write_bytes(content)
    write_text(folder / HEADER, text)
    (folder / NEXT).unlink()


def read_adapters(folder: str | Path) -> AdapterFile:
    """Read and validate an adapter folder; AdapterError if a file is missing, damaged or of a newer samda."""
    folder = Path(folder)
    header = _read_header(folder / HEADER)
    content = _read_bytes(folder / TENSORS, folder)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != header["sha256"] and (folder / NEXT).exists():
        header = _read_header(folder / NEXT)
    if sha256 != header["sha256"]:
        raise AdapterError(f"{folder / TENSORS}: not the file that {HEADER} describes (sha256); copy the folder again")
    sections = {key: header[key] for key in SECTIONS}
    adapters = _read_settings(header["adapters"], folder / HEADER)
    return AdapterFile(str(folder), adapters, **sections, tensors=_parse_tensors(content, folder / TENSORS))


def load_adapters(model: nn.Module, source: str | Path | AdapterFile) -> None:
    """Load trained tensors into a model with the same adapters attached; on an error, the model is unchanged.

    Args:
        model: a network with adapters; it is unmerged first.
        source: an adapter folder, its `adapter.safetensors`, or the result of :func:`read_adapters`. For a safetensors
            file without `adapter.json`, only names and shapes are compared.

    Raises:
        AdapterError: adapters, settings, names, shapes or values do not match, or a tensor was trained on other base
            weights.
    """
    if not isinstance(source, AdapterFile):
        path = Path(source)
        if path.is_file() and not (path.name == TENSORS and path.with_name(HEADER).exists()):
            return _assign(model, _parse_tensors(_read_bytes(path), path), str(path))
        source = read_adapters(path.parent if path.is_file() else path)
    _check_settings(attached(model), source)
    _assign(model, source.tensors, source.source)


def check_shapes(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse tensors whose names or shapes are not those of `model`, which may be on the meta device."""
    own = state_tensors(model)
    for name in own:
        if name not in tensors:
            raise AdapterError(f"{source}: lacks {name}; build the network with the adapters and classes of the file")
        shape, expected = tuple(tensors[name].shape), tuple(own[name].shape)
        if shape != expected:
            raise AdapterError(
                f"{source}: {name} has shape {shape}, this model {expected}; build it with the file's settings"
            )
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise AdapterError(f"{source}: holds {extra[0]}, which this model lacks; attach the adapters of the file")


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    check_shapes(model, tensors, source)
    own = state_tensors(model)
    staged = {name: _fit(name, own, tensors, source) for name in own}
    states = [
        (adapter, {key: staged.pop(f"{path}.{key}") for key in adapter.state_dict()})
        for path, _, adapter in modules(model)
    ]
    for adapter, state in states:
        adapter.check_state(state, source)
    unmerge(model)
    for adapter, state in states:
        adapter.load_state_dict(state)
    with torch.no_grad():
        for name, tensor in staged.items():  # class head, and what a baseline trained
            own[name].copy_(tensor)


def _fit(name: str, own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str) -> torch.Tensor:
    """The stored tensor in the dtype of the model; refused if its values are no numbers."""
    tensor = tensors[name].to(own[name].dtype)
    if not tensors[name].is_floating_point() or not torch.isfinite(tensor).all():
        raise AdapterError(f"{source}: {name} holds values that are not finite numbers; train again or copy it again")
    return tensor


def _check_settings(present: Mapping[str, AdapterConfig], file: AdapterFile) -> None:
    if set(present) != set(file.adapters):
        names = (", ".join(adapters) or "none" for adapters in (file.adapters, present))
        raise AdapterError("{}: holds the adapters {}, this model has {}; attach those".format(file.source, *names))
    for name, config in file.adapters.items():
        stored, own = config.to_dict(), present[name].to_dict()
        for key in ("type", *stored):
            if key not in config.free and stored[key] != own.get(key):
                what = f"{key} {stored[key]!r}, this model has {own.get(key)!r}"
                raise AdapterError(
                    f"{file.source}: adapter {name!r} has {what}; build the network with the file's settings"
                )


def _read_header(path: Path) -> dict[str, Any]:
    def no_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        header = parse_json(_read_bytes(path, path.parent), parse_constant=no_constant)
    except ValueError as error:
        raise AdapterError(f"{path}: is not a JSON file ({error}); copy the folder again") from error
    version: Any = header.get("format_version") if isinstance(header, dict) else None
    if not is_int(version, 1):
        raise AdapterError(f"{path}: has no format_version; give an adapter that samda wrote")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path}: has format version {version}, this samda reads up to {FORMAT_VERSION}; update samda"
        )
    objects = ("adapters", *SECTIONS)
    try:
        check_keys(header, ("format_version", "sha256", *objects), str(path))
    except UsageError as error:
        raise AdapterError(str(error)) from error
    for key in ("sha256", *objects):
        if key not in header:
            raise AdapterError(f"{path}: lacks {key!r}; copy the folder again")
    for key in objects:
        if not isinstance(header[key], dict):
            raise AdapterError(f"{path}: {key!r} must be an object, got {type(header[key]).__name__}")
    return header


def _read_settings(settings: Mapping[str, Any], path: Path) -> dict[str, AdapterConfig]:
    """Configs from a file, which must contain all settings, because defaults may change."""
    try:
        configs = build_configs(settings)
    except UsageError as error:
        raise AdapterError(f"{path}: {error}") from error
    for name, config in configs.items():
        missing = sorted(set(config.to_dict()) - set(settings[name]))
        if missing:
            raise AdapterError(f"{path}: adapter {name!r} lacks the setting {missing[0]!r}; copy the folder again")
    return configs


def _parse_tensors(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(f"{path}: is not a safetensors file or is cut short ({error}); copy it again") from error


def _read_bytes(path: Path, root: Path | None = None) -> bytes:
    try:
        return regular_file(path, root).read_bytes()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror}); give the folder of a trained model") from error
