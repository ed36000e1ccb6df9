# SPDX-License-Identifier: Apache-2.0
"""Hashes that mean the same everywhere, JSON without NaN, and a schema that refuses what it should."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from samda import provenance as records
from samda.errors import InputError


def test_the_published_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(records.schema())


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


def test_json_has_no_nan(tmp_path: Path) -> None:
    records.write_lines(tmp_path / "x.jsonl", [{"a": float("nan"), "b": np.float32(0.5), "c": (1, float("inf"))}])
    assert (tmp_path / "x.jsonl").read_text() == '{"a":null,"b":0.5,"c":[1,null]}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text in ("{", "[1]", "{}"):
        path.write_text(text)
        with pytest.raises(InputError, match="delete its folder and run again"):
            records.read_record(path)


def test_the_schema_refuses_what_it_should() -> None:
    required = {key: None for key in records.schema()["required"]}
    with pytest.raises(InputError, match="case 'x'"):
        records.validate_record(required | {"case_id": "x"})
    with pytest.raises(InputError, match="pixels"):  # no room for pixel data, or for anything that is not named
        records.validate_record({"pixels": [1, 2, 3]})


def test_every_required_field_is_described() -> None:
    published = records.schema()
    assert set(published["required"]) <= set(published["properties"])
    assert json.dumps(published)


def test_times_and_names() -> None:
    assert records.pseudonym("0123456789abcdef") == "case-0123456789ab"
    jsonschema.validate(records.now(), {"pattern": records.schema()["$defs"]["time"]["pattern"]})


def test_scopes_of_a_record_are_names_joined_by_plus() -> None:
    scope = jsonschema.Draft202012Validator(records.schema()["properties"]["scope"])
    assert all(map(scope.is_valid, ("gate", "gate+norm", "decoder+encoder", "gate+decoder+norm+encoder")))
    assert not any(map(scope.is_valid, ("", "+norm", "gate+", "gatenorm", "gate,norm", "gate+encodr", "all", None)))
