# SPDX-License-Identifier: Apache-2.0
"""Site versions: the accepted cases of one site give a candidate version of the model.

Every accepted case ended at parameters theta_i, a few steps from the same theta_0. The candidate is their mean, in
which the effects of single patients average out and that of the scanner stays; the order of cases does not matter. It
becomes active by `samda site activate`, and `samda site rollback` returns to the version before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samda.adaptation.agreement import displacement
from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import AdaptRun, details_folder
from samda.adaptation.loop import load, restoring
from samda.adapters.adapter_file import read_adapters, save_adapters
from samda.errors import InputError, UsageError
from samda.io import new_folder, plain
from samda.models.versions import SOURCE, check_name, list_versions, version_folder, versions_folder
from samda.provenance import now, versions

SAME = ("from_version", "cases", "input_sha256", "config", "parameters")  # of a run that is repeated after a kill


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


def distill(adaptation: Adaptation, model: str | Path, run: AdaptRun, name: str, min_cases: int = 3) -> dict[str, Any]:
    """Write the mean of the accepted cases' parameters as a candidate version; returns its record.

    `run` must have been made by this adaptation with `keep_tensors`; InputError where fewer than `min_cases` of its
    cases were accepted with a change.
    """
    chosen = {case: r for case, r in run.records.items() if "adapter" in r["output_files"]}
    if len(chosen) < min_cases:
        raise InputError(
            f"{len(chosen)} of {len(run.records)} cases were accepted with a change; a site version needs at least "
            f"{min_cases}"
        )
    # sorted, so that rounding does not depend on the order of the cases
    order = sorted(chosen, key=lambda case: (chosen[case]["input_sha256"], case))
    start = {key: parameter.detach().cpu().clone() for key, parameter in adaptation.parameters.items()}
    total = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in start.items()}
    for case in order:
        tensors = load_file(details_folder(run.output, case) / chosen[case]["output_files"]["adapter"])
        for key in total:
            total[key] += tensors[key].double()
    mean = {key: (tensor / len(order)).to(start[key].dtype) for key, tensor in total.items()}
    about = {
        "name": name,
        "created": now(),
        "from_version": adaptation.version,
        "rule": "mean of the accepted cases' parameters",
        "cases": [chosen[case]["case_id"] for case in order],
        "input_sha256": [chosen[case]["input_sha256"] for case in order],
        "config": adaptation.config,
        "parameters": sorted(mean),
        "param_displacement": displacement(mean, start),
        "decisions": run.counts,
        "versions": versions(),
    }
    before = check_site(model, name, about)
    if before is not None:
        return before
    file = read_adapters(version_folder(model, adaptation.version))
    place = versions_folder(model) / name
    place.parent.mkdir(exist_ok=True)
    with new_folder(place) as partial, restoring(adaptation.network, adaptation.parameters):
        load(adaptation.parameters, mean)
        sections = {"network": file.network, "base": file.base, "task": file.task}
        save_adapters(adaptation.network, partial, **sections, record=file.record | {"version": about})
    return about


def describe_versions(model: str | Path, active: str) -> list[dict[str, Any]]:
    """One row per version: {"name", "active", "cases": number of them, "created", "from_version"}."""
    rows = []
    for name in list_versions(model):
        about = {} if name == SOURCE else read_adapters(version_folder(model, name)).record.get("version", {})
        cases = len(about["cases"]) if "cases" in about else None
        facts = {key: about.get(key) for key in ("created", "from_version")}
        rows.append({"name": name, "active": name == active, "cases": cases, **facts})
    return rows
