# SPDX-License-Identifier: Apache-2.0
"""samda: SAM adapters for medical image segmentation. Research use only.

The names below are the public API. Each is imported when it is first used, so `import samda` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from samda.version import __version__

if TYPE_CHECKING:  # the aliases mark what is exported
    from samda.adaptation import Adaptation as Adaptation
    from samda.adapters import ADAPTERS as ADAPTERS
    from samda.adapters import attach as attach
    from samda.adapters import build_configs as build_configs
    from samda.adapters import count_parameters as count_parameters
    from samda.adapters import detach as detach
    from samda.adapters import merge as merge
    from samda.adapters import unmerge as unmerge
    from samda.errors import AdapterError as AdapterError
    from samda.errors import InputError as InputError
    from samda.errors import SamdaError as SamdaError
    from samda.errors import UsageError as UsageError
    from samda.errors import WeightsError as WeightsError
    from samda.examples import fetch_examples as fetch_examples
    from samda.inference.evaluate import evaluate as evaluate
    from samda.inference.predict import Predictor as Predictor
    from samda.inference.predict import predict_folder as predict_folder
    from samda.inference.volume import VolumeInferer as VolumeInferer
    from samda.models.export import export_model as export_model
    from samda.models.folder import load_model as load_model
    from samda.models.folder import save_model as save_model
    from samda.networks.segmenter import SamSegmenter as SamSegmenter
    from samda.networks.weights import fetch_weights as fetch_weights
    from samda.task import Task as Task
    from samda.training import train as train

_PLACES = {
    "samda.adaptation": ("Adaptation",),
    "samda.adapters": ("ADAPTERS", "attach", "build_configs", "count_parameters", "detach", "merge", "unmerge"),
    "samda.examples": ("fetch_examples",),
    "samda.task": ("Task",),
    "samda.errors": ("AdapterError", "InputError", "SamdaError", "UsageError", "WeightsError"),
    "samda.inference.evaluate": ("evaluate",),
    "samda.inference.predict": ("Predictor", "predict_folder"),
    "samda.inference.volume": ("VolumeInferer",),
    "samda.models.export": ("export_model",),
    "samda.models.folder": ("load_model", "save_model"),
    "samda.networks.segmenter": ("SamSegmenter",),
    "samda.networks.weights": ("fetch_weights",),
    "samda.training": ("train",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'samda' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
