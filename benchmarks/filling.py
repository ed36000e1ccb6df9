# SPDX-License-Identifier: Apache-2.0
"""Pages whose tables are written by a script: everything between `<!-- NAME -->` and `<!-- end -->` is made anew."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["fill"]


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables.

    Raises:
        ValueError: a marker names no table, or a table has no marker.
    """
    named = re.findall(r"<!-- (\w+) -->\n", text)
    if sorted(named) != sorted([*tables, *["end"] * len(tables)]):
        raise ValueError(f"the page has the markers {named}, tables are {', '.join(tables)}")
    for name, content in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->\n)"
        text = re.sub(pattern, lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    return text
