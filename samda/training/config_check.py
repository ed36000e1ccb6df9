# SPDX-License-Identifier: Apache-2.0
"""Refuse what MONAI would pass in silence: unknown config keys, and values that cannot be right.

MONAI adds any override to the config, so `--epoch 5` trains with the default number of epochs. The first entry of
`initialize` in our configs calls :func:`check_overrides`, which compares what runs with the config file it came from.
"""

from __future__ import annotations

import functools
import inspect
import math
import pydoc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser, ConfigWorkflow

from samda.adapters.attach import build_configs, check_together
from samda.errors import UsageError, nearest
from samda.networks.backbones import backbone_config
from samda.networks.weights import check_published, existing_weights
from samda.task import Task
from samda.training.cases import build_task

FREE = ("adapters", "backbone", "task", "_meta_")  # these may be mappings whose keys their own builders check
NAMED = ("backbone", "task")  # and these names of something known
TRACKING = ("tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0", "output_dir")
LARGEST_SEED = 2**63 - 1  # of PyTorch's generators
LEAST = {  # keys whose wrong values PyTorch and ignite refuse in words of their own, or take
    "epochs": 1,
    "batch_size": 1,
    "views": 1,
    "val_interval": 1,
    "checkpoint_interval": 1,
    "patience": 0,
    "workers": 0,
    "memory_mb": 0,
    "weight_decay": 0,
    "augmentation": 0,
    "seed": 0,
    "fold": 0,
    "head_learning_rate": 0,  # 0 or null is that of the adapters
}
ABOVE_0 = {"learning_rate": math.inf, "validation_fraction": 0.5}  # and at most this
BELOW_1 = ("warmup", "empty_share")  # shares, from 0
NULL = ("head_learning_rate", "weights", "train::augmentation")  # keys with a default that may be null
COMPUTED = ("device", "train::dataloader::batch_size")  # components of multi_gpu_train.json that stand for plain values
UNSET = {"fold": 0, "image_size": 256, "spacing": 1.0}  # keys that are null where not given; other values are like this
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def check_overrides(config_file: str | Sequence[str]) -> None:
    """Check the running config against the file `config_file` beside which it was started.

    Only that file (or several, merged) is the reference, so keys that a user adds to an own copy of the bundle are
    valid there.

    Args:
        config_file: name of the reference in the folder of the first config file, for instance "train.json"; or names.

    Raises:
        UsageError, AdapterError, WeightsError: as :func:`check_config`.
    """
    workflow = _running_workflow()
    if workflow is None:  # a bare ConfigParser: nothing was overridden through MONAI
        return
    names = [config_file] if isinstance(config_file, str) else config_file
    files = [Path(workflow.config_root_path) / name for name in names]
    check_config(workflow.parser.get(), ConfigParser.load_config_files(files))


