# SPDX-License-Identifier: Apache-2.0
"""Scans in, cases and slices out; knows no network.

The names below are what bundle configs refer to; modules may move behind them. What cannot be used is refused: a file,
scan or data set with InputError, a setting with UsageError, in one line that names it and the remedy.
"""

from __future__ import annotations

from samda.data.datalists import DataList, find_cases, find_pairs, read_datalist
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
    "read_datalist",
    "read_scan",
    "split",
]
