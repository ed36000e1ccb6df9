# SPDX-License-Identifier: Apache-2.0
"""Adapt a trained model to scans of another site without labels.

For each scan, a few adapter parameters are chosen or optimized, the scan is predicted and the parameters are restored.
A guard decides whether the adapted label map replaces that of the source model. Every case is recorded. To resume an
interrupted run, repeat the command.

  samda adapt -m model -i scans -o adapted
  samda adapt -m model -i scans -o adapted --dry-run            write only the source maps and the records
  samda adapt -m model -i series -o adapted --output-format nifti,dicom-seg
  samda adapt -m model -i scans -o adapted --labels truth       report Dice before and after
  samda adapt -m model -i scans -o adapted --site clinic-a      also distill a candidate version
  samda adapt -m model -i scans -o adapted --part 2/8           the second of eight jobs; the last writes the report
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samda.adaptation.settings import AdaptationSettings
from samda.cli.options import add_shared, check_file, existing, parse_settings, pick_device, positive, print_json, say
from samda.errors import UsageError, check_keys, one_line
from samda.processes import is_main, join_for_cases, leave, read_part

FIELDS = dataclasses.fields(AdaptationSettings)
# settings that are set with --set; the others have an option
SETTINGS = tuple(
    field.name for field in FIELDS if "flag" not in field.metadata and field.name not in ("modality", "keep_largest")
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of the adaptation's settings become options."""
    add_shared(parser, "--model", "--input")
    add_shared(parser, "--output", metavar="OUT", help="folder of the results")
    for field in FIELDS:
        rule = field.metadata
        if "flag" in rule:
            kind = rule.get("type", str)
            parser.add_argument(
                rule["flag"],
                dest=field.name,
                type=positive if rule.get("least") == 1 else kind,
                default=field.default,
                metavar=rule.get("metavar", "N" if kind is int else "X"),
                help=rule["help"],
            )
    add_shared(parser, "--output-format", "--modality", "--keep-largest")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"any of {', '.join(SETTINGS)}")
    parser.add_argument("--records", type=Path, metavar="FILE", help="file of the records; default OUT/run.jsonl")
    parser.add_argument("--labels", type=Path, metavar="FOLDER", help="label maps, for the report only")
    parser.add_argument("--site", metavar="NAME", help="distill accepted cases into a candidate version of this name")
    parser.add_argument("--dry-run", action="store_true", help="write only the source maps and the records")
    parser.add_argument("--keep-names", action="store_true", help="file names instead of pseudonyms in the records")
    parser.add_argument("--overwrite", action="store_true", help="reprocess finished cases")
    add_shared(parser, "--weights", "--version", "--section", "--part", "--profile", "--quiet", "--device", "--json")


def tell(case: str, record: Mapping[str, Any]) -> None:
    """Print the outcome of a case."""
    say(one_line(f"case {case}: {record['reason']} ({record['error'] or record['explanation']})"))


def run(args: argparse.Namespace) -> None:
    """Adapt; raise at the end if a case failed."""
    existing(args.input, "input")
    if args.labels is not None:
        existing(args.labels, "labels")
    if args.records is not None:
        check_file(args.records, "--records")
    settings = read_settings(args)
    if args.site and args.dry_run:
        raise UsageError("--site needs adapted cases; leave out --dry-run")
    part = read_part(args.part)
    device = pick_device(args.device)
    from samda.progress import phase

    with phase("imports"):
        from samda.adaptation.job import check_run, run_adaptation

    join_for_cases()
    result = run_adaptation(
        args.model,
        args.input,
        args.output,
        settings=settings,
        report=args.records,
        labels=args.labels,
        site=args.site,
        dry_run=args.dry_run,
        keep_names=args.keep_names,
        overwrite=args.overwrite,
        weights=args.weights,
        version=args.version,
        section=args.section,
        part=part,
        device=device,
        on_case=tell,
        formats=args.output_format,
    )
    first = is_main()
    leave(wait=False)
    if not first:  # the main process reports for all
        return
    if args.json:
        print_json(result)
    else:
        counts = ", ".join(f"{number} {what}" for what, number in result["counts"].items() if number)
        page = f"report in {result['page']}" if result["page"] else "other parts are not finished"
        print(f"{counts or 'no case'}; {page}")
        if args.site and result["page"]:
            print(
                f"candidate version {args.site}; next: samda commission -m {args.model} --version {args.site} -d "
                "LABELED_CASES -o REPORT, then samda site activate"
            )
    check_run(result)


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the adaptation from the options; an unknown key of `--set` is refused."""
    settings = parse_settings(args.set)
    check_keys(settings, SETTINGS, "--set")
    return {field.name: getattr(args, field.name) for field in FIELDS if field.name not in SETTINGS} | settings
