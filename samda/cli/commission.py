# SPDX-License-Identifier: Apache-2.0
"""Test a model on labeled cases of a site and write an acceptance report.

Predicts and adapts to 5 to 20 labeled cases and writes commission.html and commission.json: Dice, NSD and HD95 with
intervals, plain against adapted, error of the predicted Dice at this site, outliers with pictures, drift, versions and
hashes. The JSON is what `samda predict --site-report` reads, and `samda site activate` asks for.

  samda commission -m model -d local_cases -o report
  samda commission -m model -d local_cases -o report --version clinic-a
"""

from __future__ import annotations

import argparse
from pathlib import Path

from samda.cli.adapt import tell
from samda.cli.options import add_shared, existing, pick_device, print_json
from samda.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda commission`."""
    add_shared(parser, "--model")
    parser.add_argument(
        "-d", "--data", type=Path, required=True, metavar="CASES", help="data set of labeled cases of the site"
    )
    add_shared(parser, "--output", metavar="REPORT", help="folder of the report")
    add_shared(parser, "--version", "--weights", "--modality")
    parser.add_argument("--keep-names", action="store_true", help="file names instead of pseudonyms in the report")
    add_shared(parser, "--quiet", "--device", "--json")


def run(args: argparse.Namespace) -> None:
    """Write the report; raise at the end if a case failed."""
    existing(args.data, "data set")
    device = pick_device(args.device)
    from samda.adaptation.commission import commission

    report = commission(
        args.model,
        args.data,
        args.output,
        version=args.version,
        weights=args.weights,
        device=device,
        keep_names=args.keep_names,
        settings={"modality": args.modality},
        on_case=tell,
    )
    if args.json:
        print_json(report)
    else:
        for name, entry in report["scores"]["plain"].items():
            dice = entry["dice"]
            if dice["n"]:
                print(f"{name}: Dice {dice['mean']:.3f} ({dice['low']:.3f} to {dice['high']:.3f}) of {dice['n']} cases")
            else:
                print(f"{name}: not measured, no case labels it")
        print(f"report in {args.output / 'commission.html'}")
    if report["failed"]:
        total = len(report["failed"]) + len(report["cases"])
        raise InputError(f"{len(report['failed'])} of {total} cases could not be scored: {', '.join(report['failed'])}")
