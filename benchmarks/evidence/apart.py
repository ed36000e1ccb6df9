# SPDX-License-Identifier: Apache-2.0
"""Programs in processes and environments of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration.environments import environment, surroundings

HERE = Path(__file__).resolve().parent


class NotRun(RuntimeError):
    """A program cannot run here; the message says why."""


def interpreter(name: str) -> Path:
    """Python of an environment, made from `name`.txt beside this file where it is missing.

    Raises:
        NotRun: pip cannot install it.
    """
    try:
        return environment(name, HERE)
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"{name} cannot be installed: {error}") from error
    except subprocess.CalledProcessError as error:
        raise NotRun(f"{name} cannot be installed: {_last_line(error.stderr) or error}") from error


def run_there(command: Sequence[Any], timeout: float | None, **variables: str) -> str:
    """Standard output of a program, run on one thread with this checkout importable.

    Args:
        command: the program and its arguments.
        timeout: s of wall time; None waits.
        variables: further environment variables.

    Raises:
        NotRun: it failed or took too long; the message ends with its last line.
    """
    words = [str(word) for word in command]
    name = f"samda {words[3]}" if words[1:2] in (["-m"], ["-c"]) and len(words) > 3 else Path(words[0]).name
    try:
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", timeout=timeout, env=surroundings(**variables), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"{name} took longer than {timeout:.0f} s") from error
    except OSError as error:
        raise NotRun(f"{name} cannot be started: {error}") from error
    if done.returncode:
        raise NotRun(f"{name} failed ({done.returncode}): {_last_line(done.stderr) or _last_line(done.stdout)}")
    return done.stdout


def _last_line(text: str | bytes | None) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
