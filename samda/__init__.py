# SPDX-License-Identifier: Apache-2.0
"""samda: SAM adapters for medical image segmentation. Research use only.

The names below are the public API. They are imported lazily, so `import samda` does not import torch.
"""

from __future__ import annotations

import getpass
import importlib
import os
from typing import TYPE_CHECKING, Any

from samda.version import __version__

if TYPE_CHECKING:  # `as` marks re-exports
    from samda.adaptation import Adaptation as Adaptation
    from samda.adapters import ADAPTERS as ADAPTERS
    from samda.adapters import BottleneckConfig as BottleneckConfig
    from samda.adapters import DecoderConfig as DecoderConfig
    from samda.adapters import DkaConfig as DkaConfig
    from samda.adapters import FullConfig as FullConfig
    from samda.adapters import HeadConfig as HeadConfig
    from samda.adapters import IntensityConfig as IntensityConfig
    from samda.adapters import LkaConfig as LkaConfig
    from samda.adapters import LoraConfig as LoraConfig
    from samda.adapters import NormConfig as NormConfig
    from samda.adapters import SaltConfig as SaltConfig
    from samda.adapters import SamDaConfig as SamDaConfig
    from samda.adapters import SsfConfig as SsfConfig
    from samda.adapters import attach as attach
    from samda.adapters import build_configs as build_configs
    from samda.adapters import count_parameters as count_parameters
    from samda.adapters import detach as detach
    from samda.adapters import disabled as disabled
    from samda.adapters import merge as merge
    from samda.adapters import unmerge as unmerge
    from samda.data import find_cases as find_cases
    from samda.errors import AdapterError as AdapterError
    from samda.errors import InputError as InputError
    from samda.errors import SamdaError as SamdaError
    from samda.errors import UsageError as UsageError
    from samda.errors import WeightsError as WeightsError
    from samda.examples import fetch_examples as fetch_examples
    from samda.inference import Predictor as Predictor
    from samda.inference import VolumeInferer as VolumeInferer
    from samda.inference import evaluate as evaluate
    from samda.inference import predict_folder as predict_folder
    from samda.model import Model as Model
    from samda.model import load as load
    from samda.models import load_model as load_model
    from samda.models import save_model as save_model
    from samda.models.export import export_model as export_model
    from samda.networks.segmenter import SamSegmenter as SamSegmenter
    from samda.networks.weights import fetch_weights as fetch_weights
    from samda.task import Task as Task
    from samda.training import train as train

try:
    getpass.getuser()
except (ImportError, KeyError, OSError):  # a user id without a name, as in containers: PyTorch cannot be imported
    os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "user"

_PLACES = {  # module -> its public names
    module: names.split()
    for module, names in {
        "samda.model": "Model load",
        "samda.training": "train",
        "samda.inference": "Predictor VolumeInferer evaluate predict_folder",
        "samda.adaptation": "Adaptation",
        "samda.models": "load_model save_model",
        "samda.models.export": "export_model",
        "samda.networks.segmenter": "SamSegmenter",
        "samda.networks.weights": "fetch_weights",
        "samda.adapters": "ADAPTERS attach build_configs count_parameters detach disabled merge unmerge "
        "BottleneckConfig DecoderConfig DkaConfig FullConfig HeadConfig IntensityConfig LkaConfig LoraConfig "
        "NormConfig SaltConfig SamDaConfig SsfConfig",
        "samda.data": "find_cases",
        "samda.task": "Task",
        "samda.examples": "fetch_examples",
        "samda.errors": "AdapterError InputError SamdaError UsageError WeightsError",
    }.items()
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'samda' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # cached for the next access
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
