# SPDX-License-Identifier: Apache-2.0
"""Scans in, cases and slices out; knows no network."""
