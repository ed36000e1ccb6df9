# SPDX-License-Identifier: Apache-2.0
"""Configs of MONAI: values that are data, and the refusal of unknown keys and of values that cannot be right.

MONAI evaluates texts that begin with `$`, resolves `@key` and `%file`, replaces `#` in every text, and calls the
`_target_` of a mapping. Names and paths that people chose must not be read as such syntax, so every value that samda
puts into a config or into metadata.json passes :func:`literal`.

MONAI also adds any override to the config, so `--epoch 5` trains with the default number of epochs. The first entry of
`initialize` in our configs calls :func:`check_overrides`, which compares what runs with the config file it came from.
That file says which keys exist and of which type they are, also in a user's own copy of the bundle.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import pydoc
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser, ConfigWorkflow

from samda.adapters.attach import build_configs, check_together
from samda.errors import UsageError, cause_of, nearest, reason_of
from samda.io import plain
from samda.networks.backbones import backbone_config
from samda.networks.segmenter import head_config
from samda.networks.weights import check_published, existing_weights
from samda.task import Task
from samda.training.cases import build_task
from samda.training.pace import check_length

SYNTAX = re.compile(r"^[$@%]|#|[@%]::")  # in a text
KEY_SYNTAX = re.compile(r"[$@%#]|::|^[_+~]")  # in a key
ESCAPES = str.maketrans({"#": "\\x23", "@": "\\x40", "%": "\\x25"})

FREE = ("adapters", "backbone", "task", "head", "_meta_")  # these may be mappings whose keys their own builders check
NAMED = ("backbone", "task", "head")  # and these may be names
TRACKING = ("tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0", "output_dir")
NULL = ("head_learning_rate", "weights", "crop", "train::augmentation")  # keys with a default that may be null
COMPUTED = ("device", "train::dataloader::batch_size")  # components of multi_gpu_train.json that stand for plain values
UNSET = {
    "fold": 0,
    "image_size": 256,
    "spacing": 1.0,
    "steps": 1,
    "minutes": 1.0,
    "epochs": 1,
    "val_interval": 1,
    "head_learning_rate": 0.01,
    "parent": "model",
    "keep_classes": "exact",
    "parent_share": 0.5,
}  # keys that are null by default; other values are of this type
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
# keys that are different with several GPUs
OVERLAID = ("train::handlers", "train::dataloader", "train::trainer", "train::penalized_loss")
LIMITS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
RANGES: dict[str, dict[str, float]] = {  # keys whose wrong values PyTorch and ignite take, or refuse without their name
    "steps": {"at least": 1},
    "minutes": {"above": 0},
    "epochs": {"at least": 1},
    "batch_size": {"at least": 1},
    "views": {"at least": 1},
    "renewed_views": {"at least": 0},
    "crop": {"at least": 64},
    "gradient_norm": {"at least": 0},
    "average_decay": {"at least": 0, "below": 1},
    "parent_share": {"at least": 0, "below": 1},
    "val_interval": {"at least": 1},
    "checkpoint_interval": {"at least": 1},
    "patience": {"at least": 0},
    "workers": {"at least": 0},
    "memory_mb": {"at least": 0},
    "weight_decay": {"at least": 0},
    "regularization": {"at least": 0},
    "augmentation": {"at least": 0},
    "fold": {"at least": 0},
    "head_learning_rate": {"at least": 0},  # 0 is the rate of the adapters, null what suits the head
    "learning_rate": {"above": 0},
    "seed": {"at least": 0, "at most": 2**63 - 1},  # of PyTorch's generators
    "validation_fraction": {"above": 0, "at most": 0.5},
    "join_validation": {"above": 0, "at most": 1},
    "warmup": {"at least": 0, "below": 1},
    "empty_share": {"at least": 0, "below": 1},
}


def literal(value: Any) -> Any:
    """A value that MONAI's config takes as it is.

    A text with config syntax, and a mapping with such a key, become an expression that evaluates to themselves.
    """
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, Mapping):
        if any(KEY_SYNTAX.search(str(key)) for key in value):
            return "$" + repr(plain(value)).translate(ESCAPES)
        return {key: literal(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [literal(entry) for entry in value]
    if isinstance(value, str) and SYNTAX.search(value):
        return "$" + repr(value).translate(ESCAPES)
    return value


def decoded(value: Any) -> Any:
    """The value that :func:`literal` has escaped; other expressions are left alone."""
    if isinstance(value, Mapping):
        return {key: decoded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [decoded(entry) for entry in value]
    if isinstance(value, str) and value.startswith("$"):
        try:
            return ast.literal_eval(value[1:])
        except (SyntaxError, ValueError):
            return value
    return value


def refuse_syntax(values: Any, file: Path) -> None:
    """Refuse config syntax in a file whose values are data; nothing is evaluated."""
    remedy = "an adapter file holds plain values; give expressions as --set KEY=VALUE"
    if isinstance(values, Mapping):
        for key, entry in values.items():
            if any(KEY_SYNTAX.search(part) for part in str(key).split("::")):
                raise UsageError(f"{file}: the key {key!r} is config syntax; {remedy}")
            refuse_syntax(entry, file)
    elif isinstance(values, list | tuple):
        for entry in values:
            refuse_syntax(entry, file)
    elif isinstance(values, str) and SYNTAX.search(values):
        raise UsageError(f"{file}: the text {values!r} is config syntax; {remedy}")


def check_overrides(config_file: str | Sequence[str]) -> None:
    """Check the running config against `config_file` (or several, merged) in the folder of its first config file."""
    if getattr(sys.modules["__main__"].__spec__, "name", "").startswith("monai.bundle"):
        sys.excepthook = _report
    workflow = _running_workflow()
    if workflow is None:  # a bare ConfigParser: nothing was overridden through MONAI
        return
    names = [config_file] if isinstance(config_file, str) else config_file
    files = [Path(workflow.config_root_path) / name for name in names]
    check_config(workflow.parser.get(), ConfigParser.load_config_files(files))


def check_config(config: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Check every key of `config`, nested ones too, and all that is known of their plain values before data are read:
    types, ranges, names, the task, settings of adapters, and that a weights file exists.

    Args:
        config: the config after overlays and overrides, before it is resolved.
        reference: the config that defines the valid keys and their types; a null value takes any type.
    """
    _check_mapping(config, reference, "", TRACKING)
    for key, like in UNSET.items():
        if key in reference and config.get(key) is not None:
            _check_type(key, config[key], like)
    for key, limits in RANGES.items():
        value = config.get(key)
        if key not in reference or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or not all(LIMITS[words](value, limit) for words, limit in limits.items()):
            allowed = " and ".join(f"{words} {limit}" for words, limit in limits.items())
            raise UsageError(f"config key {key!r} must be {allowed}, got {value!r}")
    config = {key: decoded(value) for key, value in config.items()}
    _check_by_builders({key: config[key] for key in config if key in reference and is_plain(config[key])}, config)


