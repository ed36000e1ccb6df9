# SPDX-License-Identifier: Apache-2.0
"""Networks: images to class logits."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from typing import Any


def _postpone(name: str) -> None:
    """Let parts of a package be imported without its `__init__`, which runs once something of the package itself is
    asked for.
    """
    spec = find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    package, loader = module_from_spec(spec), spec.loader

    def run(attribute: str) -> Any:
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = run  # type: ignore[method-assign]
    sys.modules[name] = package


_postpone("segment_anything")  # it imports torchvision, which nothing here needs and which takes as long as PyTorch
