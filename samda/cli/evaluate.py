# SPDX-License-Identifier: Apache-2.0
"""Evaluate label maps against labels.

Computes Dice, IoU, HD95 (mm) and NSD per case and class on the grid of the labels. Cases are matched by name. Writes
metrics.json and metrics.csv. Cases that fail are reported, the others are still evaluated, and the exit code is 1.

  samda evaluate -m model -i predictions -l labels -o scores
  samda evaluate --task liver.yaml -i predictions -l Dataset001_Liver -o scores
"""

from __future__ import annotations

import argparse
from pathlib import Path

from samda.cli.options import add_shared, existing, print_json, task_file
from samda.cli.run_report import RunReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda evaluate`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "-m", "--model", type=Path, metavar="MODEL", help="model folder that defines classes and label ids"
    )
    which.add_argument("--task", metavar="FILE", help="task file, or name of a task of samda")
    add_shared(parser, "--input", metavar="PREDICTIONS", help="label maps, as samda predict writes them")
    parser.add_argument(
        "-l", "--labels", type=Path, required=True, metavar="LABELS", help="folder of label files, or a data set"
    )
    add_shared(parser, "--output", metavar="SCORES", help="folder of the scores")
    add_shared(parser, "--section", help="which cases of a data set; default: those with predictions")
    parser.add_argument("--nsd-tolerance", type=float, metavar="MM", help="tolerance of NSD; default: the task's")
    add_shared(parser, "--report", "--quiet", "--json")


def run(args: argparse.Namespace) -> None:
    """Evaluate; raise at the end if a case failed."""
    with RunReport(args, "evaluate") as report:
        existing(args.input, "input")
        existing(args.labels, "labels")
        with report.stage("import"):
            from samda.adapters.adapter_file import read_adapters
            from samda.data.datalists import find_pairs
            from samda.inference.evaluate import evaluate, format_table
            from samda.task import Task

        task = Task.from_dict(read_adapters(args.model).task) if args.model else Task.from_file(task_file(args.task))
        report.add(task=task.to_dict())
        if report.wanted:
            with report.stage("hash"):
                if args.model:
                    report.add_model(args.model)
                for case, (prediction, label) in find_pairs(args.input, args.labels, args.section)[0].items():
                    report.add_input(case, image=prediction, label=label)
        with report.stage("evaluate"):
            result = evaluate(
                args.input,
                args.labels,
                task,
                args.output,
                nsd_tolerance_mm=args.nsd_tolerance,
                section=args.section,
                on_case=report.set_outcome,
            )
        report.add(result=result.to_dict()["summary"])
        if args.json:
            print_json(result.to_dict())
        else:
            print(format_table(result))
        result.check()