def _check_by_builders(plain: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Let those who will build the plain values refuse them now; configs other than train.json lack some keys."""
    if "adapters" in plain:
        check_together(build_configs(plain["adapters"]))
    network = config.get("network_def")
    used = not isinstance(network, Mapping) or network.get("weights") == "@weights"
    weights = plain.get("weights") if used else None
    if "backbone" in plain:
        backbone = backbone_config(plain["backbone"])
        if weights == "pretrained":
            check_published(backbone)
    if "head" in plain:
        head_config(plain["head"])
    check_length(**{key: plain.get(key) for key in ("steps", "minutes", "epochs")})
    if isinstance(weights, str | Path) and weights != "pretrained":
        existing_weights(weights)
    if "task" in plain:  # null is chosen for the scans later, but not its size
        task = Task() if plain["task"] is None else plain["task"]
        build_task(task, image_size=plain.get("image_size"), spacing=plain.get("spacing"))


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
    """A plain default fixes the type, a component requires another; references, expressions and null allow any."""
    if default is None or _is_dynamic(value) or (value is None and where in NULL):
        return
    if _is_dynamic(default):
        if isinstance(default, Mapping) and where not in COMPUTED:
            raise UsageError(
                f"config key {where!r} must be a mapping with _target_, got {value!r}; or set its keys, {where}::KEY"
            )
        return
    kind = type(default)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"config key {where!r} must be {TYPES[kind]}, got {value!r}")


def _is_dynamic(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def is_plain(value: Any) -> bool:
    """Is nothing in it left for MONAI to resolve?"""
    if isinstance(value, Mapping):
        return not _is_dynamic(value) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return not _is_dynamic(value)


def _parameters(target: Any, path: str) -> list[str] | None:
    """Parameters of the class or function `target`, named as MONAI does; None where any keyword may be one."""
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


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What `python -m monai.bundle` prints of an error: the last line is samda's, not that of MONAI's wrappers."""
    if cause_of(error) is None:
        sys.__excepthook__(kind, error, trace)
    causes = [error]
    while causes[-1].__cause__ is not None and causes[-1].__cause__ not in causes:
        causes.append(causes[-1].__cause__)
    sys.stdout.flush()
    print(f"samda: {reason_of(causes[-1] if cause_of(error) is None else error)}", file=sys.stderr)


def own_settings() -> dict[str, Any]:
    """What the running config says below `train`, by key: nested overrides decide a training as plain ones do."""
    workflow = _running_workflow()
    config = None if workflow is None else workflow.parser.get("train")
    leaves = {} if config is None else dict(_leaves(config, "train"))
    return {key: value for key, value in leaves.items() if not key.startswith(OVERLAID)}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, plain(value)
        return
    for key, entry in value.items():
        yield from _leaves(entry, f"{path}::{key}")


def _running_workflow() -> ConfigWorkflow | None:
    """The workflow whose expression is being evaluated.

    MONAI hands expressions the values they refer to, never the config as a whole, and nothing else sees the keys that
    no expression refers to; so we look up the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
