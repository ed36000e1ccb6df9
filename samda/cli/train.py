# SPDX-License-Identifier: Apache-2.0
"""Train adapters and a class head on labeled scans.

Writes a model folder. The data set is an nnU-Net or Medical Segmentation Decathlon folder, a MONAI data list (JSON), a
CSV of pairs, images with masks, or DICOM series with label volumes. `samda check` inspects it and writes a task file;
without --task, its suggestion is used. Defaults are those of the bundle's train.json.

  samda train -d Dataset001_Liver -o model --task liver.yaml
  samda train -d Dataset001_Liver -o model --task liver.yaml --adapter salt,dka,sam_da --backbone vit_b --epochs 40
  samda train -d Dataset001_Liver -o model --task liver.yaml --resume
  samda train -d New -o new --from model                 goes on from a trained model
  torchrun --nproc_per_node=4 -m samda train -d Dataset001_Liver -o model --task liver.yaml     on four GPUs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from samda.cli.options import add_shared, existing, parse_settings, pick_device, positive, print_json, say, task_file
from samda.cli.run_report import RunReport
from samda.errors import UsageError
from samda.processes import launched

OVERRIDES: dict[str, dict[str, Any]] = {  # keys of train.json with an option of their own -> arguments of argparse
    "weights": {"type": Path, "metavar": "FILE", "help": "base weights; default: published weights, downloaded once"},
    "head": {"choices": ("pyramid", "sam"), "help": "class head; default pyramid"},
    "minutes": {"type": float, "metavar": "N", "help": "wall time of the whole training; instead of steps"},
    "steps": {"type": positive, "metavar": "N", "help": "gradient steps; default 3000"},
    "epochs": {"type": positive, "metavar": "N", "help": "passes over the training slices, instead"},
    "batch_size": {"type": positive, "metavar": "N", "help": "slices per step"},
    "learning_rate": {
        "type": float,
        "metavar": "X",
        "help": "learning rate of adapters and baselines; for the class head: --set head_learning_rate=X",
    },
    "fold": {"type": int, "metavar": "K", "help": "validation fold"},
    "seed": {"type": int, "metavar": "N", "help": "random seed"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda train`."""
    parser.add_argument("-d", "--data", type=Path, required=True, metavar="DATASET", help="labeled scans")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL", help="model folder to write")
    parser.add_argument(
        "--task",
        metavar="FILE",
        help="YAML or JSON with classes, modality and geometry (see samda check), or name of a task of samda",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME[,NAME]",
        help="adapters to train, by name or as YAML files with their settings (samda info lists them); default ssf, "
        "with --head sam sam_da",
    )
    parser.add_argument("--backbone", metavar="NAME", help="vit_t, vit_b, vit_l or vit_h; default vit_t")
    parser.add_argument(
        "--from",
        dest="parent",
        type=Path,
        metavar="MODEL",
        help="trained model to start from; a task file may then hold changes only, for instance further classes",
    )
    parser.add_argument(
        "--keep-classes",
        choices=("exact",),
        help="exact: freeze the model of --from, new classes get parameters of their own",
    )
    for key, settings in OVERRIDES.items():
        parser.add_argument(f"--{key.replace('_', '-')}", **settings)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of train.json; nested keys as a::b",
    )
    parser.add_argument("--resume", action="store_true", help="continue the training in MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the training in MODEL")
    parser.add_argument("--with-base", action="store_true", help="copy the base weights into MODEL")
    parser.add_argument(
        "--tracking",
        default="tensorboard",
        metavar="NAME",
        help="tensorboard (default, into MODEL/tensorboard), mlflow (into MODEL/mlruns.db), tensorboard,mlflow or none",
    )
    add_shared(parser, "--report", "--profile", "--quiet", "--device", "--json")


def run(args: argparse.Namespace) -> None:
    """Run `samda train`."""
    run_report, out = RunReport(args, "train"), args.output.resolve()
    if args.report is not None and args.report.resolve() in (out, *out.parents):  # outside of the report
        raise UsageError(f"--report {args.report} contains the model folder; give another file")
    with run_report as report:
        existing(args.data, "data set")
        overrides = read_overrides(args)
        adapters = None if args.adapter is None else args.adapter.split(",")
        task = None if args.task is None else task_file(args.task)
        device = pick_device(args.device)
        from samda.progress import phase

        with report.stage("import"), phase("imports"):
            from samda.training import train
        report.add(device=device)
        rank, world = launched()

        def begin() -> None:  # after the settings are checked: hashing a large data set takes long
            if rank == 0:
                say(f"training on {device}" + (f", {world} processes" if world > 1 else ""))
            if report.wanted:
                with report.stage("hash"):
                    add_inputs(report, args.data)

        with report.stage("train"):
            result = train(
                args.data,
                args.output,
                task=task,
                adapters=adapters,
                backbone=args.backbone,
                overrides=overrides,
                resume=args.resume,
                overwrite=args.overwrite,
                device=device,
                tracking=args.tracking,
                begin=begin,
                with_base=args.with_base,
                parent=args.parent,
                keep_classes=args.keep_classes,
                **{key: overrides.pop(key) for key in ("head", "minutes", "steps") if key in overrides},
            )
        if rank != 0:  # the main process reports for all
            return
        report.seconds["epochs"] = result["seconds"]  # part of "train", as is the next
        report.seconds["encode"] = (result["embeddings"] or {}).get("seconds", 0.0)
        report.add(result={key: value for key, value in result.items() if key != "model"})
        report.add_model(args.output)
        if args.json:
            print_json(result)
        else:
            print(f"model in {args.output}; next: samda predict -m {args.output} -i SCANS -o LABELS")


def add_inputs(report: RunReport, dataset: Path) -> None:
    """The files of the labeled cases."""
    from samda.data.datalists import read_datalist

    for cases in read_datalist(dataset).cases.values():
        for case in cases:
            if "label" in case:
                report.add_input(case["id"], image=case["image"], label=case["label"])


def read_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of train.json set by options; a key that is also given by `--set` is refused."""
    overrides = {key: value for key in OVERRIDES if (value := getattr(args, key)) is not None}
    for key, value in parse_settings(args.set).items():
        if key in overrides:
            raise UsageError(f"{key} is given twice, as --{key.replace('_', '-')} and with --set; keep one")
        overrides[key] = value
    return overrides
