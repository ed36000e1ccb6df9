# SPDX-License-Identifier: Apache-2.0
"""`train`: read the settings, check them, then build, run and finish what the bundle's train.json describes.

docs/training.md shows the objects that train.json builds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow

from samda.errors import UsageError, cause_of, muted, nearest, one_line
from samda.io import load_yaml, packaged
from samda.output import open_output
from samda.processes import launched
from samda.progress import phase
from samda.task import Task
from samda.training.cases import build_task, dataset_labels
from samda.training.checkpoint import check_model_folder, check_resume, read_checkpoint, resumed_length
from samda.training.config_check import check_config, decoded, literal, refuse_syntax
from samda.training.parent import read_parent
from samda.training.tracking import mlflow_settings, trackers

OWN = {  # keys that follow from an argument of another name -> remedy
    "dataset_dir": "give dataset (--data)",
    "output_dir": "give output (--output)",
    "tensorboard": "give tracking='none' (--tracking none) for false",
    "bundle_root": "leave it out",
}
WRAPPERS = ("Failed to evaluate", "Failed to instantiate")  # how MONAI's errors begin that only say where

SAM_HEAD: dict[str, Any] = {"adapters": {"sam_da": {}}, "batch_size": 8}  # what suits the head "sam", where not given

Adapters = Mapping[str, Mapping[str, Any]] | Sequence[str | Path] | str | Path


def train(
    dataset: str | Path,
    output: str | Path,
    task: Task | Mapping[str, Any] | str | Path | None = None,
    adapters: Adapters | None = None,
    backbone: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    tracking: str | Sequence[str] = "tensorboard",
    begin: Callable[[], None] | None = None,
    with_base: bool = False,
    head: str | Mapping[str, Any] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    parent: str | Path | None = None,
    keep_classes: str | None = None,
) -> dict[str, Any]:
    """Train on a data set and write a model folder.

    It runs the same config as `python -m monai.bundle run --config_file .../train.json`; an argument that is None keeps
    the value of that file. Processes that torchrun started train together, with multi_gpu_train.json as well.

    Args:
        dataset: a folder or datalist, see :func:`samda.data.datalists.read_datalist`.
        output: the model folder to write.
        task: a Task, its values, a YAML or JSON file, or the name of a packaged task; None takes what suits the data.
        adapters: adapter name -> settings; or names of overlays ("salt", "flagship") and paths of YAML files, whose
            adapters are combined.
        backbone: "vit_t", "vit_b", "vit_l" or "vit_h".
        overrides: further config keys, nested ones written "train::loss::batch".
        resume: continue from `output`/last.pt, exactly as if the training had not stopped.
        overwrite: replace the training that `output` holds.
        device: torch device; None takes a GPU where there is one.
        tracking: "tensorboard" (into `output`/tensorboard), "mlflow" (into `output`/mlruns.db, or where the keys
            tracking_uri, experiment_name and run_name say), both with a comma between, or "none".
        begin: called once all settings were accepted, before anything is read.
        with_base: copy the base weights into the model folder.
        head: the class head, "pyramid" or "sam" (with the adapter sam_da and batches of 8 unless these are given), or
            a mapping {"type": name, settings}.
        minutes: wall time of the whole training; excludes `steps` and the key `epochs`.
        steps: gradient steps.
        parent: model folder that the training starts from, see :mod:`samda.training.parent`. Its backbone, base
            weights, adapters and head are taken, and its task, of which `task` may change keys and add classes.
        keep_classes: "exact" freezes the parent, so that its classes keep their logits bit for bit.

    Returns:
        What was trained and reached, see :func:`samda.training.finish.save_training`; the same on every process.

    Raises:
        UsageError: an unknown key or name, a value of the wrong type, or a folder that holds a training already.
        AdapterError: adapters that exclude each other, or that the backbone has no place for.
        WeightsError: base weights that are missing, damaged or of another backbone.
        InputError: the data cannot be used.

    Example:
        `train("scans", "model", task="abdomen.yaml", adapters=["salt", "sam_da"], overrides={"epochs": 20})`
    """
    chosen = trackers(tracking)
    check_model_folder(output, resume, overwrite)
    if Path(output).resolve() == Path(dataset).expanduser().resolve():
        raise UsageError(f"output {output} is the data set; choose another folder for the model")
    if parent is not None and Path(output).resolve() == Path(parent).expanduser().resolve():
        raise UsageError(f"output {output} is the model that the training starts from; choose another folder")
    arguments = {
        "dataset_dir": str(dataset),
        "output_dir": str(output),
        "resume": resume,
        "overwrite": overwrite,
        "tensorboard": "tensorboard" in chosen,
        "with_base": with_base,
        "task": task.to_dict() if isinstance(task, Task) else task,
        "backbone": backbone,
        "head": head,
        "minutes": minutes,
        "steps": steps,
        "parent": None if parent is None else str(parent),
        "keep_classes": keep_classes,
        "device": None if device is None else str(device),
    }
    given = {key: literal(value) for key, value in arguments.items() if value is not None}
    with _plain_errors():
        settings = _read_settings(given, adapters, dict(overrides or {}))
        before = read_checkpoint(output) if resume else {}
        settings |= resumed_length(before, {unit: settings.get(unit) for unit in ("steps", "minutes", "epochs")})
        workflow = _checked_workflow(settings)
        check_resume(before, workflow.parser.get())
        if "mlflow" in chosen:
            ConfigWorkflow.patch_bundle_tracking(workflow.parser, mlflow_settings())
        with open_output(output) if launched()[0] == 0 else contextlib.nullcontext():
            if begin is not None:
                begin()
            workflow.initialize()
            with phase("gradient steps"):
                workflow.run()
            with phase("writing"):
                return workflow.finalize()[0]


def _read_settings(given: dict[str, Any], adapters: Adapters | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Key of train.json -> value: arguments, adapters with what their overlays set, and overrides, which win."""
    for key in overrides:
        if key in OWN:
            raise UsageError(f"override {key!r} is not taken; {OWN[key]}")
        if key in given:
            raise UsageError(f"override {key!r} is an argument of its own; give it there")
    if isinstance(adapters, Mapping):
        given["adapters"] = dict(adapters)
    elif adapters is not None:
        names = [adapters] if isinstance(adapters, str | Path) else adapters
        if not isinstance(names, Sequence) or not all(isinstance(name, str | Path) for name in names):
            raise UsageError(f"adapters must be names, files or a mapping of name to settings, got {adapters!r}")
        given |= _merged([find_overlay(name) for name in names], overrides)
    settings = given | overrides
    if settings.get("parent") is not None:
        settings = _inherited(settings) | {key: value for key, value in settings.items() if key != "task"}
    kind = settings.get("head")
    if (kind.get("type") if isinstance(kind, Mapping) else kind) == "sam":
        settings = SAM_HEAD | settings
    return settings


