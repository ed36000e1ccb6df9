# SPDX-License-Identifier: Apache-2.0
"""The version of samda."""

__version__ = "0.1.0"
