# SPDX-License-Identifier: Apache-2.0
"""Print the exact versions of everything samda needs, as installed in the environment that runs this script.

`make constraints` writes the result to constraints.txt. What torch itself pins (CUDA libraries, triton) is left out: it
exists on Linux only, and torch's own metadata fixes it.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("export", "dicom", "test", "dev")
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")
HEADER = """\
# The tested versions of everything that samda needs, directly or through another package.
# Written by `make constraints`; `make test`, `make demo` and .ci/run install exactly these."""


def declared() -> list[str]:
    """The requirements of pyproject.toml, those of `EXTRAS` and of the build included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    extras = [optional[name] for name in EXTRAS]
    return [*project["build-system"]["requires"], *project["project"]["dependencies"], *(r for e in extras for r in e)]


def wanted(requirement: Requirement, extras: set[str]) -> bool:
    """Does this requirement apply here, given the extras asked of the package that names it?"""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def closure(requirements: list[str]) -> Iterator[tuple[str, str]]:
    """Name and version of each requirement and of all that it needs, each once."""
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name == "samda" or name.startswith(PINNED_BY_TORCH) or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"constraints: {name} is required but not installed; run `make venv` first")
        yield name, package.version.partition("+")[0]
        needs = [Requirement(text) for text in package.requires or ()]
        queue.extend(need for need in needs if wanted(need, set(extras)))


if __name__ == "__main__":
    print(HEADER)
    for name, version in sorted(set(closure(declared()))):
        print(f"{name}=={version}")
