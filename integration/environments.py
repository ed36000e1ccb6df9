# SPDX-License-Identifier: Apache-2.0
"""Environments for programs that samda works with but does not depend on: made once, kept in the cache folder.

Each is a virtual environment whose own packages come first and samda's environment behind them, so that PyTorch and
MONAI are those that samda is tested with, and are not installed again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock  # PyTorch brings it along

from samda.io import cache_dir

__all__ = ["HERE", "environment", "surroundings"]

HERE = Path(__file__).resolve().parent
MINUTES = 20  # for an installation


def environment(name: str, lists: Path = HERE) -> Path:
    """The Python interpreter of the environment `name`, made from `name`.txt in `lists` where it is missing.

    A list that changes, or another Python or place of samda's own environment, makes a new one.

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired: pip failed.
    """
    wanted = lists / f"{name}.txt"
    below = sysconfig.get_path("purelib")
    key = hashlib.sha256("\n".join([wanted.read_text("utf-8"), sys.version, below]).encode()).hexdigest()[:12]
    folder = cache_dir() / "integration" / f"{name}-{key}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two processes may want it at once
        if not (folder / "complete").exists():
            _make(name, folder, python, wanted, below)
    return python


def _make(name: str, folder: Path, python: Path, wanted: Path, below: str) -> None:
    print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=60 * MINUTES)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, encoding="utf-8", check=True,
    ).stdout.strip()  # fmt: skip
    (Path(own) / "samda_below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", wanted]
    done = subprocess.run([*map(str, pip)], stderr=subprocess.PIPE, encoding="utf-8", timeout=60 * MINUTES)
    sys.stderr.write(done.stderr)
    done.check_returncode()
    (folder / "complete").touch()


def surroundings(**more: str) -> dict[str, str]:
    """Environment variables of a program under test: one thread, so that numbers repeat; this checkout importable."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))} | more
