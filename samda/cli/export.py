# SPDX-License-Identifier: Apache-2.0
"""Export a trained model for use without samda.

Writes a folder with the files of one format and export.json: classes, preprocessing, shapes, versions, sha256. Each
file is read back and compared with the network.

  samda export -m model -o exported --format onnx     encoder.onnx, decoder.onnx
  samda export -m model -o exported --format torch    encoder.pt2, decoder.pt2
  samda export -m model -o exported --format sam      sam.pth for segment_anything, or MobileSAM's package (vit_t)

"sam" merges the adapters into the weights (salt, lora, norm, ssf, head, decoder, full); modules (sam_da, lka, dka,
bottleneck) cannot be merged. The class head is written to a separate file. "onnx" requires pip install 'samda[export]'.
"""

from __future__ import annotations

import argparse

from samda.cli.options import add_shared, print_json, say

FORMATS = ("sam", "onnx", "torch")  # as in samda.models.export, without importing torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda export`."""
    add_shared(parser, "--model")
    add_shared(parser, "--output", metavar="FOLDER", help="new folder")
    parser.add_argument("--format", choices=FORMATS, required=True, help="format of the files")
    add_shared(parser, "--version", "--weights", "--quiet", "--json")


def run(args: argparse.Namespace) -> None:
    """Run `samda export`."""
    from samda.models.export import check_folder, export_model
    from samda.models.versions import load_version

    check_folder(args.output)
    network, task, _, version = load_version(args.model, args.version, args.weights)
    say(f"model version {version}; writing and verifying takes up to a minute")
    about = export_model(network, args.output, task, args.format, version)
    if args.json:
        print_json(about)
        return
    for name, file in about["files"].items():
        print(f"{args.output / name}  {file['bytes'] / 1e6:.1f} MB{describe(file)}")
    print(f"{args.output / 'export.json'}  classes, preprocessing, shapes, sha256")


def describe(file: dict) -> str:
    """Difference between the file and the network."""
    if "difference" not in file:
        return f"  {file['tensors']}" if "tensors" in file else ""
    return f"  maximum difference {file['difference']:.1e} (largest value {file['largest']:.3g})"
