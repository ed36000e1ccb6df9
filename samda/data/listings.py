# SPDX-License-Identifier: Apache-2.0
"""Data sets that a file lists: MONAI and MSD datalists, nnU-Net v2's dataset.json, and CSV files of pairs."""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samda.data.formats import PICTURE_SUFFIXES
from samda.data.problems import Problem, Report
from samda.errors import InputError, nearest

__all__ = [
    "SECTIONS",
    "Case",
    "is_pair_list",
    "listed_cases",
    "nnunet_cases",
    "pair_cases",
    "read_channels",
    "read_json",
]

Case = dict[str, Any]
SECTIONS = {"training": "training", "validation": "validation", "test": "test", "testing": "test"}  # key -> section
ALIASES = SECTIONS | {"train": "training", "tr": "training", "val": "validation", "valid": "validation", "ts": "test"}
NNUNET_SPLITS = {"training": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
COLUMNS = ("image", "label", "id", "patient", "fold", "section")
CHANNEL_FILE = re.compile(r"(.+)_(\d{4})")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_channels(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the channels as nnU-Net ("channel_names") or MSD ("modality") states them."""
    names = content.get("channel_names") or content.get("modality")
    return tuple(str(name) for name in names.values()) if isinstance(names, Mapping) and names else None


# --------------------------------------------------------------------------------------------------------- JSON lists


def listed_cases(content: Mapping[str, Any], listing: Path, report: Report) -> dict[str, list[Case]]:
    """The cases that a MONAI or MSD datalist lists; what is wrong with an entry is reported, and the entry left out."""
    cases: dict[str, list[Case]] = {}
    for key, section in SECTIONS.items():
        entries = content.get(key) or []
        if not isinstance(entries, list):
            raise InputError(f"{listing}: {key!r} must be a list of cases, got {type(entries).__name__}")
        for number, entry in enumerate(entries):
            try:
                case = _entry(entry, section, f"{listing}: {key}[{number}]", listing.parent)
            except InputError as error:
                report(Problem("entry", str(error)))
            else:
                cases.setdefault(section, []).append(case)
    return cases


def _entry(entry: Any, section: str, where: str, folder: Path) -> Case:
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, Mapping):
        raise InputError(f'{where} must be {{"image": path, "label": path}}, got {entry!r}')
    case = dict(entry)
    for key in ("image", "label") if section != "test" else ("image",):
        if not case.get(key):
            remedy = "it is empty, give a path" if key in case else nearest(key, map(str, case))
            raise InputError(f"{where} has no {key!r}; {remedy}")
    image, label = case["image"], case.pop("label", None)
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str) and not (isinstance(image, list) and all(isinstance(p, str) for p in image)):
        raise InputError(f"{where}: 'image' must be one path, or a list of one path a channel, got {image!r}")
    case["image"] = str(folder / image) if isinstance(image, str) else [str(folder / path) for path in image]
    if label:
        if not isinstance(label, str):
            raise InputError(f"{where}: 'label' must be one path, got {label!r}; merge the labels into one file")
        case["label"] = str(folder / label)
    if "fold" in case and (isinstance(case["fold"], bool) or not isinstance(case["fold"], int)):
        raise InputError(f"{where}: fold must be a whole number, got {case['fold']!r}")
    for key in ("id", "patient"):
        name = case.pop(key, None)
        if isinstance(name, bool | list | Mapping):
            raise InputError(f"{where}: {key} must be a text or a number, got {name!r}")
        if name is not None and name != "":
            case[key] = str(name)
    if "slices" in case:
        _check_ranges(case["slices"], where)
    return case


def _check_ranges(value: Any, where: str) -> None:
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise InputError(f"{where}: slices must be pairs [[first, end], ...] of whole numbers, got {value!r}")
    ordered = sorted(pairs)
    for before, after in itertools.pairwise(ordered):
        if after[0] < before[1]:  # a slice that is there twice could train and validate
            raise InputError(f"{where}: slices {before} and {after} overlap; join them")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(i) is int for i in value) and value[0] < value[1]


# -------------------------------------------------------------------------------------------------------- nnU-Net v2


def nnunet_cases(content: Mapping[str, Any], listing: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of an nnU-Net v2 folder: `imagesTr/CASE_0000.nii.gz`, `_0001` and so on, and `labelsTr/CASE.nii.gz`."""
    ending = str(content.get("file_ending", ".nii.gz"))
    names = read_channels(content) or ()
    cases: dict[str, list[Case]] = {}
    for section, (images, labels) in NNUNET_SPLITS.items():
        groups = _channel_files(listing.parent / images, ending, report)
        for name, files in groups.items():
            numbers = sorted(files)
            one_file = numbers == [0] and ending.lower() in PICTURE_SUFFIXES  # colors lie in one picture
            count = len(numbers) if one_file else len(names) or max(numbers) + 1
            if numbers[-1] >= count:
                text = f"{files[numbers[-1]]} is channel {numbers[-1]}, {listing.name} names {count} (channel_names)"
                report(Problem("channels", f"{text}; name all channels there", name))
                continue
            if numbers != list(range(count)):
                missing = next(k for k in range(count) if k not in numbers)
                stated = f" ({listing.name} names {len(names)} channels)" if names else ""
                text = f"there is no {listing.parent / images / name}_{missing:04}{ending}{stated}; add it"
                report(Problem("missing", text, name))
                continue
            paths = [str(files[k]) for k in numbers]
            case: Case = {"id": name, "image": paths[0] if len(paths) == 1 else paths}
            label = listing.parent / labels / (name + ending)
            if section == "training" or label.is_file():
                case["label"] = str(label)
            cases.setdefault(section, []).append(case)
        for path in sorted((listing.parent / labels).glob(f"*{ending}")):
            if path.name[: -len(ending)] not in groups:
                report(Problem("no image", f"{path} belongs to no file in {images}; remove it", stops=False))
    if not cases.get("training") and not cases.get("test"):
        raise InputError(f"{listing.parent / 'imagesTr'} holds no CASE_0000{ending}; check file_ending in {listing}")
    return cases


def _channel_files(folder: Path, ending: str, report: Report) -> dict[str, dict[int, Path]]:
    """Case -> number of the channel -> file."""
    groups: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        match = CHANNEL_FILE.fullmatch(path.name[: -len(ending)])
        if match is None:
            report(Problem("entry", f"{path} is no channel of a case; rename it to CASE_0000{ending}"))
        else:
            groups.setdefault(match[1], {})[int(match[2])] = path
    return groups


# ---------------------------------------------------------------------------------------------------------------- CSV


def is_pair_list(path: Path) -> bool:
    """Is this a CSV whose first line names the columns image and label?"""
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline(10_000)
    except (OSError, UnicodeDecodeError):
        return False
    return {"image", "label"} <= set(_columns(header))


def pair_cases(path: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of a CSV with the columns image and label, and perhaps id, patient, fold and section.

    Paths are relative to the CSV file; columns are parted by commas, semicolons or tabs. A row with a label is a
    training case, one without a test case, unless its section says otherwise. Other columns are not used.

    Raises:
        InputError: no text, no rows, a column that is missing, doubled or mistyped.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); save it as CSV in UTF-8") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty; write a line with the columns image,label, and one for each case")
    columns = _columns(lines[0])
    _check_columns(columns, path)
    cases: dict[str, list[Case]] = {}
    wrong = 0
    for number, row in enumerate(csv.reader(lines[1:], delimiter=_delimiter(lines[0])), start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        try:
            section, case = _row(dict(zip(columns, cells, strict=False)), f"{path}, line {number}", path.parent)
            if len(cells) > len(columns):
                raise InputError(
                    f"{path}, line {number} has {len(cells)} cells, the header {len(columns)}; quote commas"
                )
        except InputError as error:
            report(Problem("entry", str(error)))
            wrong += 1
        else:
            cases.setdefault(section, []).append(case)
    if not cases and not wrong:  # else the report says more
        raise InputError(f"{path} lists no usable case; write a line with image and label for each")
    return cases


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _columns(header: str) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader([header], delimiter=_delimiter(header)), [])]


