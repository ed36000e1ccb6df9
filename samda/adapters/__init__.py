# SPDX-License-Identifier: Apache-2.0
"""Adapters: methods, and functions to attach, freeze, merge, save and load them."""

from __future__ import annotations

from samda.adapters.adapter_file import AdapterFile as AdapterFile
from samda.adapters.adapter_file import load_adapters as load_adapters
from samda.adapters.adapter_file import read_adapters as read_adapters
from samda.adapters.adapter_file import save_adapters as save_adapters
from samda.adapters.attach import ADAPTERS as ADAPTERS
from samda.adapters.attach import SCOPES as SCOPES
from samda.adapters.attach import attach as attach
from samda.adapters.attach import build_configs as build_configs
from samda.adapters.attach import check_scope as check_scope
from samda.adapters.attach import default_scope as default_scope
from samda.adapters.attach import detach as detach
from samda.adapters.attach import fold as fold
from samda.adapters.attach import scope_parameters as scope_parameters
from samda.adapters.base import Adapter as Adapter
from samda.adapters.base import AdapterConfig as AdapterConfig
from samda.adapters.base import adapter_parameters as adapter_parameters
from samda.adapters.base import attached as attached
from samda.adapters.base import base_parameters as base_parameters
from samda.adapters.base import changes_encoder as changes_encoder
from samda.adapters.base import count_parameters as count_parameters
from samda.adapters.base import disabled as disabled
from samda.adapters.base import freeze as freeze
from samda.adapters.base import is_merged as is_merged
from samda.adapters.base import merge as merge
from samda.adapters.base import regularization as regularization
from samda.adapters.base import sites as sites
from samda.adapters.base import trainable_parameters as trainable_parameters
from samda.adapters.base import unmerge as unmerge
from samda.adapters.baselines import BottleneckConfig as BottleneckConfig
from samda.adapters.baselines import DecoderConfig as DecoderConfig
from samda.adapters.baselines import FullConfig as FullConfig
from samda.adapters.baselines import HeadConfig as HeadConfig
from samda.adapters.intensity import IntensityConfig as IntensityConfig
from samda.adapters.kernel import DkaConfig as DkaConfig
from samda.adapters.kernel import LkaConfig as LkaConfig
from samda.adapters.lora import LoraConfig as LoraConfig
from samda.adapters.norm import NormConfig as NormConfig
from samda.adapters.salt import SaltConfig as SaltConfig
from samda.adapters.sam_da import SamDaConfig as SamDaConfig
from samda.adapters.ssf import SsfConfig as SsfConfig
