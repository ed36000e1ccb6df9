# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference.md from what the code says of itself: options, docstrings, and comments of settings.

`make docs` runs it, and a test holds the committed page against it. Nothing is written here but the order of the page;
what is wrong on it is put right in the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import samda
from samda import errors
from samda.cli.main import COMMANDS, EXIT_CODES, build_parser
from samda.io import cache_dir, packaged

PAGE = Path(__file__).with_name("reference.md")
SHARED = ("-h", "--json", "--debug", "--device")  # options that mean the same everywhere
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Yields", "Example")
LISTS = ("Args", "Raises", "Attributes")
RESULTS = (  # what the public functions return
    "samda.inference.predict.Prediction",
    "samda.inference.folder.FolderResult",
    "samda.inference.evaluate.Evaluation",
    "samda.adaptation.AdaptedCase",
    "samda.adaptation.AdaptationSettings",
)
HEAD = """\
# Reference

*Written by `make docs` from options and docstrings: change those, not this page.*

[Commands](#commands) · [Exit codes and errors](#exit-codes-and-errors) · [Task](#task) ·
[Training config](#training-config) · [Adapters](#adapters) · [Class heads](#class-heads) ·
[Files of a model](#files-of-a-model) · [Export](#export) · [Scores](#scores) · [Python](#python)
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD, *commands(), *exits(), *task(), *config(), *adapters(), *heads()]
    for title, module in (
        ("Files of a model", "samda.models.folder"),
        ("Export", "samda.models.export"),
        ("Scores", "samda.metrics"),
    ):
        parts += [f"## {title}", markdown(importlib.import_module(module).__doc__)]
        if title == "Scores":
            parts.append(table(("number", "definition"), importlib.import_module(module).DEFINITIONS.items()))
    return "\n\n".join(part.strip("\n") for part in [*parts, *python()]) + "\n"


# ---------------------------------------------------------------------------------------------------- the command line


def commands() -> Iterator[str]:
    """Every command with its options."""
    parser = build_parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    yield "## Commands"
    rows = [(f"[`samda {name}`](#samda-{name})", summary(module)) for name, module in COMMANDS.items()]
    yield table(("command", "does"), rows)
    shared = {action.option_strings[-1]: action for action in subparsers.choices["predict"]._actions}
    rows = [(flags(shared[name]), help_of(shared[name])) for name in ("--help", "--json", "--device", "--debug")]
    yield "Options that mean the same wherever they exist (`samda --version` prints the version):"
    yield table(("option", "meaning"), rows)
    yield markdown(cache_dir.__doc__)
    for name, module in COMMANDS.items():
        yield f"### samda {name}"
        yield markdown(importlib.import_module(module).__doc__)
        own = [a for a in subparsers.choices[name]._actions if not set(a.option_strings) & set(SHARED)]
        also = [f"`{o}`" for a in subparsers.choices[name]._actions for o in a.option_strings if o in SHARED[1:]]
        if own:
            yield table(("option", "meaning"), [(flags(action), help_of(action)) for action in own])
        yield f"Also {', '.join(also)}."


def summary(module: str) -> str:
    """First line of a module's docstring, without the full stop."""
    return (importlib.import_module(module).__doc__ or "").strip().partition("\n")[0].rstrip(".")


def flags(action: argparse.Action) -> str:
    """An option as a person types it: `-m, --model MODEL`."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
    if not action.option_strings:
        shown = value or action.dest
        return code(f"[{shown}]" if action.nargs == "?" else str(shown))
    names = ", ".join(action.option_strings)
    return code(names if action.nargs == 0 or value is None else f"{names} {value}")


def help_of(action: argparse.Action) -> str:
    """The help of an option, and whether it must be given."""
    text = (action.help or "").replace("%%", "%")
    return f"{text} (required)" if action.required and action.option_strings else text


def exits() -> Iterator[str]:
    """Exit codes, and the classes of errors with theirs."""
    yield "## Exit codes and errors"
    yield table(("code", "meaning"), EXIT_CODES.items())
    yield "Every error is one line that names the thing, the value received and the remedy. In Python it is a class:"
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.SamdaError)]
    rows = [
        (code(f"samda.{c.__name__}"), 2 if issubclass(c, errors.UsageError) else 1, one_line(c.__doc__))
        for c in classes
    ]
    yield table(("class", "exit code", "meaning"), rows)


# ---------------------------------------------------------------------------------------------------------- settings


def task() -> Iterator[str]:
    """The keys of a task."""
    yield "## Task"
    yield markdown(samda.Task.__doc__)
    yield settings(samda.Task, "key")
    names = ", ".join(f"`{path.stem}`" for path in sorted(packaged("configs", "tasks").glob("*.yaml")))
    yield f"`--task` takes a YAML or JSON file with these keys, or the name of one that samda ships: {names}."


def config() -> Iterator[str]:
    """The keys of train.json; what they mean stands in the bundle's own page."""
    yield "## Training config"
    yield (
        "`samda train --set KEY=VALUE`, `samda.train(overrides={...})` and MONAI's `--KEY VALUE` set any key of the "
        "bundle's `train.json`; the parts that these keys feed (`train::loss`, `train::optimizer`, ...) can be "
        "replaced in the same way. A key that does not exist is refused with the nearest one that does."
    )
    meanings = config_meanings()
    rows = [(code(key), code(json.dumps(value)), meanings.get(key, "")) for key, value in config_keys().items()]
    yield table(("key", "default", "meaning"), rows)


