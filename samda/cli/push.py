# SPDX-License-Identifier: Apache-2.0
"""Share a trained model in a repository of the Hugging Face Hub, without anything of patients.

The repository gets a pack (see samda pack) and its model card. A new one is private unless --public is given. Log in
first: hf auth login. Needs the extra samda[hub].

  samda push model my-clinic/liver-ct --license CC-BY-4.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from samda.cli.options import add_shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda push`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the Hub")
    parser.add_argument("--license", metavar="TEXT", help="license of the model, for its card; default: not stated")
    parser.add_argument("--public", action="store_true", help="make a new repository readable by all")
    add_shared(parser, "--version")


def run(args: argparse.Namespace) -> None:
    """Run `samda push`."""
    from samda.models.hub import push_model

    print(push_model(args.model, args.repository, args.version, args.license, args.public))
