# SPDX-License-Identifier: Apache-2.0
"""The audit record: JSON without NaN, and a schema that refuses what it should."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from samda.adaptation import record as records
from samda.errors import InputError
from samda.provenance import now, pseudonym


def test_the_published_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(records.schema())


def test_json_has_no_nan(tmp_path: Path) -> None:
    records.write_lines(tmp_path / "x.jsonl", [{"a": float("nan"), "b": np.float32(0.5), "c": (1, float("inf"))}])
    assert (tmp_path / "x.jsonl").read_text("utf-8") == '{"a":null,"b":0.5,"c":[1,null]}\n'
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
    assert pseudonym("0123456789abcdef") == "case-0123456789ab"
    jsonschema.validate(now(), {"pattern": records.schema()["$defs"]["time"]["pattern"]})


def test_scopes_of_a_record_are_names_joined_by_plus() -> None:
    scope = jsonschema.Draft202012Validator(records.schema()["properties"]["scope"])
    assert all(map(scope.is_valid, ("gate", "gate+norm", "decoder+encoder", "gate+decoder+norm+encoder")))
    assert not any(map(scope.is_valid, ("", "+norm", "gate+", "gatenorm", "gate,norm", "gate+encodr", "all", None)))
