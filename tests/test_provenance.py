# SPDX-License-Identifier: Apache-2.0
"""Hashes that mean the same everywhere, and messages without names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from samda import provenance as records


def test_hashes_of_values() -> None:
    # canonical JSON: sorted keys, no spaces
    assert records.sha256_of({"b": 1, "a": [1.5, None]}) == hashlib.sha256(b'{"a":[1.5,null],"b":1}').hexdigest()
    assert records.sha256_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hashes_of_arrays_know_shape_and_type() -> None:
    a = np.arange(6, dtype=np.uint8).reshape(2, 3)
    expected = hashlib.sha256(b'["uint8",[2,3]]' + bytes(range(6))).hexdigest()
    assert records.sha256_of(a) == expected == records.sha256_of(np.asfortranarray(a))
    assert len({records.sha256_of(x) for x in (a, a.reshape(3, 2), a.astype(np.int16))}) == 3


def test_hashes_of_tensors_know_their_names() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert records.tensors_sha256({"a": x, "b": y}) == records.tensors_sha256({"b": y, "a": x})
    assert records.tensors_sha256({"a": x, "b": y}) != records.tensors_sha256({"a": y, "b": x})


def test_a_series_keeps_its_hash_under_other_file_names(tmp_path: Path) -> None:
    for folder, names in (("one", ("1.dcm", "2.dcm")), ("two", ("b", "a"))):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, (b"first", b"second"), strict=True):
            (tmp_path / folder / name).write_bytes(content)
    (tmp_path / "two" / ".hidden").write_bytes(b"x")
    assert records.path_sha256(tmp_path / "one") == records.path_sha256(tmp_path / "two")
    (tmp_path / "two" / "a").write_bytes(b"third")
    assert records.path_sha256(tmp_path / "one") != records.path_sha256(tmp_path / "two")
    assert records.path_sha256(tmp_path / "one" / "1.dcm") == hashlib.sha256(b"first").hexdigest()


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("a scan of data/a.nii.gz, 'a' has a NaN", ("data/a.nii.gz", "a.nii.gz", "a"), "a scan of X, 'X' has a NaN"),
        ("case a: a.nii.gz cannot be read", ("a.nii.gz", "a"), "case X: X cannot be read"),
        ("another scan in the way of the anna_2", ("the", "anna"), "another scan in X way of X X_2"),
        ("case case-1 and case", ("case-1", "case"), "X X and X"),
        ("nothing to hide", ("", "anna"), "nothing to hide"),
    ],
)
def test_a_message_without_names_keeps_its_words(text: str, names: tuple[str, ...], expected: str) -> None:
    assert records.conceal({"error": [text]}, dict.fromkeys(names, "X")) == {"error": [expected]}


def test_longer_names_come_first() -> None:
    names = {"/data/jane_doe.nii.gz": "case-1", "jane_doe": "case-1", "jane_doe_2": "case-2", "b": "case-3"}
    value = {"jane_doe": ["cannot read /data/jane_doe.nii.gz", "b", "bad jane_doe_2"], "n": 3, "none": None}
    expected = {"case-1": ["cannot read case-1", "case-3", "bad case-2"], "n": 3, "none": None}
    assert records.conceal(value, names) == expected
