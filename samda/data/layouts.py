# SPDX-License-Identifier: Apache-2.0
"""Layouts of data sets: lists (MONAI, MSD, CSV) and folders (nnU-Net v2, images and masks, DICOM, scans).

Each function takes a list or a folder and returns section -> cases. Problems of a case are reported as :class:`Problem`
and the case is skipped; problems of the whole data set raise InputError.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.dicom import has_dicom
from samda.data.formats import PICTURE_SUFFIXES, SCAN_SUFFIXES, VOLUME_SUFFIXES, stem
from samda.errors import InputError, nearest
from samda.io import parse_json

logger = logging.getLogger(__name__)

Case = dict[str, Any]  # "id", "image" (a path, or one per channel), optional "label", "fold", "patient" and "slices"
SECTIONS = {"training": "training", "validation": "validation", "test": "test", "testing": "test"}  # key -> section
ALIASES = SECTIONS | {"train": "training", "tr": "training", "val": "validation", "valid": "validation", "ts": "test"}
COLUMNS = ("image", "label", "id", "patient", "fold", "section")
NNUNET_SPLITS = {"training": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
CHANNEL_FILE = re.compile(r"(.+)_(\d{4})")
IMAGE_FOLDERS = ("images", "image")
LABEL_FOLDERS = ("masks", "labels", "mask", "label")
ENDINGS = ("", "_mask", "_label", "_labels", "_seg", "_segmentation")  # suffixes of label names
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes; asking for longer ones is an error of the system
DEPTH = 3  # levels of folders below a case that are searched for its series


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of a data set.

    Attributes:
        kind: for programs: "missing", "grid", "label ids", ...
        text: one line with the file, the value and the remedy.
        case: id of the case; empty for the whole data set.
        stops: would it make training fail?
    """

    kind: str
    text: str
    case: str = ""
    stops: bool = True

    def line(self) -> str:
        """The text with its case."""
        return f"case {self.case}: {self.text}" if self.case else self.text


Report = Callable[[Problem], None]  # handles a problem


def refuse(problem: Problem) -> None:
    """Raise InputError for problems that stop a training; log the others."""
    if problem.stops:
        raise InputError(problem.text)
    logger.warning("%s", problem.line())


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
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline(10_000)
    except (OSError, UnicodeDecodeError):
        return False
    try:
        return {"image", "label"} <= set(_columns(_csv([header])))
    except csv.Error:
        return False


def pair_cases(path: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of a CSV with the columns image and label, and optionally id, patient, fold and section.

    Paths are relative to the CSV file; columns are separated by commas, semicolons or tabs. By default, rows with a
    label are training cases and rows without a label test cases. Other columns are ignored.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); save it as CSV in UTF-8") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty; write a line with the columns image,label, and one for each case")
    rows = _csv(lines)
    try:
        rows.fieldnames = _columns(rows)
        _check_columns(rows.fieldnames, path)
        table = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num + 1}: {error}; is a quote missing?") from error
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
    if "slices" in case:
        _check_ranges(case["slices"], where)
    return case


def _check_ranges(value: Any, where: str) -> None:
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(_is_range(pair) for pair in pairs):
        raise InputError(f"{where}: slices must be pairs [[first, end], ...] of whole numbers, got {value!r}")
    for before, after in itertools.pairwise(sorted(pairs)):
        if after[0] < before[1]:  # a duplicate slice could be used for training and validation
            raise InputError(f"{where}: slices {before} and {after} overlap; join them")


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(i) is int for i in value) and value[0] < value[1]


# ----------------------------------------------------------------------------------------------------------- nnU-Net v2


