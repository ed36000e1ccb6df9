# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from samda.errors import InputError, UsageError, nearest
from samda.io import shipped_tasks
from samda.processes import launched, local_device


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, read by :func:`pick_device`."""
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`: the result for programs, on standard output; everything else goes to standard error."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_part(parser: argparse.ArgumentParser) -> None:
    """`--part`, read by :func:`samda.processes.read_part`."""
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="do part I of N, for job arrays; processes that torchrun starts share the cases without it",
    )


def pick_device(name: str) -> str:
    """The torch device that `name` means on this machine; every process of torchrun has a GPU of its own.

    Raises:
        UsageError: no such device, or not on this machine.
    """
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
        raise UsageError(
            f"--device {name!r} is not on this machine ({torch.cuda.device_count()} CUDA devices); use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name!r} is not on this machine; use cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name!r} is not supported; choose from auto, cpu, cuda, cuda:N, mps")
    return name


def existing(path: Path, what: str) -> Path:
    """`path`, if it exists.

    Raises:
        InputError: it does not.
    """
    if not path.exists():
        raise InputError(f"{what} {str(path)!r} does not exist; check the path")
    return path


def check_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work; its folder is made if missing.

    Raises:
        UsageError: it is a folder, or its own folder cannot be made or written to.
    """
    from samda.io import try_writing

    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give a file")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        try_writing(path.absolute().parent)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written ({error.strerror}); give another") from error


def positive(text: str) -> int:
    """A whole number from 1 (an argparse type)."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is needed, got {text!r}")
    return value


def task_file(name: str) -> Path:
    """The file of a task: a path, or the name of one that samda ships.

    Raises:
        UsageError: no such name.
        InputError: no such file.
    """
    ours = shipped_tasks()
    if name in ours:
        return ours[name]
    if Path(name).suffix not in (".yaml", ".yml", ".json"):
        raise UsageError(f"task {name!r} is neither a YAML or JSON file nor one of samda's; {nearest(name, ours)}")
    return existing(Path(name), "task file")


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` texts (`--set`): values are YAML, see :func:`samda.io.load_yaml`.

    Raises:
        UsageError: a text without `=` or key, a value that is no YAML, or a key given twice.
    """
    import yaml

    from samda.io import load_yaml

    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text!r}: write KEY=VALUE, for instance epochs=20")
        if key in settings:
            raise UsageError(f"--set {key}: given twice; keep one")
        try:
            settings[key] = load_yaml(value)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or "see yaml.org"
            raise UsageError(f"--set {text!r}: the value is not YAML ({why}); quote or repair it") from None
    return settings


def add_modality(parser: argparse.ArgumentParser) -> None:
    """Add `--modality`."""
    parser.add_argument(
        "--modality", choices=("CT", "MR"), help="kind of the scans, where it is not that of the training"
    )


def add_keep_largest(parser: argparse.ArgumentParser) -> None:
    """Add `--keep-largest`, read by :func:`samda.inference.postprocessing.override`."""
    parser.add_argument(
        "--keep-largest",
        metavar="CLASSES",
        help="of these classes (liver,spleen) keep the largest 3-D piece only; all, none; default: the model's task",
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`, which :func:`samda.cli.main.main` obeys: the result, warnings and errors only."""
    parser.add_argument("--quiet", action="store_true", help="no progress and no messages but warnings and errors")


def print_json(value: Any) -> None:
    """Print plain JSON; NaN and infinity, which JSON does not have, become null."""
    from samda.io import plain

    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns: the first to the left, numbers to the right."""
    cells = [list(head), *([f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows)]
    rows = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print(
            "  ".join(
                text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )


def say(line: str) -> None:
    """Tell the person something that is not the result: standard error, so that `--json` output stays clean."""
    from samda import progress

    if not progress.is_quiet():
        progress.line(line)
