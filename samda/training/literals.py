# SPDX-License-Identifier: Apache-2.0
"""Values in MONAI's configs: names and paths that people chose must not be read as config syntax.

MONAI evaluates texts that begin with `$`, resolves `@key` and `%file`, replaces `#` in every text, and calls the
`_target_` of a mapping. Every value that samda puts into a config or into metadata.json passes :func:`literal`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samda.errors import UsageError
from samda.io import plain

SYNTAX = re.compile(r"^[$@%]|#|[@%]::")  # in a text
KEY_SYNTAX = re.compile(r"[$@%#]|::|^[_+~]")  # in a key
ESCAPES = str.maketrans({"#": "\\x23", "@": "\\x40", "%": "\\x25"})


def literal(value: Any) -> Any:
    """A value that MONAI's config takes as it is.

    A text with config syntax, and a mapping with such a key, become an expression that evaluates to themselves.
    """
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, Mapping):
        if any(KEY_SYNTAX.search(str(key)) for key in value):
            return "$" + repr(plain(value)).translate(ESCAPES)
        return {key: literal(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [literal(entry) for entry in value]
    if isinstance(value, str) and SYNTAX.search(value):
        return "$" + repr(value).translate(ESCAPES)
    return value


def decoded(value: Any) -> Any:
    """The value that :func:`literal` has escaped; other expressions are left alone."""
    if isinstance(value, Mapping):
        return {key: decoded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [decoded(entry) for entry in value]
    if isinstance(value, str) and value.startswith("$"):
        try:
            return ast.literal_eval(value[1:])
        except (SyntaxError, ValueError):
            return value
    return value


def refuse_syntax(values: Any, file: Path) -> None:
    """Refuse config syntax in a file whose values are data; nothing is evaluated."""
    remedy = "an adapter file holds plain values; give expressions as --set KEY=VALUE"
    if isinstance(values, Mapping):
        for key, entry in values.items():
            if any(KEY_SYNTAX.search(part) for part in str(key).split("::")):
                raise UsageError(f"{file}: the key {key!r} is config syntax; {remedy}")
            refuse_syntax(entry, file)
    elif isinstance(values, list | tuple):
        for entry in values:
            refuse_syntax(entry, file)
    elif isinstance(values, str) and SYNTAX.search(values):
        raise UsageError(f"{file}: the text {values!r} is config syntax; {remedy}")
