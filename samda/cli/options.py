# SPDX-License-Identifier: Apache-2.0
"""Argument parser, options shared by several commands, and parsing of their values.

Abbreviated options are not accepted. Errors suggest the nearest valid name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from samda.errors import InputError, UsageError, nearest
from samda.io import shipped_tasks, text_table
from samda.processes import launched, local_device

# names of options in other tools and commands, for which the nearest spelling would be a wrong suggestion
ALIASES = {"--lr": "--learning-rate", "--report": "--records"}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`samda.errors.UsageError` instead of ending the process."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; argparse would print the usage and exit."""
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


SHARED: dict[str, dict[str, Any]] = {  # option -> arguments of argparse
    "--model": {"type": Path, "required": True, "metavar": "MODEL", "help": "model folder"},
    "--input": {"type": Path, "required": True, "metavar": "SCANS", "help": "scan, folder of scans, or data set"},
    "--output": {"type": Path, "required": True},
    "--section": {"choices": ("training", "validation", "test"), "help": "section of a data set; default test"},
    "--version": {"metavar": "NAME", "help": "version of the model (samda site); default: the active one"},
    "--weights": {"type": Path, "metavar": "FILE", "help": "base weights; default: those of the training"},
    "--modality": {"choices": ("CT", "MR"), "help": "modality of the scans, if other than that of the training"},
    "--keep-largest": {
        "metavar": "CLASSES",
        "help": "keep only the largest 3-D component of these classes (liver,spleen), all or none; default: the task's",
    },
    "--profile": {"action": "store_true", "help": "show at the end where the time went, also in the report"},
    "--output-format": {
        "default": "nifti",
        "metavar": "FORMATS",
        "help": "nifti, and for DICOM series dicom-seg, dicom-seg-labelmap, rtstruct, joined by commas; default nifti",
    },
    "--part": {"metavar": "I/N", "help": "process part I of N, for job arrays; not needed with torchrun"},
    "--report": {
        "type": Path,
        "metavar": "FILE",
        "help": "write versions, hashes, times, peak memory and outcome as JSON, also on failure",
    },
    "--quiet": {"action": "store_true", "help": "print only the result, warnings and errors"},
    "--device": {
        "default": "auto",
        "metavar": "DEVICE",
        "help": "cpu, cuda, cuda:1, mps; auto uses a GPU if there is one",
    },
    "--json": {"action": "store_true", "help": "print the result as JSON; messages go to standard error"},
}
SHORT = {"--model": "-m", "--input": "-i", "--output": "-o"}


def add_shared(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Add options that several commands share: `add_shared(parser, "--input", metavar="LABELS")`."""
    for name in names:
        flags = (SHORT[name], name) if name in SHORT else (name,)
        parser.add_argument(*flags, **SHARED[name] | changes)


def pick_device(name: str) -> str:
    """The torch device of `--device`, refused if not available; each process of torchrun has its own GPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched()[1] > 1:
        return str(local_device())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown; choose from auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name!r} is not available ({torch.cuda.device_count()} CUDA devices); use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name!r} is not available; use cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name!r} is not supported; choose from auto, cpu, cuda, cuda:N, mps")
    return name


def existing(path: Path, what: str) -> Path:
    """`path`, refused if it does not exist."""
    if not path.exists():
        from samda.data.dicom_files import is_series

        if is_series(path):  # FOLDER/UID, one of several in a folder
            return path
        raise InputError(f"{what} {str(path)!r} does not exist; check the path")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{what} {str(path)!r} is neither a file nor a folder; give one of them")
    return path


def check_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written; its folder is created if missing."""
    from samda.output import try_writing

    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is a pipe or a device; give a file")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        try_writing(path.absolute().parent)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written ({error.strerror}); give another") from error


def positive(text: str) -> int:
    """A positive integer (an argparse type)."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def task_file(name: str) -> Path:
    """The file of a task, given as a path or as the name of a task of samda."""
    ours = shipped_tasks()
    if name in ours:
        return ours[name]
    if Path(name).suffix not in (".yaml", ".yml", ".json"):
        raise UsageError(f"task {name!r} is neither a YAML or JSON file nor a task of samda; {nearest(name, ours)}")
    return existing(Path(name), "task file")


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` texts (`--set`): values are YAML, see :func:`samda.io.load_yaml`; duplicate keys are refused."""
    import yaml

    from samda.io import load_yaml

    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text!r}: write KEY=VALUE, for example epochs=20")
        if key in settings:
            raise UsageError(f"--set {key}: given twice; keep one")
        try:
            settings[key] = load_yaml(value)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or "see yaml.org"
            raise UsageError(f"--set {text!r}: the value is not YAML ({why}); quote or repair it") from None
    return settings


def print_json(value: Any) -> None:
    """Print JSON; NaN and infinity become null."""
    from samda.io import plain

    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns: the first left-aligned, the others right-aligned."""
    cells = [list(head), *([f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows)]
    print("\n".join(text_table(cells)))


def say(line: str) -> None:
    """Print a message that is not part of the result to standard error, unless `--quiet`."""
    from samda import progress

    if not progress.is_quiet():
        progress.line(line)
