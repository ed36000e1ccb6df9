# SPDX-License-Identifier: Apache-2.0
"""Find or copy the packaged MONAI bundle, whose configs `python -m monai.bundle run` takes.

samda bundle                 print the path of the packaged bundle
samda bundle -o my_bundle    copy it to a new folder, to edit its configs
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda bundle`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--path", action="store_true", help="print the path of the packaged bundle (default)")
    which.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="copy the bundle to this new folder")


def run(args: argparse.Namespace) -> None:
    """Run `samda bundle`."""
    from samda.io import new_folder, packaged, refuse_full

    path = packaged("bundles", "sam_segmentation")
    if args.output is not None:
        output = args.output.expanduser()
        refuse_full(output)
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with new_folder(output) as place:
            shutil.copytree(path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py*"))
        path = output
    print(path)
