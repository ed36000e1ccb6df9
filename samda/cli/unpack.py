# SPDX-License-Identifier: Apache-2.0
"""Make a model folder of a file of `samda pack`.

Sizes, names and hashes are checked, and nothing in the file is executed. An altered or damaged file leaves nothing.

  samda unpack liver_ct.samda.zip -o model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from samda.cli.options import add_shared, existing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda unpack`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="file of samda pack")
    add_shared(parser, "--output", metavar="MODEL", help="model folder to write")


def run(args: argparse.Namespace) -> None:
    """Run `samda unpack`."""
    from samda.models.pack import unpack_model

    folder = unpack_model(existing(args.file, "pack"), args.output)
    print(f"model in {folder}; see its README.md; next: samda predict -m {folder} -i SCANS -o LABELS")
