# SPDX-License-Identifier: Apache-2.0
"""Shared options: what their values mean, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from samda.cli import options
from samda.errors import InputError, UsageError


def test_settings_mean_what_they_look_like() -> None:
    texts = ["a=1", "b=1e-3", "c=true", "d=[1, 2]", "e=word", "train::loss::batch=False", "f=null", "g=x=y", "h='1e3'"]
    texts += ["guard={tolerance: 1e-3, low: -.5}", "i=[1.5e3, 2E2]", "j=089", "k=1e", "l=e3"]
    assert options.parse_settings(texts) == {
        "a": 1,
        "b": 0.001,
        "c": True,
        "d": [1, 2],
        "e": "word",
        "train::loss::batch": False,
        "f": None,
        "g": "x=y",
        "h": "1e3",
        "guard": {"tolerance": 0.001, "low": -0.5},
        "i": [1500.0, 200.0],
        "j": "089",
        "k": "1e",
        "l": "e3",
    }


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["epochs"], "KEY=VALUE"),
        (["=3"], "KEY=VALUE"),
        (["a=1", "a=2"], "given twice"),
        (["a=[1, 2"], "not YAML"),
        (["a={b: 1, b: 2}"], "key 'b'"),
    ],
)
def test_settings_refused(texts: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        options.parse_settings(texts)


def test_positive() -> None:
    assert options.positive("12") == 12
    for text in ("0", "-1", "1.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="got"):
            options.positive(text)


def test_task_by_name_or_file(tmp_path: Path) -> None:
    assert options.task_file("abdomen_ct").name == "abdomen_ct.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("classes: [background, x]")
    assert options.task_file(str(own)) == own
    with pytest.raises(UsageError, match=r"did you mean 'abdomen_ct'\?"):
        options.task_file("abdomen_tc")
    with pytest.raises(InputError, match="does not exist"):
        options.task_file(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_devices_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        options.pick_device(name)


def test_device_kept() -> None:
    assert options.pick_device("cpu") == "cpu"
    assert options.pick_device("auto") in ("cpu", "cuda")


def test_json_is_json(capsys: pytest.CaptureFixture) -> None:
    options.print_json({"a": math.nan, "b": (1, math.inf), "c": Path("x") / "y", 3: {"d": 0.5}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "c": "x/y", "3": {"d": 0.5}}


def test_table_is_aligned(capsys: pytest.CaptureFixture) -> None:
    options.print_table(["name", "n"], [["salt", 1234567], ["x", 8]])
    assert capsys.readouterr().out == "name          n\nsalt  1,234,567\nx             8\n"
