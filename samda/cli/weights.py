# SPDX-License-Identifier: Apache-2.0
"""List or download base weights.

  samda weights          list
  samda weights vit_t    download, if not in the cache, and print the path

Without a network connection, copy the file to the path shown in the list.
"""

from __future__ import annotations

import argparse
from typing import Any

from samda.cli.options import add_shared, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `samda weights`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="vit_t, vit_b, vit_l or vit_h")
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> None:
    """Run `samda weights`."""
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
    """Known base weights by backbone: path, address, sha256, and whether they are cached."""
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