def _inherited(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that a training shares with the model that it starts from."""
    parent = read_parent(decoded(settings["parent"]))
    assert parent is not None
    labels = functools.partial(dataset_labels, decoded(settings["dataset_dir"]))
    task = build_task(decoded(settings.get("task")), labels, parent=parent)
    shared = parent.settings(task, settings.get("keep_classes"))
    for key, kind in (("backbone", "name"), ("head", "type")):
        names = [
            value.get(kind) if isinstance(value, Mapping) else value
            for value in (shared[key], decoded(settings.get(key)))
        ]
        if names[1] not in (None, names[0]):
            raise UsageError(f"{parent.model} has the {key} {names[0]}, not {names[1]}; leave {key} out")
    if settings.get("weights") is None:
        shared["weights"] = parent.weights()
    return {key: literal(value) for key, value in shared.items()}


def _checked_workflow(settings: Mapping[str, Any]) -> ConfigWorkflow:
    """MONAI's workflow of train.json with these settings, not yet initialized; under torchrun with its overlay."""
    configs = packaged("bundles", "sam_segmentation", "configs")
    files = ["train.json", "multi_gpu_train.json"] if launched()[1] > 1 else ["train.json"]
    paths = [str(configs / file) for file in files]
    workflow = ConfigWorkflow(paths, workflow_type="train", logging_file=False)
    for key, value in {"bundle_root": literal(str(configs.parent)), **settings}.items():
        try:
            workflow.parser.set(_plain(value), key)  # new nested keys are taken, too, and refused by name below
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"config key {key!r} has no place in the config; set the key above it as a whole"
            ) from error
    check_config(workflow.parser.get(), ConfigParser.load_config_files(paths))
    return workflow


def find_overlay(name: str | Path) -> Path:
    """The file of an adapter overlay: a packaged one by its name, or a path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        return path
    ours = {file.stem: file for file in packaged("configs", "adapters").glob("*.yaml")}
    if str(name) not in ours:
        raise UsageError(f"no adapter overlay {str(name)!r}; {nearest(str(name), ours)} or give a YAML file")
    return ours[str(name)]


def _overlay(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".json":  # with its tabs, which YAML refuses
            values = ConfigParser.load_config_file(file)
        else:
            values = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file} is not YAML or JSON ({one_line(error)}); repair it") from error
    if not isinstance(values, Mapping) or not isinstance(values.get("adapters", {}), Mapping):
        raise UsageError(f"{file} must hold a mapping with the key `adapters`, itself a mapping; see configs/adapters")
    refuse_syntax(values, file)
    for key in OWN:
        if key in values:
            raise UsageError(f"{file} sets {key!r}, which is no setting of adapters; {OWN[key]}")
    return dict(values)


def _merged(files: Sequence[Path], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of several overlays, their adapters combined; where two disagree, an override has to decide."""
    merged: dict[str, Any] = {"adapters": {}}
    for file in files:
        for key, value in _overlay(file).items():
            target, entries = (merged["adapters"], value) if key == "adapters" else (merged, {key: value})
            for name, entry in entries.items():
                if target.get(name, entry) != entry and name not in overrides:
                    raise UsageError(
                        f"the overlays disagree on {name!r} ({target[name]!r}, {entry!r}); set it yourself"
                    )
                target[name] = entry
    return merged


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's, paths as the texts that mean them, also within mappings and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return literal(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error itself, not the config item that MONAI wraps it in; MONAI and ignite do not log it."""
    with muted(("monai.bundle.workflows", "ignite"), logging.CRITICAL):
        try:
            yield
        except Exception as error:
            cause: BaseException = cause_of(error) or error
            while cause.__cause__ is not None and str(cause).startswith(WRAPPERS):
                cause = cause.__cause__
            raise cause from None
