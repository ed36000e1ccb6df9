# SPDX-License-Identifier: Apache-2.0
"""Where files lie: packaged configs and bundles (in the wheel or the checkout), and the cache of what is fetched."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "packaged", "shipped_tasks"]


def packaged(*parts: str) -> Path:
    """Path of a packaged file or folder, for instance `packaged("bundles", "sam_segmentation")`.

    Raises:
        FileNotFoundError: neither the wheel nor the checkout holds it.
    """
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"{'/'.join(parts)} is not part of this installation of samda; reinstall it")


def shipped_tasks() -> dict[str, Path]:
    """The task files that come with samda, by their names."""
    return {path.stem: path for path in packaged("configs", "tasks").glob("*.yaml")}


def cache_dir() -> Path:
    """Folder of everything samda fetches: `SAMDA_CACHE`, else `XDG_CACHE_HOME/samda`, else `~/.cache/samda`."""
    chosen = os.environ.get("SAMDA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samda"
