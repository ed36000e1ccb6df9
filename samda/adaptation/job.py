# SPDX-License-Identifier: Apache-2.0
"""The whole job behind `samda adapt` and the bundle's adapt.json: model, scans, page, scores, site version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from samda.adaptation.engine import Adaptation
from samda.adaptation.folder import AdaptRun, adapt_folder, collect
from samda.adaptation.objectives import check_settings
from samda.adaptation.page import mean_dice, score_run, write_page
from samda.adaptation.site import check_site, distill
from samda.data.datalists import find_cases
from samda.errors import UsageError
from samda.models.versions import list_versions, load_version
from samda.processes import Shard, exchange, is_main, rank_and_world

UNFINISHED = {"page": None, "dice": None, "site": None}  # other parts are at work


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
) -> dict[str, Any]:
    """Adapt a trained model to scans; everything `samda adapt` does.

    Args:
        model: a model folder.
        inputs: a scan, a folder of scans or DICOM series, or a data set; see
            :func:`samda.data.datalists.find_cases`, as for section.
        output: folder of the results, see :func:`samda.adaptation.folder.adapt_folder`; as are dry_run, keep_names and
            overwrite.
        settings: of :class:`samda.adaptation.settings.AdaptationSettings`.
        report: file of the records.
        labels: label files or a data set with labels: read when everything is decided, for the report only.
        site: name of a candidate version to distill from the accepted cases.
        weights: base weights; None takes those of the training.
        version: of the model; None takes the active one.
        part: the cases that this process does; None does all. Page, scores and site version come from the process that
            finds the cases of all parts finished.
        device: torch device.
        on_case: called with name and record of each case.

    Returns:
        {"output", "page", "version", "counts", "cases", "failed", "dice", "site", "part"}, plain values; "page" is None
        while other parts are at work.

    Raises:
        SamdaError: as the parts do; what is finished stays.
    """
    check_settings(settings)  # reading the weights of a large model takes a while
    if site is not None:
        if dry_run:
            raise UsageError("a site version needs adapted cases; do without the dry run")
        check_site(model, site)
    network, task, record, version = load_version(model, version, weights)
    adaptation = Adaptation(network, task, record, device=device, version=version, **dict(settings or {}))
    cases = find_cases(inputs, section)
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
    )
    exchange(None)  # processes of torchrun wait for one another here, jobs of an array do not
    own = run
    if part is not None:
        whole = collect(adaptation, cases, output, dry_run) if is_main() else None
        if whole is None:
            return own.to_dict() | UNFINISHED | {"version": version, "failed": own.failed, "part": str(part)}
        run = whole
    scores = score_run(run, labels, task) if labels is not None and not dry_run else None
    page = write_page(adaptation, run, cases, scores=scores, keep_names=keep_names)
    distilled = None if site is None else _distill_once(adaptation, model, run, site, part)
    if rank_and_world()[1] == 1:  # a job of an array answers for its own cases
        run = own
    return run.to_dict() | {
        "page": str(page),
        "version": version,
        "failed": run.failed,
        "dice": None if scores is None else {case: mean_dice(score) for case, score in scores.items()},
        "site": distilled,
        "part": None if part is None else str(part),
    }


def _distill_once(
    adaptation: Adaptation, model: str | Path, run: AdaptRun, site: str, part: Shard | None
) -> dict[str, Any] | None:
    """The site version; None if another part, which finished at the same moment, has written it."""
    try:
        return distill(adaptation, model, run, site)
    except (UsageError, OSError):
        if part is None or site not in list_versions(model):
            raise
        return None
