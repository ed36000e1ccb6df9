# SPDX-License-Identifier: Apache-2.0
"""Model folders: load, save, versions, export."""

from samda.models.folder import load_model, save_model
