# SPDX-License-Identifier: Apache-2.0
"""Where the packaged configs and bundles lie: inside the wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["packaged"]


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
