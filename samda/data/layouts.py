# SPDX-License-Identifier: Apache-2.0
"""Layouts of data sets that a list describes: MONAI, MSD, CSV and nnU-Net; those of mere folders: `folders.py`.

Each function takes a list or a folder and returns section -> cases. Problems of a case are reported as :class:`Problem`
and the case is skipped; problems of the whole data set raise InputError.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.folders import CHANNEL_FILE, Case, Problem, Report, files_in, report_unused
from samda.data.formats import PICTURE_SUFFIXES
from samda.errors import InputError, nearest
from samda.io import parse_json

SECTIONS = {"training": "training", "validation": "validation", "test": "test", "testing": "test"}  # key -> section
ALIASES = SECTIONS | {"train": "training", "tr": "training", "val": "validation", "valid": "validation", "ts": "test"}
COLUMNS = ("image", "label", "id", "patient", "fold", "section")
NNUNET_SPLITS = {"training": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes; asking for longer ones is an error of the system


# --------------------------------------------------------------------------------------------------------------- lists


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must contain a JSON object, got {type(content).__name__}")
    return content


def listed_cases(content: Mapping[str, Any], listing: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of a MONAI or MSD datalist; paths are relative to it."""
    cases: dict[str, list[Case]] = {}
    for key, section in SECTIONS.items():
        entries = content.get(key) or []
        if not isinstance(entries, list):
            raise InputError(f"{listing}: {key!r} must be a list of cases, got {type(entries).__name__}")
        for number, entry in enumerate(entries):
            try:
                case = _case(entry, section, f"{listing}: {key}[{number}]", listing.parent)
            except InputError as error:
                report(Problem("entry", str(error)))
            else:
                cases.setdefault(section, []).append(case)
    return cases


def is_pair_list(path: Path) -> bool:
    """Is this a CSV with the columns image and label?"""
    try:
        lines, _ = _lines(path)
        return {"image", "label"} <= set(_columns(_csv(lines[:1])))
    except (OSError, UnicodeError, csv.Error, IndexError):
        return False


def _lines(path: Path) -> tuple[list[str], int]:
    """The lines of a CSV from its header on, and the number of lines above: UTF-8, UTF-16 or Latin-1, as Excel saves.

    Excel's first line `sep=;` is skipped; the separator is found from the header.
    """
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = content.decode("utf-16")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252")
    lines = text.splitlines()
    above = int(bool(lines) and lines[0].strip().strip('"').lower().startswith("sep="))
    return lines[above:], above


