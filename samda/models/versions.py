# SPDX-License-Identifier: Apache-2.0
"""Versions of a trained model: the source (as trained), and candidates distilled at a site.

    model/adapter.json, adapter.safetensors        version "source"; never changed
    model/versions/NAME/adapter.json, ...          a candidate, a complete adapter folder
    model/versions/NAME/commission.json            acceptance report of `samda commission`
    model/versions/active.json                     {"stack": [..., NAME], "history": [{"time", "from", "to"}, ...]}

The last version of the stack is active; `samda site activate` and `rollback` change it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from samda.adapters.adapter_file import read_adapters
from samda.errors import InputError, UsageError, nearest
from samda.io import parse_json, plain, regular_file, write_json
from samda.models.folder import load_model, own_base
from samda.networks.segmenter import SamSegmenter
from samda.provenance import now
from samda.task import Task

SOURCE = "source"
FOLDER = "versions"
POINTER = "active.json"
COMMISSION = "commission.json"  # report of `samda commission` in the folder of a version
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SAME = ("from_version", "cases", "input_sha256", "config", "parameters")  # of a version that is made again


def check_name(name: str) -> str:
    """Refuse a name that is not a plain folder name, or "source"."""
    if not NAME.fullmatch(name) or name == SOURCE:
        raise UsageError(f"{name!r} cannot name a version; use up to 64 letters, digits, '.', '_' and '-'")
    return name


def list_versions(model: str | Path) -> list[str]:
    """The versions of a model folder, "source" first."""
    folder = versions_folder(model)
    found = [path.parent for path in folder.glob("*/adapter.json") if NAME.fullmatch(path.parent.name)]
    return [SOURCE, *sorted(path.name for path in found if not path.is_symlink())]


def describe_versions(model: str | Path, active: str) -> list[dict[str, Any]]:
    """One row per version: {"name", "active", "cases": number of them, "created", "from_version"}."""
    rows = []
    for name in list_versions(model):
        about = {} if name == SOURCE else read_adapters(version_folder(model, name)).record.get("version", {})
        cases = len(about["cases"]) if "cases" in about else None
        facts = {key: about.get(key) for key in ("created", "from_version")}
        rows.append({"name": name, "active": name == active, "cases": cases, **facts})
    return rows


def check_site(model: str | Path, name: str, about: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Refuse an invalid name of a version, or an existing one, unless that was made of `about`, as far as known.

    Returns what the existing version says of itself.
    """
    check_name(name)
    if name not in list_versions(model):
        return None
    found = read_adapters(version_folder(model, name)).record.get("version", {})
    known = plain({key: value for key, value in (about or {}).items() if key in SAME})
    if not known or any(found.get(key) != value for key, value in known.items()):
        raise UsageError(f"{model} already has a version {name!r}; choose another name")
    return found


def versions_folder(model: str | Path) -> Path:
    """The folder of the versions, which may not exist; a link is refused, as versions are written into it."""
    folder = Path(model) / FOLDER
    if folder.is_symlink():
        raise InputError(f"{folder} is a link to {folder.resolve()}; copy the folder itself")
    return folder


def active_version(model: str | Path) -> str:
    """The version that `predict`, `adapt`, `erf` and `export` use by default.

    Raises:
        InputError: `active.json` is damaged or names a missing version.
    """
    active = _pointer(model)["stack"][-1]
    if active not in list_versions(model):
        raise InputError(f"{model}: the active version {active!r} is missing; choose another with samda site activate")
    return active


def version_folder(model: str | Path, version: str | None = None) -> Path:
    """The adapter folder of a version; None takes the active one."""
    version = active_version(model) if version is None else version
    versions = list_versions(model)
    if version not in versions:
        raise UsageError(f"{model} has no version {version!r}; {nearest(version, versions)}")
    return Path(model) if version == SOURCE else Path(model) / FOLDER / version


def activate(model: str | Path, version: str, force: bool = False) -> str:
    """Make a version the active one; returns the previous one.

    UsageError where the version has no report of `samda commission`, unless `force`; the source needs none.
    """
    folder = version_folder(model, version)
    if version != SOURCE and not force and not (folder / COMMISSION).is_file():
        raise UsageError(
            f"version {version!r} has no acceptance report; run samda commission --version {version} on labeled cases, "
            "or force it"
        )
    pointer = _pointer(model)
    before = pointer["stack"][-1]
    if version != before:  # else a rollback would lead to the same version
        _write(model, [*pointer["stack"], version], pointer["history"], before)
    return before


def rollback(model: str | Path) -> tuple[str, str]:
    """Return to the previously active version; returns (from, to)."""
    pointer = _pointer(model)
    if len(pointer["stack"]) == 1:
        raise UsageError(f"{model}: the version {SOURCE!r} is active and there is none before it")
    stack = pointer["stack"][:-1]
    version_folder(model, stack[-1])
    _write(model, stack, pointer["history"], pointer["stack"][-1])
    return pointer["stack"][-1], stack[-1]


def load_version(
    model: str | Path,
    version: str | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> tuple[SamSegmenter, Task, dict[str, Any], str]:
    """Read a version of a trained model (None: the active one): network, task, record, and the name of the version.

    `weights` is a file with the base weights; None takes those of the training.
    """
    version = active_version(model) if version is None else version
    folder = version_folder(model, version)
    return *load_model(folder, own_base(Path(model)) if weights is None else weights, device), version


def _write(model: str | Path, stack: list[str], log: list[dict[str, str]], before: str) -> None:
    entry = {"time": now(), "from": before, "to": stack[-1]}
    write_json(Path(model) / FOLDER / POINTER, {"stack": stack, "history": [*log, entry]})


def _pointer(model: str | Path) -> dict[str, Any]:
    path = versions_folder(model) / POINTER
    if Path(model).is_file():
        raise InputError(f"{model} is a file, not a model folder; a pack is made one by samda unpack {model} -o FOLDER")
    try:
        pointer = parse_json(regular_file(path, path.parent).read_bytes())
        return {"stack": [str(name) for name in pointer["stack"]] or [SOURCE], "history": list(pointer["history"])}
    except FileNotFoundError:
        return {"stack": [SOURCE], "history": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it to activate the source version") from error
