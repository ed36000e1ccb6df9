# SPDX-License-Identifier: Apache-2.0
"""The job of `samda adapt` and the bundle's adapt.json: model, scans, report, scores, site version.

A site version is a candidate that the accepted cases of one site give. Each of them ended at parameters theta_i, a few
steps from the same theta_0. The candidate is their mean, in which the effects of single patients average out and that
of the scanner stays; the order of cases does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import (
    AdaptRun,
    adapt_folder,
    check_part,
    collect,
    details_folder,
    formats_of_run,
    open_run,
)
from samda.adaptation.loop import displacement, load, restoring
from samda.adaptation.objectives import check_settings
from samda.adaptation.page import mean_dice, score_run, write_page
from samda.adapters.adapter_file import read_adapters, save_adapters
from samda.data.datalists import find_cases
from samda.data.folders import join_channels
from samda.errors import InputError, SamdaError, UsageError
from samda.inference.dicom_out import NIFTI
from samda.io import new_folder
from samda.models.versions import (
    check_name,
    check_site,
    list_versions,
    load_version,
    version_folder,
    versions_folder,
)
from samda.processes import Shard, exchange, is_main, rank_and_world
from samda.provenance import now, versions

FEWEST = 3  # cases behind a site version

logger = logging.getLogger(__name__)


def run_adaptation(
    model: str | Path,
    inputs: str | Path,
    output: str | Path,
    settings: Mapping[str, Any] | None = None,
    report: str | Path | None = None,
    labels: str | Path | None = None,
    site: str | None = None,
    section: str | None = None,
    dry_run: bool = False,
    keep_names: bool = False,
    overwrite: bool = False,
    weights: str | Path | None = None,
    version: str | None = None,
    part: Shard | None = None,
    device: torch.device | str = "cpu",
    on_case: Callable[[str, Mapping[str, Any]], None] | None = None,
    formats: str | Sequence[str] = NIFTI,
) -> dict[str, Any]:
    """Adapt a trained model to scans; everything `samda adapt` does.

    Args:
        inputs, section: see :func:`samda.data.datalists.find_cases`.
        output, report, dry_run, keep_names, overwrite, on_case, formats: of
            :func:`samda.adaptation.folder.adapt_folder`.
        settings: of :class:`samda.adaptation.settings.AdaptationSettings`.
        labels: label files or a data set with labels: read after all decisions, for the report only.
        site: name of a candidate version to distill from the accepted cases.
        weights: base weights; None takes those of the training.
        version: of the model; None takes the active one.
        part: the cases of this process; None takes all. Page, scores and site version come from the process that finds
            the cases of all parts finished.

    Returns:
        {"output", "page", "version", "counts", "cases", "failed", "dice", "site", "part"}, plain values; "page" is None
        while other parts are at work.
    """
    formats = formats_of_run(formats)
    check_part(part, overwrite)
    check_settings(settings)  # before the weights are read
    if site is not None:
        check_name(site)
        if dry_run:
            raise UsageError("a site version needs adapted cases; leave out dry_run")
    if labels is not None and dry_run:
        raise UsageError("labels are for the adapted maps, which dry_run does not write; leave one of them out")
    network, task, record, version = load_version(model, version, weights)
    adaptation = Adaptation(network, task, record, device=device, version=version, **dict(settings or {}))
    if site is not None:
        check_site(model, site, {"from_version": version, "config": adaptation.config})
    cases = join_channels(find_cases(inputs, section), task.in_channels)
    with open_run(cases, output, formats, dry_run, report, part):
        run = adapt_folder(
            adaptation,
            cases,
            output,
            report=report,
            dry_run=dry_run,
            keep_names=keep_names,
            keep_tensors=site is not None,
            overwrite=overwrite,
            part=part,
            on_case=on_case,
            formats=formats,
        )
        exchange(None)  # processes of torchrun wait for each other, jobs of an array do not
        whole: AdaptRun | None = run
        if part is not None:
            whole = collect(adaptation, cases, output, dry_run) if is_main() else None
        facts: dict[str, Any] = {"page": None, "dice": None, "site": None}
        if whole is not None:
            scores, unscored = None, None
            if labels is not None:
                try:
                    scores = score_run(whole, labels, task)
                except SamdaError as error:  # the adapted cases keep their report
                    unscored = error
            if scores is not None:
                facts["dice"] = {case: tuple(map(mean_dice, both.values())) for case, both in scores.items()}
            facts["page"] = str(write_page(adaptation, whole, cases, scores=scores, keep_names=keep_names))
            if unscored is not None:
                raise unscored
            if site is not None:
                try:
                    facts["site"] = distill(adaptation, model, whole, site)
                except (UsageError, OSError):
                    if part is None or site not in list_versions(model):
                        raise  # otherwise another part, which finished at the same moment, has written it
            if rank_and_world()[1] > 1:  # a job of an array reports its own cases only
                run = whole
    about = {"version": version, "failed": run.failed, "part": None if part is None else str(part)}
    return run.to_dict() | facts | about


def distill(adaptation: Adaptation, model: str | Path, run: AdaptRun, name: str) -> dict[str, Any]:
    """Write the mean of the accepted cases' parameters as a candidate version; returns its record.

    `run` must have been made by this adaptation with `keep_tensors`; InputError where fewer than three of its cases
    were accepted with a change.
    """
    chosen = {case: r for case, r in run.records.items() if "adapter" in r["output_files"]}
    if len(chosen) < FEWEST:
        raise InputError(
            f"{len(chosen)} of {len(run.records)} cases were accepted with a change; a site version needs at least "
            f"{FEWEST}"
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


def log_case(case: str, record: Mapping[str, Any]) -> None:
    """Log the outcome of a case: `on_case` of the bundle's adapt.json."""
    logger.info("case %s: %s (%s)", case, record["reason"], record["error"] or record["explanation"])


def check_run(result: dict[str, Any]) -> dict[str, Any]:
    """The result of :func:`run_adaptation`; InputError on the main process if a case failed."""
    if result["failed"] and is_main():
        raise InputError(
            f"{len(result['failed'])} of {len(result['cases'])} cases failed: {', '.join(result['failed'])}"
        )
    return result
