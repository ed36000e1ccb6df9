# SPDX-License-Identifier: Apache-2.0
"""Train on one real scan and predict another, from nothing: fetches what it needs and writes a report."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `samda demo`."""
