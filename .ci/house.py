# SPDX-License-Identifier: Apache-2.0
"""Size and imports of the package: modules, lines, and circles of imports (imports inside functions count, those for
type checkers do not). Exits with 1 where there is a circle. `make lint` runs it."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path


def imported(tree: ast.AST) -> Iterator[str]:
    """What `tree` imports when it runs: `package.module` and `package.module.name`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        yield from imported(node)


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in (root / "samda").rglob("*.py")}
    modules = {".".join(p.relative_to(root).with_suffix("").parts): p for p in lines if p.name != "__init__.py"}
    edges = {name: modules.keys() & set(imported(ast.parse(path.read_text("utf-8")))) for name, path in modules.items()}
    print(f"samda: {len(modules)} modules, {sum(lines.values())} lines")
    try:
        graphlib.TopologicalSorter({name: below - {name} for name, below in edges.items()}).prepare()
    except graphlib.CycleError as error:
        print("circle of imports:", " <- ".join(error.args[1]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