def _check_columns(columns: list[str], path: Path) -> None:
    for name in columns:
        near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.8)
        if name not in COLUMNS and near and near[0] not in columns:
            raise InputError(f"{path}: column {name!r} is unknown; did you mean {near[0]!r}?")
        if columns.count(name) > 1 and name in COLUMNS:
            raise InputError(f"{path} has column {name!r} twice; keep one")
    for name in ("image", "label"):
        if name not in columns:
            raise InputError(f"{path} has no column {name!r} (columns: {', '.join(columns) or 'none'}); rename one")


def _row(row: Mapping[str, str], where: str, folder: Path) -> tuple[str, Case]:
    values = {key: row[key] for key in COLUMNS if row.get(key)}
    if "image" not in values:
        raise InputError(f"{where} has no image; give a path")
    stated = values.pop("section", "training" if "label" in values else "test")
    section = ALIASES.get(stated.lower())
    if section is None:
        raise InputError(f"{where}: section {stated!r} is unknown; {nearest(stated, SECTIONS)}")
    if section != "test" and "label" not in values:
        raise InputError(f"{where} has no label, which a {section} case needs; give its path, or section test")
    case: Case = dict(values)
    for key in ("image", "label"):
        if key in case:
            case[key] = str(folder / Path(case[key]).expanduser())
    if "fold" in case:
        if not case["fold"].isdecimal():
            raise InputError(f"{where}: fold must be a whole number, got {case['fold']!r}")
        case["fold"] = int(case["fold"])
    return section, case