def pair_cases(path: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of a CSV with the columns image and label, and optionally id, patient, fold and section.

    Paths are relative to the CSV file; columns are separated by commas, semicolons or tabs. By default, rows with a
    label are training cases and rows without a label test cases. Other columns are ignored.
    """
    try:
        lines, above = _lines(path)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); save it as CSV in UTF-8") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty; write a line with the columns image,label, and one for each case")
    rows = _csv(lines)
    try:
        rows.fieldnames = _columns(rows)
        _check_columns(rows.fieldnames, path)
        table = [(rows.line_num + above, row) for row in rows]
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num + above + 1}: {error}; is a quote missing?") from error
    cases: dict[str, list[Case]] = {}
    wrong = 0
    for number, row in table:
        surplus = row.pop(None, ())  # type: ignore[call-overload]
        if not surplus and not any(cell and cell.strip() for cell in row.values()):
            continue
        where = f"{path}, line {number}"
        try:
            if surplus:
                raise InputError(f"{where} has more cells than the header ({', '.join(surplus)}); quote commas")
            section, case = _row(row, where, path.parent)
        except InputError as error:
            report(Problem("entry", str(error)))
            wrong += 1
        else:
            cases.setdefault(section, []).append(case)
    if not cases and not wrong:  # otherwise the report has details
        raise InputError(f"{path} has no valid case; add a line with image and label for each")
    return cases


def _csv(lines: Sequence[str]) -> csv.DictReader[str]:
    return csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count))


def _columns(rows: csv.DictReader[str]) -> list[str]:
    return [name.strip().lower() for name in rows.fieldnames or ()]


def _check_columns(columns: Sequence[str], path: Path) -> None:
    for name in columns:
        near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.8)
        if name not in COLUMNS and near and near[0] not in columns:
            raise InputError(f"{path}: column {name!r} is unknown; did you mean {near[0]!r}?")
        if columns.count(name) > 1 and name in COLUMNS:
            raise InputError(f"{path} has column {name!r} twice; keep one")
    for name in ("image", "label"):
        if name not in columns:
            raise InputError(f"{path} has no column {name!r} (columns: {', '.join(columns) or 'none'}); rename one")


def _row(row: Mapping[str, str | None], where: str, folder: Path) -> tuple[str, Case]:
    values: Case = {key: cell.strip() for key, cell in row.items() if key in COLUMNS and cell and cell.strip()}
    stated = values.pop("section", "training" if "label" in values else "test")
    section = ALIASES.get(stated.lower())
    if section is None:
        raise InputError(f"{where}: section {stated!r} is unknown; {nearest(stated, SECTIONS)}")
    if values.get("fold", "").isdecimal():
        values["fold"] = int(values["fold"])
    return section, _case(values, section, where, folder)


def _case(entry: Any, section: str, where: str, folder: Path) -> Case:
    """The case of an entry of a list, with paths joined to `folder`."""
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, Mapping):
        raise InputError(f'{where} must be {{"image": path, "label": path}}, got {entry!r}')
    case = dict(entry)
    for key in ("image", "label") if section != "test" else ("image",):
        if not case.get(key):
            near = nearest(key, {*map(str, case)} - {key})
            remedy = near if near.startswith("did you mean") else f"a {section} case needs one, give its path"
            raise InputError(f"{where} has no {key!r}; {remedy}")
    image, label = case["image"], case.pop("label", None)
    paths = image if isinstance(image, list) else [image]
    if not all(isinstance(path, str) for path in paths):
        raise InputError(f"{where}: 'image' must be one path, or a list of one path per channel, got {image!r}")
    for path in map(str, filter(None, [*paths, label])):
        if (
            "\0" in path
            or len(path) > LONGEST_PATH
            or len(max(path.encode("utf-8", "replace").split(b"/"), key=len)) > LONGEST_NAME
        ):
            raise InputError(f"{where}: {path[:40]!r}... cannot be a path; repair it")
    joined = [str(folder / Path(path).expanduser()) for path in paths]
    case["image"] = joined[0] if len(joined) == 1 else joined
    if label:
        if not isinstance(label, str):
            raise InputError(f"{where}: 'label' must be one path, got {label!r}; merge the labels into one file")
        case["label"] = str(folder / Path(label).expanduser())
    if "fold" in case and type(case["fold"]) is not int:
        raise InputError(f"{where}: fold must be a whole number, got {case['fold']!r}")
    for key in ("id", "patient"):
        name = case.pop(key, None)
        if isinstance(name, bool | list | Mapping):
            raise InputError(f"{where}: {key} must be a text or a number, got {name!r}")
        if name is not None and name != "":
            case[key] = str(name)
    lacking = case.get("unlabeled", [])
    if not isinstance(lacking, list) or not all(isinstance(name, str) for name in lacking):
        raise InputError(f"{where}: unlabeled must be a list of class names, got {lacking!r}")
    if "slices" in case:
        _check_ranges(case["slices"], where)
    return case


def _check_ranges(value: Any, where: str) -> None:
    pairs = value if isinstance(value, list) else []
    whole = all(isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair) for pair in pairs)
    if not pairs or not whole or not all(first < end for first, end in pairs):
        raise InputError(f"{where}: slices must be pairs [[first, end], ...] of whole numbers, got {value!r}")
    for before, after in itertools.pairwise(sorted(pairs)):
        if after[0] < before[1]:  # a duplicate slice could be used for training and validation
            raise InputError(f"{where}: slices {before} and {after} overlap; join them")


# ----------------------------------------------------------------------------------------------------------- nnU-Net


def read_channels(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the channels from "channel_names" (nnU-Net) or "modality" (MSD)."""
    names = content.get("channel_names") or content.get("modality")
    return tuple(str(name) for name in names.values()) if isinstance(names, Mapping) and names else None


def is_nnunet(content: Mapping[str, Any], listing: Path) -> bool:
    """Is this the dataset.json of an nnU-Net folder? That of v1 lists `imagesTr/CASE.nii.gz` for `CASE_0000.nii.gz`."""
    listed = [entry.get("image") for entry in content.get("training") or [] if isinstance(entry, Mapping)]
    if not listed:
        lists = any(isinstance(content.get(key), list) for key in SECTIONS)
        return not lists and ((listing.parent / "imagesTr").is_dir() or "file_ending" in content)
    image = listing.parent / str(listed[0])
    channel = image.parent / re.sub(r"(\.nii\.gz|\.\w+)$", r"_0000\1", image.name)
    return not image.exists() and channel.exists()


def given_cases(content: Mapping[str, Any], listing: Path, report: Report) -> dict[str, list[Case]]:
    """The training cases of nnU-Net v2's entry "dataset": CASE -> {"images": [one file per channel], "label": file}."""
    cases = []
    for name, entry in content["dataset"].items():
        where = f"{listing}: dataset[{name!r}]"
        try:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("images"), list):
                raise InputError(f'{where} must be {{"images": [paths], "label": path}}, got {entry!r}')
            given = {"id": name, "image": entry["images"], "label": entry.get("label")}
            cases.append(_case(given, "training", where, listing.parent))
        except InputError as error:
            report(Problem("entry", str(error)))
    return {"training": cases}


