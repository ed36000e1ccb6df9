# SPDX-License-Identifier: Apache-2.0
"""YAML as people write it: `1e-3` is a number, and a key stands once."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["load_yaml"]

# PyYAML follows YAML 1.1, which reads `1e-3`, `1.5e3` and `-.5` as words; YAML 1.2 and JSON read numbers
FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")


class _Loader(yaml.SafeLoader):
    """Plain values only, as `yaml.safe_load`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; PyYAML alone would keep the last of several equal keys and say nothing."""
        seen: list[Any] = []  # of YAML keys, which a set may not take
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text.

    Raises:
        yaml.YAMLError: it is none, or a key stands twice in a mapping.

    Example:
        >>> load_yaml("{rate: 1e-3, name: 'e1'}")
        {'rate': 0.001, 'name': 'e1'}
    """
    return yaml.load(text, Loader=_Loader)
