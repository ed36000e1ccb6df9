# SPDX-License-Identifier: Apache-2.0
"""Which version of a model is active, and who may change that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samda.errors import InputError, UsageError
from samda.models import versions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("a", "b", ".partial-x"):
        (tmp_path / "versions" / name).mkdir(parents=True)
        (tmp_path / "versions" / name / "adapter.json").write_text("{}")
    return tmp_path


def test_source_is_active_until_told_otherwise(model: Path) -> None:
    assert versions.list_versions(model) == ["source", "a", "b"]
    assert versions.active_version(model) == "source" and versions.version_folder(model) == model
    assert not (model / "versions" / "active.json").exists()


def test_activate_and_roll_back_step_by_step(model: Path) -> None:
    assert versions.activate(model, "a", force=True) == "source"
    assert versions.activate(model, "b", force=True) == "a"
    assert versions.activate(model, "b", force=True) == "b", "changes nothing"
    assert versions.version_folder(model) == model / "versions" / "b"
    assert versions.rollback(model) == ("b", "a")
    assert versions.rollback(model) == ("a", "source")
    with pytest.raises(UsageError, match="there is none before it"):
        versions.rollback(model)
    log = json.loads((model / "versions" / "active.json").read_text("utf-8"))["history"]
    assert [(s["from"], s["to"]) for s in log] == [
        ("source", "a"),
        ("a", "b"),
        ("b", "a"),
        ("a", "source"),
    ]


def test_unknown_versions_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="no version 'c'"):
        versions.activate(model, "c", force=True)
    assert versions.active_version(model) == "source"


def test_a_version_that_is_gone_is_not_replaced_in_silence(model: Path) -> None:
    versions.activate(model, "a", force=True)
    (model / "versions" / "a" / "adapter.json").unlink()
    with pytest.raises(InputError, match="active version 'a'"):
        versions.active_version(model)


@pytest.mark.parametrize("text", ["{", "[]", '{"stack": 3}', json.dumps({"stack": ["a"]})])
def test_a_damaged_pointer_is_refused(model: Path, text: str) -> None:
    (model / "versions" / "active.json").write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        versions.active_version(model)


@pytest.mark.parametrize("name", ["source", "", "..", "a/b", ".hidden", "x" * 65, "two words"])
def test_names_are_folder_names(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a version"):
        versions.check_name(name)
    assert versions.check_name("clinic-A.2") == "clinic-A.2"
