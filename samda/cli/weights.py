# SPDX-License-Identifier: Apache-2.0
"""Fetch base weights, or list them.

  samda weights          list
  samda weights vit_t    fetch, if they are not there, and print the path

A machine without a network takes the file by hand: put it at the place that the list shows.
"""

from __future__ import annotations

import argparse
from typing import Any

from samda.cli.options import add_shared, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `samda weights`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="vit_t, vit_b, vit_l or vit_h")
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> None:
    """Fetch one, or list all."""
    if args.name is not None:
        from samda.networks.weights import fetch_weights

        path = fetch_weights(args.name)
        if args.json:
            print_json({"name": args.name, "path": path})
        else:
            print(path)
        return
    known = list_weights()
    if args.json:
        print_json(known)
        return
    for name, entry in known.items():
        print(f"{name}  {'cached' if entry['cached'] else 'not in the cache'}")
        print(f"  path       {entry['path']}")
        print(f"  published  {entry['published']['address']}\n  sha256     {entry['published']['sha256']}")


def list_weights() -> dict[str, dict[str, Any]]:
    """The known base weights by backbone: cached or not, where, and what is published."""
    from samda.networks.weights import CONVERTED, KNOWN_FILES

    known = {}
    for name, file in KNOWN_FILES.items():
        places = [file.path, file.path.with_name(CONVERTED)] if name == "vit_t" else [file.path]
        cached = next((path for path in places if path.exists()), None)
        known[name] = {
            "cached": cached is not None,
            "path": cached or file.path,
            "published": {"address": file.address, "sha256": file.sha256},
        }
    return known