def check_config(config: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Check every key of `config`, nested ones too, the type of its plain values, and what can be known of these
    before data are read: ranges, names, the task, settings of adapters, and that a weights file exists.

    Args:
        config: the config after overlays and overrides, before it is resolved.
        reference: the config that defines the valid keys; a null value takes any type.

    Raises:
        UsageError: naming the key path and the nearest valid key, or the type or the least value expected and the value
            received.
        AdapterError: adapters that exclude each other, or a name that none can have.
        WeightsError: there is no such weights file.
    """
    _check_mapping(config, reference, "", TRACKING)
    for key, like in UNSET.items():
        if key in reference and config.get(key) is not None:
            _check_type(key, config[key], like)
    for key, least in LEAST.items():
        value = config.get(key, least)
        if key in reference and isinstance(value, int | float) and not least <= value < math.inf:  # nor NaN
            raise UsageError(f"config key {key!r} must be at least {least}, got {value!r}")
    if isinstance(config.get("seed"), int) and config["seed"] > LARGEST_SEED:
        raise UsageError(f"config key 'seed' must be at most {LARGEST_SEED}, got {config['seed']}")
    for key, most in ABOVE_0.items():
        value = config.get(key)
        if key in reference and isinstance(value, int | float) and not (0 < value <= most and value < math.inf):
            limit = f" and at most {most}" if most < math.inf else ""
            raise UsageError(f"config key {key!r} must be above 0{limit}, got {value!r}")
    for key in BELOW_1:
        value = config.get(key)
        if key in reference and isinstance(value, int | float) and not 0 <= value < 1:
            raise UsageError(f"config key {key!r} must be at least 0 and below 1, got {value!r}")
    network = config.get("network_def")
    if isinstance(network, Mapping) and network.get("weights") != "@weights":  # so those at the top are not used
        config = {key: value for key, value in config.items() if key != "weights"}
    _build({key: config[key] for key in config if key in reference and _is_plain(config[key])})
    if {"method", "scope"} <= set(reference):  # adapt.json
        _check_adaptation(config)


def _check_adaptation(config: Mapping[str, Any]) -> None:
    """Let the adaptation refuse its settings now; those that MONAI has yet to resolve must wait."""
    from samda.adaptation.settings import check_settings  # training needs none of it

    given = config.get("settings")
    if not isinstance(given, Mapping):
        return
    values = {key: config.get(v[1:]) if isinstance(v, str) and v.startswith("@") else v for key, v in given.items()}
    check_settings({key: value for key, value in values.items() if _is_plain(value)})


def _build(config: Mapping[str, Any]) -> None:
    """Let those who will build the values refuse them now; keys of another config than train.json may be missing."""
    if "adapters" in config:
        check_together(build_configs(config["adapters"]))
    weights = config.get("weights")
    if "backbone" in config:
        backbone = backbone_config(config["backbone"])
        if weights == "pretrained":
            check_published(backbone)
    if isinstance(weights, str | Path) and weights != "pretrained":
        existing_weights(weights)
    if "task" in config:
        task = Task() if config["task"] is None else config["task"]  # None is known when the scans are; its size is not
        build_task(task, image_size=config.get("image_size"), spacing=config.get("spacing"))


def _check_mapping(config: Mapping[str, Any], reference: Mapping[str, Any], path: str, extra: tuple[str, ...]) -> None:
    valid = _parameters(config["_target_"], path) if "_target_" in config else list(reference)
    for key, value in config.items():
        where = f"{path}::{key}" if path else str(key)
        if valid is not None and key not in valid and key not in extra and not str(key).startswith("_"):
            raise UsageError(f"config key {where!r} is unknown; {nearest(str(key), valid)}")
        default = reference.get(key)
        if (key in FREE and isinstance(value, Mapping)) or (key in NAMED and isinstance(value, str)):
            continue
        component = isinstance(default, Mapping) and "_target_" in default
        if isinstance(default, Mapping) and isinstance(value, Mapping) and (not component or "_target_" in value):
            _check_mapping(value, default, where, ())
        elif key in reference:
            _check_type(where, value, default)


def _check_type(where: str, value: Any, default: Any) -> None:
    """A plain default fixes the type, a component wants another; references, expressions and null say nothing."""
    if default is None or _is_dynamic(value) or (value is None and where in NULL):
        return
    if _is_dynamic(default):
        if isinstance(default, Mapping) and where not in COMPUTED:
            raise UsageError(
                f"config key {where!r} must be a mapping with _target_, got {value!r}; or set its keys, {where}::KEY"
            )
        return
    kind = type(default)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right:
        raise UsageError(f"config key {where!r} must be {TYPES[kind]}, got {value!r}")


def _is_dynamic(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def _is_plain(value: Any) -> bool:
    """Is nothing in it left for MONAI to resolve?"""
    if isinstance(value, Mapping):
        return not _is_dynamic(value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not _is_dynamic(value)


def _parameters(target: Any, path: str) -> list[str] | None:
    """Parameters of the class or function `target`, named as MONAI does; None where any keyword may be one.

    Raises:
        UsageError: there is no such component.
    """
    if not isinstance(target, str) or _is_dynamic(target):
        return None
    modules = _locator().get_component_module_name(target)  # of MONAI's short names
    module = modules[0] if isinstance(modules, list) else modules
    try:
        component: Any = pydoc.locate(f"{module}.{target}" if module else target)
    except pydoc.ErrorDuringImport as error:
        raise UsageError(f"config key '{path}::_target_': {target} cannot be imported ({error.value})") from error
    if not callable(component):
        remedy = "give a class or function of MONAI, or its full path"
        raise UsageError(f"config key '{path}::_target_': there is no component {target!r}; {remedy}")
    names: list[str] = []
    # a class that passes **kwargs on takes what its base takes
    bases = inspect.getmro(component) if inspect.isclass(component) else ()
    for made in [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [component]:
        try:
            parameters = inspect.signature(made).parameters.values()
        except ValueError:  # written in C
            return None
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return [name for name in names if name != "self"]
    return None


@functools.cache
def _locator() -> ComponentLocator:
    return ComponentLocator()


def _running_workflow() -> ConfigWorkflow | None:
    """The workflow whose expression is being evaluated.

    MONAI hands expressions the values they refer to, never the config as a whole, so we look up the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
