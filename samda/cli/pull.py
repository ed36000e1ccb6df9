# SPDX-License-Identifier: Apache-2.0
"""Make a model folder of a model that samda push has shared on the Hugging Face Hub.

Sizes, names and hashes are checked, and nothing in the file is executed. Needs the extra samda[hub].

  samda pull my-clinic/liver-ct -o model
"""

from __future__ import annotations

import argparse

from samda.cli.options import add_shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda pull`."""
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the Hub")
    add_shared(parser, "--output", metavar="MODEL", help="model folder to write")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit; default: the newest")


def run(args: argparse.Namespace) -> None:
    """Run `samda pull`."""
    from samda.models.hub import pull_model

    folder = pull_model(args.repository, args.output, args.revision)
    print(f"model in {folder}; see its README.md; next: samda predict -m {folder} -i SCANS -o LABELS")
