# SPDX-License-Identifier: Apache-2.0
"""What is declared for the wheel and the environment is what the tree holds."""

from __future__ import annotations

import fnmatch
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import samda
from samda.io import packaged
from samda.training.tracking import OLDEST_MLFLOW

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
IGNORED = ("__pycache__", ".DS_Store")


def data_files() -> list[Path]:
    """All files below the three packaged folders that are no Python, relative to the root."""
    files = [path for top in ("samda", "configs", "bundles") for path in (ROOT / top).rglob("*") if path.is_file()]
    return [p.relative_to(ROOT) for p in files if p.suffix not in (".py", ".pyc") and not set(p.parts) & set(IGNORED)]


def test_every_folder_with_content_is_a_declared_package() -> None:
    modules = {path.parent.relative_to(ROOT) for path in (ROOT / "samda").rglob("*.py")}
    folders = modules | {path.parent for path in data_files()}
    names = {".".join(folder.parts) for folder in folders}
    expected = {name if name.startswith("samda") else f"samda.{name}" for name in names}
    declared = set(SETUPTOOLS["packages"])
    assert expected <= declared
    assert declared - expected <= {"samda.configs", "samda.bundles"}  # parents without files of their own


def test_every_data_file_matches_a_pattern() -> None:
    patterns = SETUPTOOLS["package-data"]["*"]
    assert [path for path in data_files() if not any(fnmatch.fnmatch(path.name, p) for p in patterns)] == []


def test_packaged_files_are_found() -> None:
    assert packaged("bundles", "sam_segmentation", "configs", "train.json").is_file()
    with pytest.raises(FileNotFoundError, match="configs/nowhere"):
        packaged("configs", "nowhere")


def test_constraints_pin_every_requirement_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    groups = [
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *(PROJECT["project"]["optional-dependencies"][name] for name in ("test", "dev")),
    ]
    for requirement in (r for group in groups for r in group):
        name = re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower().replace("_", "-")
        assert name == "samda" or name in pins, requirement
    assert pins["torch"] == "2.14.1"
    assert pins["torchvision"] == "0.29.1"
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]  # Linux only, by torch itself


def test_what_the_environments_of_integration_add_is_pinned_once_and_agrees() -> None:
    """They come on top of samda's environment, so they must not repeat its packages."""
    own = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line}
    for name, program in (("monailabel", "monailabel==0.8.5"), ("mlflow", "mlflow==3.17.2")):
        lines = (ROOT / "integration" / f"{name}.txt").read_text("utf-8").splitlines()
        pins = [line for line in lines if line and line[0] != "#"]
        assert program in pins and all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", pin) for pin in pins)
        assert len({pin.split("==")[0] for pin in pins}) == len(pins)
        replaced = {"pydicom"} if name == "monailabel" else set()  # the head of its file says why
        assert own & {pin.split("==")[0] for pin in pins} == replaced
    extra = PROJECT["project"]["optional-dependencies"]["mlflow"]
    assert extra == [f"mlflow>={OLDEST_MLFLOW}"]


def test_public_names_exist_and_import_lazily() -> None:
    code = "import sys, samda; print('torch' in sys.modules, samda.Task.__module__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert done.stdout == "False samda.task False\n"
    for name in samda.__all__:
        assert getattr(samda, name) is not None
    for module, names in samda._PLACES.items():
        for name in names:
            assert getattr(samda, name) is getattr(importlib.import_module(module), name)
    assert set(dir(samda)) == set(samda.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Segmenter'"):
        samda.Segmenter  # noqa: B018
