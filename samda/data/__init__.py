# SPDX-License-Identifier: Apache-2.0
"""Data sets, cases, scans and slices; independent of networks.

Bundle configs refer to the names below. Files, scans and data sets that cannot be used raise InputError, invalid
settings UsageError.
"""

from __future__ import annotations

from samda.data.datalists import DataList, find_cases, find_pairs, read_datalist
from samda.data.folders import join_channels
from samda.data.labels import MapLabelsd
from samda.data.readers import read_scan
from samda.data.slices import SliceGrid
from samda.data.splits import Split, split
from samda.data.transforms import build_augmentation, build_preprocessing

__all__ = [
    "DataList",
    "MapLabelsd",
    "SliceGrid",
    "Split",
    "build_augmentation",
    "build_preprocessing",
    "find_cases",
    "find_pairs",
    "join_channels",
    "read_datalist",
    "read_scan",
    "split",
]
