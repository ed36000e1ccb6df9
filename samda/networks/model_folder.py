# SPDX-License-Identifier: Apache-2.0
"""The path under which model folders written by samda 0.1.0 name the loader; see `samda.models`."""

from samda.models.folder import load_model as load_model
