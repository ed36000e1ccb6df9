# SPDX-License-Identifier: Apache-2.0
"""argparse in samda's manner: no abbreviations, and what is refused comes with the nearest valid name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from samda.errors import UsageError, nearest

# what other tools and our own other commands call an option: spelling alone would suggest a wrong one
ALIASES = {"--lr": "--learning-rate", "--report": "--records"}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`samda.errors.UsageError` instead of ending the process."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise the message; argparse would print the usage and exit."""
        raise UsageError(message)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse, but unknown options are refused first: a mistyped `--output` is not a missing `--output`."""
        if args is not None:
            self._check_options(args)
        return super().parse_known_args(args, namespace)

    def _check_options(self, args: Sequence[str]) -> None:
        valid = list(self._option_string_actions)
        for token in args:
            if token == "--" or (self._subparsers and not token.startswith("-")):  # the command checks the rest
                return
            name = token.partition("=")[0]
            if name.startswith("-") and len(name) > 1 and name not in valid and not _is_number(token):
                meant = ALIASES.get(name)
                raise UsageError(f"unknown option {name!r}; {nearest(meant if meant in valid else name, valid)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = action.choices
        if choices is not None and value not in choices:
            raise argparse.ArgumentError(action, f"{value!r} is unknown; {nearest(str(value), map(str, choices))}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
