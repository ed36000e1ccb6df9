# SPDX-License-Identifier: Apache-2.0
"""Inspect a data set before training: summary, problems and a suggested task file.

All cases are read completely. Each problem is one line with case and remedy. The exit code is 1 if training would fail.

  samda check Dataset001_Liver
  samda check Dataset001_Liver -o liver.yaml        write the suggested task; review it before training
  samda check Dataset001_Liver --task liver.yaml    check the data set against this task
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samda.cli.options import add_shared, check_file, existing, pick_device, print_json, print_table, task_file
from samda.errors import InputError, UsageError

if TYPE_CHECKING:
    from samda.data.inspect import DataReport
    from samda.data.measure import CaseFacts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda check`."""
    parser.add_argument("data", type=Path, metavar="DATASET", help="data set in any layout that samda train accepts")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the suggested task to this YAML file")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--task", metavar="FILE", help="check against this task instead of suggesting one")
    parser.add_argument("--backbone", default="vit_t", metavar="NAME", help="for the batch size; default vit_t")
    add_shared(parser, "--device", "--json")
    add_shared(parser, "--quiet", help="print only facts, problems and errors, without the suggested task")


def run(args: argparse.Namespace) -> None:
    """Inspect and report; raise at the end if training would fail."""
    existing(args.data, "data set")
    task = None if args.task is None else task_file(args.task)
    if task and args.output:
        raise UsageError("--task and -o cannot be combined: with --task no task is suggested; leave out one of them")
    if args.output:
        _check_output(args.output, args.overwrite)
    device = pick_device(args.device)
    from samda.data.inspect import check_data
    from samda.data.suggest import check_and_suggest
    from samda.io import write_text
    from samda.task import Task
    from samda.training.datasets import available_mb, fitting_batch_size

    suggestion, batch_size = None, None
    memory = available_mb(device)
    fitting_batch_size(args.backbone, 256, memory)  # refuses an unknown name before the scans are read
    if task:
        report = check_data(args.data, Task.from_file(task))
    else:
        report, suggestion = check_and_suggest(args.data)
    if suggestion:
        batch_size = fitting_batch_size(args.backbone, suggestion.task.image_size, memory)
        text = suggestion.to_yaml(_heading(args, device, batch_size))
        if args.output:
            write_text(args.output, text)
    if args.json:
        print_json(
            report.to_dict()
            | {"task": suggestion.task.to_dict() if suggestion else None, "batch_size": batch_size}
            | {"reasons": suggestion.reasons if suggestion else None, "task_file": args.output if suggestion else None}
        )
    else:
        _show(report)
        if suggestion and (args.output or not args.quiet):
            print(f"\nsuggested task{f', written to {args.output}' if args.output else ''}")
        if suggestion and not args.quiet:
            print(f"\n{text}", end="")
    if report.stops:
        number = len(report.stops)
        remedy = f"fix {'it' if number == 1 else 'them'} and check again"
        raise InputError(f"training would fail on {_count(number, 'problem')}; {remedy}")


def _check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written or exists, before reading scans."""
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"output {str(path)!r} must end in .yaml; samda train derives the format from the suffix")
    check_file(path, "-o")
    if path.exists() and not overwrite:
        raise UsageError(f"output {str(path)!r} exists and may have been edited; use --overwrite to replace it")


def _heading(args: argparse.Namespace, device: str, batch_size: int) -> list[str]:
    """The comment at the top of the task file."""
    name = args.output or Path("task.yaml")
    train = f"samda train -d {shlex.quote(str(args.data))} -o MODEL --task {shlex.quote(str(name))}"
    backbone = "" if args.backbone == "vit_t" else f" --backbone {args.backbone}"
    size = "" if batch_size == 8 else f" --batch-size {batch_size}"
    return [
        f"A task for {args.data}, suggested by samda check; review it before training.",
        "",
        f"  {train}{backbone}{size}",
        "",
        f"Batch size {batch_size} should fit the free memory ({device}), adapters in the encoder of {args.backbone}.",
    ]


def _show(report: DataReport) -> None:
    from samda.data.datalists import LAYOUTS

    data = report.data
    sections = ", ".join(f"{name} {len(cases)}" for name, cases in data.cases.items())
    labeled = sum("label" in case for cases in data.cases.values() for case in cases)
    listing = f": {data.listing.name}" if data.listing else ""
    lines = [
        ("data set", f"{report.path} ({LAYOUTS[data.layout]}{listing})"),
        ("cases", f"{sections}; {labeled} with label"),
    ]
    lines += _facts(report.cases)
    if data.channels:
        lines.append(("named channels", ", ".join(data.channels)))
    for name, text in lines:
        print(f"{name.ljust(14)}  {text}")
    table = report.label_table()
    if table:
        print()
        print_table(
            ("label id", "name", "voxels", "cases"),
            [[str(r["id"]), r["name"] or "-", r["voxels"], r["cases"]] for r in table],
        )
    problems = report.sorted_problems()
    print(
        f"\n{_count(len(problems), 'problem')}{f', {len(report.stops)} of which stop a training' if problems else ''}"
    )
    for problem in problems:
        print(f"{'error' if problem.stops else 'warning':<8}{problem.line()}")


def _facts(cases: Sequence[CaseFacts]) -> list[tuple[str, str]]:
    """Ranges over the readable cases."""
    seen = [case for case in cases if case.shape]
    if not seen:
        return []
    measured = [case for case in seen if case.quantiles]
    lines = [
        ("shape", " x ".join(_spread([case.shape[a] for case in seen if case.shape]) for a in range(3)) + " voxels"),
        ("spacing", " x ".join(_spread([case.spacing_mm[a] for case in seen]) for a in range(3)) + " mm"),
        ("orientation", _tally(case.orientation for case in seen)),
        ("channels", _tally(case.channels for case in seen)),
    ]
    for channel in range(max((len(case.quantiles) for case in measured), default=0)):
        rows = [case.quantiles[channel] for case in measured if len(case.quantiles) > channel]
        shown = ", ".join(f"{p} % {_spread([r[i] for r in rows])}" for i, p in ((0, 1), (2, 50), (4, 99)))
        lines.append((f"intensity {channel}" if channel or len(measured[0].quantiles) > 1 else "intensity", shown))
    lines.append(("extremes", f"{min(c.smallest for c in measured):g} to {max(c.largest for c in measured):g}"))
    return lines


def _spread(values: Sequence[float]) -> str:
    """`4`, or `4..7` where they differ."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}..{high}"


def _tally(values: Iterable[Any]) -> str:
    """`RAS (3), LPS (1)`, the most frequent first."""
    return ", ".join(f"{value} ({number})" for value, number in Counter(values).most_common())


def _count(number: int, what: str) -> str:
    """`1 problem`, `2 problems`, `no problems`."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
