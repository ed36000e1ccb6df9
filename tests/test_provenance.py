# SPDX-License-Identifier: Apache-2.0
"""Names that may be those of patients do not leave in a text."""

from __future__ import annotations

from samda.provenance import conceal


def test_conceal() -> None:
    names = {"/data/jane_doe.nii.gz": "case-1", "jane_doe": "case-1", "jane_doe_2": "case-2", "b": "case-3"}
    value = {"jane_doe": ["cannot read /data/jane_doe.nii.gz", "b", "bad jane_doe_2"], "n": 3, "none": None}
    assert conceal(value, names) == {"case-1": ["cannot read case-1", "case-3", "bad case-2"], "n": 3, "none": None}
