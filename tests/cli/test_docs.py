# SPDX-License-Identifier: Apache-2.0
"""What README and docs tell people to type exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

import samda
from samda.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, comments and joined lines resolved."""
    text = "".join(body for language, body in blocks(page) if language in ("", "sh", "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith(("samda ", "make "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_samda_commands_parse(page: Path) -> None:
    parser = build_parser()
    for line in commands(page):
        if line[0] == "samda" and "COMMAND" not in line and not {"--help", "--version"} & set(line):
            assert parser.parse_args(line[1:]).command in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split())
    for line in commands(page):
        if line[0] == "make":
            assert {word for word in line[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_uses_public_names(page: Path) -> None:
    for language, body in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "samda":
                assert node.attr in samda.__all__, node.attr
            if isinstance(node, ast.ImportFrom) and node.module == "samda":
                assert {alias.name for alias in node.names} <= set(samda.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_readme_names_the_two_commands_and_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ["make", "demo"] in commands(ROOT / "README.md")
    assert ["make", "test"] in commands(ROOT / "README.md")
    assert "Research use only" in text
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"`samda {name}`" in reference


def test_readme_tree_is_the_tree() -> None:
    body = next(body for language, body in blocks(ROOT / "README.md") if body.startswith("samda/\n"))
    package, rest = body.split("configs/", 1)
    shown = {line.split()[0].rstrip("/") for line in package.splitlines()[1:]}
    inside = {path.name for path in (ROOT / "samda").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert shown == inside - {"__init__.py", "__main__.py", "version.py"}
    for line in ("configs/" + rest).splitlines():
        assert (ROOT / line.split()[0]).is_dir()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_what_the_code_says(generate: ModuleType) -> None:
    committed = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").splitlines()
    current = generate.reference().splitlines()
    changed = next(((a, b) for a, b in zip(committed, current, strict=False) if a != b), None)
    assert changed is None and len(committed) == len(current), f"run `make docs`; first difference: {changed}"


def test_every_setting_has_a_meaning(generate: ModuleType) -> None:
    meanings = generate.config_meanings()
    assert generate.config_keys().keys() == meanings.keys()
    assert all(meanings.values())
    for kind in (samda.Task, *samda.ADAPTERS.values()):
        for field in dataclasses.fields(kind):
            assert field.name == "name" or generate.comment(kind, field.name), f"{kind.__name__}.{field.name}"


def test_the_bundle_page_states_the_defaults(generate: ModuleType) -> None:
    page = (ROOT / "bundles" / "sam_segmentation" / "docs" / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE))
    for key, value in generate.config_keys().items():
        if isinstance(value, bool | int | float):
            assert json.loads(stated[key]) == value, key
        elif value is None or key == "device":
            assert not stated[key].startswith("`"), key
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            assert stated[key].strip("`") == text, key


DOCSTRING = """Purpose of :func:`samda.train`, with ``code``.

More,
in two lines.

    y = x + 1

  samda info -m model     show it

======= ====== ======
name    first  second
======= ====== ======
`a`     one    two
               three
======= ====== ======

Args:
    x, y: numbers
        in mm.
    **more: others: any.

Returns:
    A thing,
    or none.

Raises:
    InputError: never.

Example:
    >>> f(1)  # doctest: +SKIP
    2
"""
MARKDOWN = """Purpose of `samda.train`, with `code`.

More,
in two lines.

```
y = x + 1
```

```
samda info -m model  # show it
```

| name | first | second |
| --- | --- | --- |
| `a` | one | two three |

**Args**

* `x`, `y`: numbers in mm.
* `**more`: others: any.

**Returns**

A thing, or none.

**Raises**

* `InputError`: never.

**Example**

```pycon
>>> f(1)
2
```"""


def test_docstrings_become_markdown(generate: ModuleType) -> None:
    assert generate.markdown(DOCSTRING) == MARKDOWN


def test_the_picture_shows_every_layer() -> None:
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg")
    (layers,) = picture.findall(".//*[@id='layers']")
    shown = {name for text in layers if text.get("class") == "name left" for name in text.text.split(", ")}
    inside = {path.stem for path in (ROOT / "samda").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert shown - {"bundles", "configs"} == inside - {"__init__", "__main__"}
    assert "prefers-color-scheme: dark" in picture.find("{*}style").text


def test_reference_is_complete() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in samda.__all__:
        assert name == "__version__" or f"samda.{name}" in text, name
    for field in dataclasses.fields(samda.Task):
        assert f"| `{field.name}` |" in text, field.name
    for name in samda.ADAPTERS:
        assert f"`{name}`" in text, name


def test_what_papers_do_otherwise_is_said_where_a_user_chooses() -> None:
    names = "docs/reference.md", "configs/adapters/salt_256.yaml"
    reference, overlay = (" ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in names)
    assert "second GELU (`act: both` and `pre_act: true`) and dropout 0.1" in reference
    assert "--adapter salt_256,norm" in overlay and "max(1, floor(r k))" in reference
