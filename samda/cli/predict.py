# SPDX-License-Identifier: Apache-2.0
"""Segment scans with a trained model.

Writes one label map per scan on the grid of the scan, and predictions.csv with the predicted Dice of each class, the
lowest first. The input is a scan (NIfTI, NRRD, MHA, 2-D image, folder with one DICOM series), a folder of scans, or a
data set (its test cases by default). Scans that fail are reported, the others are still processed, and the exit code is
1.

  samda predict -m model -i scans -o labels
  samda predict -m model -i scans -o labels --continue      skip finished cases
  samda predict -m model -i scans -o labels --modality MR   scans of another modality than the training data
  samda predict -m model -i scans -o labels --part 2/8      the second of eight jobs
  samda predict -m model -i scans -o labels --axes all      the mean of three slice axes
  samda predict -m model -i series -o labels --output-format nifti,dicom-seg,rtstruct
  samda predict -m model -i scans -o labels --amp off       full precision, also where bfloat16 is faster
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from samda.cli.options import add_shared, existing, pick_device, positive, print_json, say
from samda.cli.run_report import RunReport
from samda.errors import InputError, one_line
from samda.processes import exchange, is_main, join_for_cases, launched, leave, read_part

NO_CALIBRATION = "the model folder has no calibration, so no Dice is predicted; a new training adds it"
SHOWN = 8  # doubtful cases that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda predict`."""
    add_shared(parser, "--model", "--input")
    add_shared(parser, "--output", metavar="LABELS", help="folder of the label maps")
    add_shared(parser, "--version", "--weights", "--section")
    parser.add_argument("--save-probabilities", action="store_true", help="also write the class probabilities")
    parser.add_argument("--continue", action="store_true", dest="skip", help="skip finished cases")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="slices per forward pass; default 8"
    )
    parser.add_argument(
        "--memory",
        type=positive,
        default=512,
        metavar="MB",
        help="memory for class maps on the scan's grid; default 512",
    )
    add_shared(parser, "--part")
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="precision of the network (fp16: GPUs only, off: full); default auto: bf16 on CPUs with AMX or"
        " AVX512-BF16, else full",
    )
    parser.add_argument(
        "--axes",
        choices=("one", "all"),
        help="all: the mean of predictions along all three axes, at three times the cost, if voxels are nearly cubes;"
        " default: the task's",
    )
    parser.add_argument(
        "--site-report",
        type=Path,
        metavar="FILE",
        help="JSON report of samda commission; flags cases unlike those of the site",
    )
    add_shared(parser, "--output-format", "--modality", "--keep-largest", "--report", "--profile")
    add_shared(parser, "--quiet", "--device", "--json")


def run(args: argparse.Namespace) -> None:
    """Predict; raise at the end if a case failed."""
    with RunReport(args, "predict") as report:
        existing(args.input, "input")
        part = read_part(args.part)
        device = pick_device(args.device)
        from samda.progress import phase

        with report.stage("import"), phase("imports"):
            from samda.adapters.base import merge
            from samda.data.datalists import find_cases
            from samda.data.folders import join_channels
            from samda.expected_dice import TRUSTED
            from samda.inference.dicom_out import check_cases, parse_formats
            from samda.inference.folder import predict_folder
            from samda.inference.postprocessing import override
            from samda.inference.predict import Predictor
            from samda.inference.writer import check_site_report, look_first, read_site_report, write_table
            from samda.models.versions import load_version
        report.add(device=device)
        formats = parse_formats(args.output_format)
        site = None if args.site_report is None else read_site_report(args.site_report)
        join_for_cases()
        cases = find_cases(args.input, args.section)
        check_cases(cases, formats)  # before the weights are read
        with report.stage("load"), phase("loading"):
            network, task, record, version = load_version(args.model, args.version, args.weights)
        if site is not None:
            from samda.adaptation.engine import adapter_sha256

            check_site_report(site, adapter_sha256(network), version, record.get("calibration") is not None)
        cases = join_channels(cases, task.in_channels)
        mine = part.of(cases) if part else cases
        total = len(mine)
        task = override(task, args.keep_largest, args.modality, args.axes)
        report.add(task=task.to_dict(), model_version=version)
        if report.wanted:
            with report.stage("hash"):
                report.add_network(network)
                for case in cases if launched()[1] > 1 else mine:  # the main process reports for all
                    report.add_input(case["id"], image=case["image"])
        merge(network)  # saves the cost of the adapters in inference
        predictor = Predictor(
            network,
            task,
            device,
            batch_size=args.batch_size,
            memory_budget_mb=args.memory,
            amp=args.amp,
            progress=is_main(),
            record=record,
        )
        report.add(precision=str(predictor.inferer.precision(device)).removeprefix("torch."))
        if predictor.measured.calibration is None:
            say(NO_CALIBRATION)
        where = f"part {part} of {len(cases)} cases: " if part else ""
        say(f"{where}{total} case{'' if total == 1 else 's'} on {device}, model version {version}")
        with report.stage("predict"):
            result = predict_folder(
                predictor,
                cases,
                args.output,
                save_probabilities=args.save_probabilities,
                skip_finished=args.skip,
                part=part,
                on_case=Teller(report),
                formats=formats,
                site=site,
            )
        first, results = is_main(), exchange(result)
        leave(wait=False)
        if not first:  # the main process reports for all
            return
        for other in results[1:]:
            report.set_outcomes(other.to_dict())
        if len(results) > 1:
            result, part, total = sum(results[1:], results[0]), None, len(cases)
            if result.quality:
                write_table(args.output, cases, result.quality, site)
        report.add(quality={case: one.to_dict() for case, one in result.quality.items()})
        if args.json:
            print_json(result.to_dict() | ({"part": str(part)} if part else {}))
        else:
            print(f"{len(result.done)} predicted, {len(result.skipped)} skipped; label maps in {args.output}")
            doubtful = [case for case in look_first(result.quality) if result.quality[case].mean < TRUSTED]
            if doubtful:
                shown = ", ".join(f"{case} ({result.quality[case].mean:.2f})" for case in doubtful[:SHOWN])
                more = f" and {len(doubtful) - SHOWN} more" if len(doubtful) > SHOWN else ""
                print(one_line(f"predicted Dice below {TRUSTED:g}, look at these first: {shown}{more}"))
        if result.failed:
            raise InputError(f"{len(result.failed)} of {total} cases failed: {', '.join(result.failed)}")


class Teller:
    """Reports finished cases; failed and empty cases are already logged by the job."""

    def __init__(self, report: RunReport) -> None:
        self.report, self.since = report, time.perf_counter()

    def __call__(self, case: str, outcome: str) -> None:
        now = time.perf_counter()
        self.report.set_outcome(case, outcome, now - self.since)
        self.since = now
        if outcome in ("done", "skipped"):
            say(one_line(f"case {case}: {outcome}"))
