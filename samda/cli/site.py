# SPDX-License-Identifier: Apache-2.0
"""List, activate and roll back the versions of a model written by `samda adapt --site NAME`.

A site version is a candidate until it is activated; then predict, adapt, erf and export use it. The trained version is
called "source" and never changes. A version is activated once `samda commission` has tested it, or with --force.

  samda site list -m model
  samda site activate clinic-a -m model
  samda site rollback -m model
"""

from __future__ import annotations

import argparse

from samda.cli.options import add_shared, print_json, print_table
from samda.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda site`."""
    parser.add_argument("action", choices=("list", "activate", "rollback"), help="action")
    parser.add_argument("name", nargs="?", metavar="NAME", help="version to activate")
    add_shared(parser, "--model")
    parser.add_argument("--force", action="store_true", help="activate a version without an acceptance report")
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> None:
    """Run `samda site`."""
    if (args.name is None) == (args.action == "activate"):
        want = "needs the name of a version" if args.name is None else "takes no name"
        raise UsageError(f"{args.action} {want}")
    from samda.adapters.adapter_file import read_adapters
    from samda.models.versions import activate, active_version, rollback

    read_adapters(args.model)  # refuses a folder that is not a model
    if args.action == "list":
        return show(args)
    if args.action == "activate":
        before, now = activate(args.model, args.name, args.force), args.name
    else:
        before, now = rollback(args.model)
    if args.json:
        print_json({"before": before, "active": active_version(args.model)})
    else:
        print(f"active version of {args.model}: {now} (before: {before})")


def show(args: argparse.Namespace) -> None:
    """Print the versions of a model."""
    from samda.models.versions import active_version, describe_versions

    rows = describe_versions(args.model, active_version(args.model))
    if args.json:
        return print_json({"versions": rows})
    head = ("version", "active", "cases", "made from", "created")
    keys = ("name", "active", "cases", "from_version", "created")
    marks = {True: "yes", False: "", None: ""}
    print_table(head, [[marks.get(row[key], row[key]) for key in keys] for row in rows])
