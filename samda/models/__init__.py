# SPDX-License-Identifier: Apache-2.0
"""Model folders: load, save, versions, export."""

from samda.models.folder import load_model as load_model
from samda.models.folder import save_model as save_model