def config_keys() -> dict[str, Any]:
    """The plain keys of train.json with their defaults: what stands before its first builder."""
    values = json.loads(packaged("bundles", "sam_segmentation", "configs", "train.json").read_text(encoding="utf-8"))
    keys: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "_target_" in value:
            break
        keys[key] = value
    return keys


def config_meanings() -> dict[str, str]:
    """Key -> meaning from the table of the bundle's page: | `key` | default | meaning |."""
    page = packaged("bundles", "sam_segmentation", "docs", "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    return {key: meaning for key, _, meaning in rows}


def adapters() -> Iterator[str]:
    """Every adapter with its settings."""
    from samda.adapters.base import AdapterConfig

    yield "## Adapters"
    yield (
        "Names for `samda.attach` and, with settings, for `adapters` in a config; `samda train --adapter` takes these "
        "names, the overlays below (YAML files whose keys replace those of `train.json`), and files like them. "
        "Every adapter also has `seed`: " + comment(AdapterConfig, "seed") + "."
    )
    overlays = {path.stem: description(path) for path in sorted(packaged("configs", "adapters").glob("*.yaml"))}
    rows = [
        (
            code(name),
            code(f"samda.{kind.__name__}"),
            overlays[name],
            ", ".join(map(code, kind.roles)) or "none of its own",
        )
        for name, kind in samda.ADAPTERS.items()
    ]
    yield table(("adapter", "class of its settings", "what", "sites"), rows)
    yield "Further overlays for `--adapter`:"
    yield table(("overlay", "what"), [(code(k), text) for k, text in overlays.items() if k not in samda.ADAPTERS])
    shown: dict[str, str] = {}
    for name, kind in samda.ADAPTERS.items():
        if len(dataclasses.fields(kind)) > 1:
            yield f"### {name}"
            text = markdown(kind.__doc__ if "baselines" in kind.__module__ else inspect.getmodule(kind).__doc__)
            yield f"See [{shown[text]}](#{shown[text]})." if text in shown else text
            shown.setdefault(text, name)
            yield settings(kind, "setting", without=("seed",))


def heads() -> Iterator[str]:
    """The class heads, with the settings of the one that has some."""
    from samda.networks import head, pyramid_head

    yield "## Class heads"
    yield markdown(head.__doc__)
    yield "`samda train --head` and `samda.SamSegmenter(head=...)` take `pyramid` or `sam` (no settings)."
    yield "### pyramid"
    yield markdown(pyramid_head.__doc__)
    yield settings(pyramid_head.PyramidHeadConfig, "setting")


def description(overlay: Path) -> str:
    """What an overlay says of itself in its head, the commands left out."""
    lines = [line[2:] for line in overlay.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return " ".join(line for line in lines if not line.startswith(("samda ", "python ")))


def settings(kind: type, what: str, without: Iterable[str] = ()) -> str:
    """The fields of a dataclass with default and comment."""
    fields = [field for field in dataclasses.fields(kind) if field.name not in without]
    rows = [(code(field.name), default_of(field), comment(kind, field.name)) for field in fields]
    return table((what, "default", "meaning"), rows)


def default_of(field: dataclasses.Field) -> str:
    """The default of a setting as JSON has it; empty where there is none."""
    if field.default is dataclasses.MISSING:
        return ""
    return code(json.dumps(field.default))


def comment(kind: type, name: str) -> str:
    """The comment behind a field, in the class or the nearest one it derives from that has one."""
    owners = (owner for owner in kind.__mro__ if name in vars(owner).get("__annotations__", {}))
    return next((found for owner in owners if (found := field_comments(owner).get(name))), "")


def field_comments(kind: type) -> dict[str, str]:
    """Field -> the comment at the end of its line."""
    lines, _ = inspect.getsourcelines(kind)
    found, name = {}, None
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.NAME and token.start[1] == 4:
            name = token.string
        elif token.type == tokenize.COMMENT and name and token.start[1] > 4:
            found[name] = token.string.lstrip("# ")
    return found


# ------------------------------------------------------------------------------------------------------------ Python


def python() -> Iterator[str]:
    """Every public name with signature and docstring."""
    yield "## Python"
    yield "Everything that `import samda` offers; nothing heavy is imported before it is used."
    for module, names in samda._PLACES.items():
        for name in names:
            value = getattr(samda, name)
            if inspect.isclass(value) and issubclass(value, errors.SamdaError):
                continue  # in the table of errors
            if value in samda.ADAPTERS.values():
                continue  # in the section on adapters
            yield f"### samda.{name}"
            if name == "ADAPTERS":
                yield f"`dict`, adapter name to the class of its settings: {', '.join(map(code, value))}."
            else:
                yield from describe(value, f"samda.{name}", module)
    yield "## What they return"
    for path in RESULTS:
        module, _, name = path.rpartition(".")
        yield f"### {name}"
        yield from describe(getattr(importlib.import_module(module), name), path, module)


def describe(value: Any, name: str, module: str) -> Iterator[str]:
    """Signature, docstring, and of a class its public methods, also of its bases in samda."""
    yield f"```py\n{signature(value, name)}\n```"
    yield markdown(value.__doc__)
    if not inspect.isclass(value):
        return
    own = [kind for kind in value.__mro__ if kind.__module__.split(".")[0] == "samda"]
    members = {key: member for kind in own[::-1] for key, member in vars(kind).items() if is_public(key, member)}
    for key, member in members.items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not function.__doc__:
            continue
        shown = f"`{key}`" if isinstance(member, property) else f"`{signature(getattr(value, key), key)}`"
        yield f"* **{shown.replace('__call__', 'call')}**\n\n{textwrap.indent(markdown(function.__doc__), '  ')}"


def is_public(key: str, member: Any) -> bool:
    """A method, class method or property that users call; `forward` and `train` are PyTorch's own."""
    known = isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)
    return known and (not key.startswith("_") or key == "__call__") and key not in ("extra_repr", "train")


def signature(value: Callable[..., Any], name: str) -> str:
    """`name(arguments) -> result`, over several lines where it is long."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return name
    arguments = [argument(p) for p in found.parameters.values() if p.name != "self"]
    keyword_only = [p.kind is p.KEYWORD_ONLY for p in found.parameters.values() if p.name != "self"]
    if True in keyword_only and not any(p.kind is p.VAR_POSITIONAL for p in found.parameters.values()):
        arguments.insert(keyword_only.index(True), "*")
    nothing = inspect.isclass(value) or found.return_annotation is found.empty
    result = "" if nothing else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 100 or "." not in name:  # methods stand in a heading
        return line
    return f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def argument(parameter: inspect.Parameter) -> str:
    """`name: type = default`."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    equals = " = " if kind else "="
    default = "" if parameter.default is parameter.empty else f"{equals}{parameter.default!r}"
    return f"{stars}{parameter.name}{kind}{default}"


# ----------------------------------------------------------------------------------------------- docstrings to Markdown


def markdown(docstring: str | None) -> str:
    """A docstring in Google style as Markdown: sections as bold words, their entries as lists, tables and examples."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(docstring or "")).replace("``", "`")
    return "\n\n".join(block(lines) for lines in blocks(text.splitlines()))


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs; a section with its entries counts as one."""
    current: list[str] = []
    inside = False
    for line in lines:
        starts = line.rstrip(":") in SECTIONS and line.endswith(":")
        if current and (starts or (not line.strip() and not inside) or (inside and line and not line.startswith(" "))):
            yield current
            current, inside = [], False
        if line.strip() or current:
            current.append(line)
        inside = inside or starts
    if any(line.strip() for line in current):
        yield current


def block(lines: list[str]) -> str:
    """One paragraph, section, table or example."""
    name = lines[0].rstrip(":")
    if name in SECTIONS and lines[0].endswith(":"):
        body = textwrap.dedent("\n".join(lines[1:])).strip("\n").splitlines()
        if name == "Example":
            example = "\n".join(line.replace("  # doctest: +SKIP", "") for line in body)
            return f"**Example**\n\n```pycon\n{example}\n```"
        return f"**{name}**\n\n" + (entries(body) if name in LISTS else " ".join(line.strip() for line in body))
    if re.fullmatch(r"=+( =+)+", lines[0]):
        return simple_table(lines)
    if all(line.startswith("  ") for line in lines):
        text = textwrap.dedent("\n".join(lines))
        return "```\n" + re.sub(r"^(samda .*?) {3,}(?=\S)", r"\1  # ", text, flags=re.MULTILINE) + "\n```"
    return "\n".join(lines)


def entries(lines: Iterable[str]) -> str:
    """`name: text` with continued lines, as a list."""
    items: list[str] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line.strip())
    shown = []
    for item in items:
        name, colon, text = item.partition(": ")
        shown.append(f"* {', '.join(map(code, name.split(', ')))}: {text}" if colon else f"* {item}")
    return "\n".join(shown)


def simple_table(lines: list[str]) -> str:
    """reStructuredText's simple table; a row whose first cell is empty goes on with the one above."""
    edges = [match.span() for match in re.finditer("=+", lines[0])]
    edges[-1] = (edges[-1][0], 10**6)
    rows: list[list[str]] = []
    for line in lines[1:]:
        if set(line) <= {"=", " "}:
            continue
        cells = [line[start:end].strip() for start, end in edges]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return table(rows[0], rows[1:])


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Text in code type."""
    return f"`{text}`"


def one_line(docstring: str | None) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(markdown(docstring).split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)
