# SPDX-License-Identifier: Apache-2.0
"""The version of samda, the one place that states it."""

__version__ = "0.1.0"
