# SPDX-License-Identifier: Apache-2.0
"""What the rivals share: the slices, environments of their own, programs that run there, and one way to score."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from samda.training.handlers import CaseDice

__all__ = ["Exam", "NotRun", "interpreter", "run_there"]

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Exam:
    """Slices, which of them train and which are scored.

    Attributes:
        images: (N, 1, H, W) in [0, 1].
        labels: (N, 1, H, W) class indices.
        train: slices that train.
        test: slices that are scored.
        num_classes: background included.
    """

    images: torch.Tensor
    labels: torch.Tensor
    train: list[int]
    test: list[int]
    num_classes: int

    def scores(self, predicted: torch.Tensor) -> dict[str, Any]:
        """Dice of the scored slices, pooled over all of them.

        Args:
            predicted: (n, H, W) class indices, in the order of `test`.

        Returns:
            {"dice": one value per foreground class, None for one that nobody shows, "mean": of the others}, rounded.
        """
        metric = CaseDice([str(k) for k in range(self.num_classes)])
        for one, label in zip(predicted, self.labels[self.test], strict=True):
            metric.update(F.one_hot(one.long(), self.num_classes).movedim(-1, 0)[None], label[None], [0])
        dice = list(metric.per_class().values())
        found = [value for value in dice if value is not None]
        return {
            "dice": [None if value is None else round(value, 4) for value in dice],
            "mean": round(sum(found) / len(found), 4) if found else None,
        }


class NotRun(RuntimeError):
    """A program of its own, a rival for instance, cannot run here; the message says why."""


def interpreter(name: str) -> Path:
    """Python of the rival's environment, made from `name`.txt beside this file where it is missing.

    Raises:
        NotRun: pip cannot install it.
    """
    try:
        return _environments().environment(name, HERE)
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"{name} cannot be installed: {error}") from error
    except subprocess.CalledProcessError as error:
        raise NotRun(f"{name} cannot be installed: {_last_line(error.stderr) or error}") from error


def run_there(command: Sequence[str | Path], timeout: float | None, **surroundings: str) -> str:
    """Standard output of a program, run on one thread with this checkout importable.

    Args:
        command: the program and its arguments.
        timeout: s of wall time; None waits.
        surroundings: further environment variables.

    Raises:
        NotRun: it failed or took too long; the message ends with its last line.
    """
    words = [str(word) for word in command]
    name = next((Path(word).name for word in words[1:2] if word.endswith(".py")), Path(words[0]).name)
    env = _environments().surroundings(**surroundings)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=env, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"{name} took longer than {timeout:.0f} s") from error
    except OSError as error:
        raise NotRun(f"{name} cannot be started: {error}") from error
    if done.returncode:
        raise NotRun(f"{name} failed ({done.returncode}): {_last_line(done.stderr) or _last_line(done.stdout)}")
    return done.stdout


def _environments() -> ModuleType:
    """The integration tests' helper, which is no part of a package."""
    file = HERE.parents[1] / "integration" / "environments.py"
    spec: Any = importlib.util.spec_from_file_location("samda_environments", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _last_line(text: str | bytes | None) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