def read_channels(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the channels from "channel_names" (nnU-Net) or "modality" (MSD)."""
    names = content.get("channel_names") or content.get("modality")
    return tuple(str(name) for name in names.values()) if isinstance(names, Mapping) and names else None


def nnunet_cases(content: Mapping[str, Any], listing: Path, report: Report) -> dict[str, list[Case]]:
    """The cases of an nnU-Net v2 folder: `imagesTr/CASE_0000.nii.gz`, `_0001` and so on, and `labelsTr/CASE.nii.gz`."""
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
        found = sorted((root / labels).glob(f"*{ending}"))
        _report_unused([p for p in found if p.name[: -len(ending)] not in groups], f"file in {images}", report)
    if not cases.get("training") and not cases.get("test"):
        raise InputError(f"{root / 'imagesTr'} contains no CASE_0000{ending}; check file_ending in {listing}")
    return cases


def _channel_files(folder: Path, ending: str, report: Report) -> dict[str, dict[int, Path]]:
    """Case -> number of the channel -> file."""
    groups: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        match = CHANNEL_FILE.fullmatch(path.name[: -len(ending)])
        if match is None:
            report(Problem("entry", f"{path} is not a channel of a case; rename it to CASE_0000{ending}"))
        else:
            groups.setdefault(match[1], {})[int(match[2])] = path
    return groups


# ---------------------------------------------------------------------------------------------------- images and masks


def mask_folder(folder: Path) -> tuple[Path, Path] | None:
    """`images` and `masks` (or `labels`) in a folder, if both exist."""
    images, masks = _subfolders(folder, IMAGE_FOLDERS), _subfolders(folder, LABEL_FOLDERS)
    if not images or not masks:
        return None
    for found in (images, masks):
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InputError(f"{folder} contains {names}, which are alternatives; keep one, or list the pairs in a CSV")
    return images[0], masks[0]


def masked_cases(images: Path, masks: Path, report: Report) -> dict[str, list[Case]]:
    """Training cases: every 2-D image, volume or DICOM series in `images` with the label of the same name in `masks`.

    The name of a label may have a suffix: `scan_mask.png` for `scan.png`.
    """
    labels = by_stem(files_in(masks), report)
    cases, used = [], set()
    for image in _scans(images):
        name = image.name if image.is_dir() else stem(image)
        found = [labels[name + ending] for ending in ENDINGS if name + ending in labels]
        missing = f"{image} has no label {masks.name}/{name}.*; add it, or move the image"
        cases += _with_label(name, image, found, image, missing, report)
        used.update(found)
    _report_unused([path for path in labels.values() if path not in used], f"file in {images.name}", report)
    if not cases:
        raise InputError(f"no file in {images} has the name of a file in {masks}; use the same names")
    return {"training": cases}


def _with_label(
    name: str, image: Path, labels: Sequence[Path], place: Path, missing: str, report: Report
) -> list[Case]:
    """The case with its label; if there is not exactly one, a report and no case."""
    if len(labels) == 1:
        return [{"id": name, "image": str(image), "label": str(labels[0])}]
    if labels:
        text = f"{' and '.join(map(str, labels))} match as label of {place}; keep one"
        report(Problem("label", text, name))
    else:
        report(Problem("missing", missing, name))
    return []


def _report_unused(labels: Iterable[Path], what: str, report: Report) -> None:
    for path in labels:
        text = f"{path} matches no {what}; remove it, or use the same name"
        report(Problem("no image", text, stops=False))


# --------------------------------------------------------------------------------------------------------------- DICOM

Series = dict[Path, tuple[list[Path], list[Path]]]  # folder of a case -> folders of its series, candidate labels


def find_series(folder: Path) -> Series:
    """The DICOM series of a folder with candidates for their labels; empty if none has a label.

    A case is a folder CASE that contains a series at any depth, or `folder` itself. Its label is a volume in CASE, or
    CASE.nii.gz (.nrrd, .mha) next to it or in `labels`.
    """
    if has_dicom(folder):
        own = files_in(folder, VOLUME_SUFFIXES)
        return {folder: ([folder], own)} if own else {}
    beside = _volumes(folder)
    found: Series = {}
    for case in _inside(folder):
        series = _series_below(case, DEPTH) if case.is_dir() and case.name.lower() not in LABEL_FOLDERS else []
        if series:
            names = [case.name + ending for ending in ENDINGS]
            found[case] = (series, _volumes(case) + [path for path in beside if stem(path) in names])
    return found if any(labels for _, labels in found.values()) else {}


def dicom_cases(folder: Path, series: Series, report: Report) -> dict[str, list[Case]]:
    """Training cases: each series of :func:`find_series` with its label."""
    cases: list[Case] = []
    used: set[Path] = set()
    for place, (folders, labels) in series.items():
        name = place.resolve().name
        used.update(labels)
        if len(folders) > 1:
            text = f"{place} contains {len(folders)} series ({', '.join(str(p.relative_to(place)) for p in folders)}); "
            report(Problem("series", text + "keep one, or list the pairs in a CSV", name))
            continue
        if len(labels) > 1:  # a converted image may be there, too
            labels = [path for path in labels if any(end[1:] in stem(path).lower() for end in ENDINGS[1:])] or labels
        missing = f"{place} has no label; put {name}.nii.gz (.nrrd, .mha) next to it or into {folder / 'labels'}"
        cases += _with_label(name, folders[0], labels, place, missing, report)
    _report_unused([path for path in _volumes(folder) if path not in used], "DICOM folder", report)
    return {"training": cases}


def _series_below(folder: Path, depth: int) -> list[Path]:
    if has_dicom(folder):
        return [folder]
    below = [path for path in _inside(folder) if path.is_dir()] if depth else []
    return [series for path in below for series in _series_below(path, depth - 1)]


def _volumes(folder: Path) -> list[Path]:
    """Volumes in a folder and in its label folders."""
    places = [folder, *_subfolders(folder, LABEL_FOLDERS)]
    return [path for place in places for path in files_in(place, VOLUME_SUFFIXES)]


# --------------------------------------------------------------------------------------------------------------- scans


def scan_cases(path: Path) -> dict[str, list[Case]]:
    """Test cases: one scan, or every scan and every DICOM series folder in a folder."""
    if path.is_file():
        return {"test": [{"image": str(path)}]}
    scans = files_in(path)
    if all(p.suffix.lower() == ".dcm" for p in scans) and has_dicom(path):  # often without any suffix
        return {"test": [{"id": path.resolve().name, "image": str(path)}]}
    found = _scans(path)
    if not found:
        near = "add its dataset.json" if (path / "imagesTr").is_dir() else "list images and labels in a CSV or JSON"
        raise InputError(
            f"{path} has no scans; give {', '.join(SCAN_SUFFIXES)} files or DICOM folders, or {near} (data/README.md)"
        )
    return {"test": [{"image": str(p)} for p in found]}


def _scans(folder: Path) -> list[Path]:
    """Scan files and DICOM series folders in a folder."""
    return sorted([*files_in(folder), *(p for p in _inside(folder) if p.is_dir() and has_dicom(p))])


def files_in(folder: Path, suffixes: Sequence[str] = SCAN_SUFFIXES) -> list[Path]:
    """The files of a folder with one of the suffixes, sorted, without hidden files."""
    return [path for path in _inside(folder) if path.is_file() and path.name.lower().endswith(tuple(suffixes))]


def by_stem(paths: Iterable[Path], report: Report) -> dict[str, Path]:
    """Files by name without suffix."""
    found: dict[str, Path] = {}
    for path in paths:
        name = stem(path)
        if name in found:
            report(Problem("label", f"{found[name]} and {path} have the same name; keep one", name))
        found.setdefault(name, path)
    return found


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _subfolders(folder: Path, names: Sequence[str]) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir() and path.name.lower() in names]