def report_counts(
    content: Mapping[str, Any], cases: Mapping[str, Sequence[Case]], listing: Path, report: Report
) -> None:
    """Report if a dataset.json states another number of cases than there are."""
    for key, section in (("numTraining", "training"), ("numTest", "test")):
        stated, found = content.get(key), len(cases.get(section, ()))
        if type(stated) is int and stated != found and (section == "training" or found):
            text = f"{listing} states {key} {stated}, but {found} {section} cases are there; is the data set complete?"
            report(Problem("count", text, stops=False))


def nnunet_cases(content: Mapping[str, Any], listing: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of an nnU-Net folder: `imagesTr/CASE_0000.nii.gz`, `_0001` and so on, and `labelsTr/CASE.nii.gz`."""
    ending, root = str(content.get("file_ending", ".nii.gz")), listing.parent
    names = read_channels(content) or ()
    cases: dict[str, list[Case]] = {}
    for section, (images, labels) in NNUNET_SPLITS.items():
        groups = _channel_files(root / images, ending, report)
        for name, files in groups.items():
            last = max(files)
            one_file = list(files) == [0] and ending.lower() in PICTURE_SUFFIXES  # one color image
            count = 1 if one_file else len(names) or last + 1
            missing = [k for k in range(count) if k not in files]
            if last >= count:
                text = f"{files[last]} is channel {last}, {listing.name} names {count} (channel_names)"
                report(Problem("channels", f"{text}; name all channels there", name))
            elif missing:
                stated = f" ({listing.name} names {len(names)} channels)" if names else ""
                text = f"missing {root / images / name}_{missing[0]:04}{ending}{stated}; add it"
                report(Problem("missing", text, name))
            else:
                paths = [str(files[k]) for k in range(count)]
                case: Case = {"id": name, "image": paths[0] if count == 1 else paths}
                label = root / labels / (name + ending)
                if section == "training" or label.is_file():
                    case["label"] = str(label)
                cases.setdefault(section, []).append(case)
        found = files_in(root / labels, (ending,))
        report_unused([p for p in found if p.name[: -len(ending)] not in groups], f"file in {images}", report)
    if not cases.get("training") and not cases.get("test"):
        raise InputError(f"{root / 'imagesTr'} contains no CASE_0000{ending}; check file_ending in {listing}")
    return cases


def _channel_files(folder: Path, ending: str, report: Report) -> dict[str, dict[int, Path]]:
    """Case -> number of the channel -> file."""
    groups: dict[str, dict[int, Path]] = {}
    for path in files_in(folder, (ending,)):
        match = CHANNEL_FILE.fullmatch(path.name[: -len(ending)])
        if match is None:
            report(Problem("entry", f"{path} is not a channel of a case; rename it to CASE_0000{ending}"))
        else:
            groups.setdefault(match[1], {})[int(match[2])] = path
    return groups
