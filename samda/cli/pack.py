# SPDX-License-Identifier: Apache-2.0
"""Write a trained model into one file to share, without anything of patients.

The file holds adapters, class head, description and a model card; base weights only where the model folder has them.
`samda unpack` makes a model folder of it. Packing is no anonymization of what the model itself may have learned.

  samda pack model -o liver_ct.samda.zip --license CC-BY-4.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from samda.cli.options import add_shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda pack`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    add_shared(parser, "--output", metavar="FILE", help="file to write, such as liver_ct.samda.zip")
    parser.add_argument("--license", metavar="TEXT", help="license of the model, for its card; default: not stated")
    add_shared(parser, "--version")


def run(args: argparse.Namespace) -> None:
    """Run `samda pack`."""
    from samda.models.pack import pack_model

    file = pack_model(args.model, args.output, args.version, args.license)
    print(f"{file}  {file.stat().st_size / 1e6:.1f} MB; read its README.md before you share it")
