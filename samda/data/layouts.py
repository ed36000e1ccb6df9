# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set: one line each, with the case and the remedy.

Data sets that a file lists: MONAI and MSD datalists, nnU-Net v2's dataset.json, and CSV files of pairs.

Data sets without a list: images with masks of the same name, DICOM series with their labels, and plain scans.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.formats import PICTURE_SUFFIXES, SCAN_SUFFIXES, VOLUME_SUFFIXES, has_dicom, stem
from samda.errors import InputError, nearest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a data set.

    Attributes:
        kind: what, in a word or two, for programs: "missing", "grid", "label ids", ...
        text: one line that names the file, the value and the remedy.
        case: id of the case; empty where it concerns the data set as a whole.
        stops: would training stumble on it?
    """

    kind: str
    text: str
    case: str = ""
    stops: bool = True

    def line(self) -> str:
        """The line a person reads."""
        return f"case {self.case}: {self.text}" if self.case else self.text


Report = Callable[[Problem], None]  # takes a problem, and decides what becomes of it


def refuse(problem: Problem) -> None:
    """The report of those who want to go on with sound data only.

    Raises:
        InputError: training would stumble on the problem; the others are logged.
    """
    if problem.stops:
        raise InputError(problem.text)
    logger.warning("%s", problem.line())


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


LABEL_FOLDERS = ("masks", "labels", "mask", "label")
ENDINGS = ("", "_mask", "_label", "_labels", "_seg", "_segmentation")  # of a label's name beside that of its image
DEPTH = 3  # folders below that of a case in which its series is looked for

Series = dict[Path, tuple[list[Path], list[Path]]]  # folder of a case -> folders of its series, its possible labels


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _subfolder(folder: Path, names: Sequence[str]) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir() and path.name.lower() in names]


# ---------------------------------------------------------------------------------------------------- images and masks


def mask_folder(folder: Path) -> tuple[Path, Path] | None:
    """`images` and `masks` (or `labels`) in a folder, if both are there.

    Raises:
        InputError: there are masks and labels.
    """
    images, masks = _subfolder(folder, ("images", "image")), _subfolder(folder, LABEL_FOLDERS)
    if not images or not masks:
        return None
    if len(images) > 1 or len(masks) > 1:
        names = ", ".join(path.name for path in (images if len(images) > 1 else masks))
        raise InputError(f"{folder} holds {names}, which say the same; keep one, or list the pairs in a CSV")
    return images[0], masks[0]


def masked_cases(images: Path, masks: Path, report: Report) -> dict[str, list[Case]]:
    """Training cases: every picture, volume or DICOM series in `images` with the label of the same name in `masks`.

    A label may bear an ending of its own: `scan_mask.png` for `scan.png`.
    """
    labels = _by_stem(_files(masks), report)
    cases, used = [], set()
    for image in _scans(images):
        name = image.name if image.is_dir() else stem(image)
        found = [labels[name + ending] for ending in ENDINGS if name + ending in labels]
        if len(found) == 1:
            cases.append({"id": name, "image": str(image), "label": str(found[0])})
        elif found:
            report(Problem("label", f"{_names(found)} could all be the label of {image}; keep one", name))
        else:
            report(Problem("missing", f"{image} has no label {masks.name}/{name}.*; add it, or move the image", name))
        used.update(found)
    for path in labels.values():
        if path not in used:
            report(Problem("no image", f"{path} belongs to no file in {images.name}; remove it", stops=False))
    if not cases:
        raise InputError(f"no file in {images} has the name of one in {masks}; name image and label alike")
    return {"training": cases}


def _files(folder: Path, suffixes: Sequence[str] = SCAN_SUFFIXES) -> list[Path]:
    return [path for path in _inside(folder) if path.is_file() and path.name.lower().endswith(tuple(suffixes))]


def _by_stem(paths: Sequence[Path], report: Report) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = stem(path)
        if name in found:
            report(Problem("label", f"{found[name]} and {path} bear one name; keep one", name))
        found.setdefault(name, path)
    return found


def _names(paths: Sequence[Path]) -> str:
    return " and ".join(map(str, paths))


# -------------------------------------------------------------------------------------------------------------- DICOM


def find_series(folder: Path) -> Series:
    """The DICOM series of a folder with the labels that could be theirs; empty where not a single one has a label.

    A case is a folder CASE that holds a series, directly or further down, or `folder` itself. Its label is a volume in
    CASE, or CASE.nii.gz (.nrrd, .mha) beside it or in `labels`.
    """
    if has_dicom(folder):
        own = _files(folder, VOLUME_SUFFIXES)
        return {folder: ([folder], own)} if own else {}
    beside = _files(folder, VOLUME_SUFFIXES)
    for place in _subfolder(folder, LABEL_FOLDERS):
        beside += _files(place, VOLUME_SUFFIXES)
    found: Series = {}
    for case in _inside(folder):
        if not case.is_dir() or case.name.lower() in LABEL_FOLDERS:
            continue
        series = _series_below(case, DEPTH)
        if series:
            own = _files(case, VOLUME_SUFFIXES)
            for place in _subfolder(case, LABEL_FOLDERS):
                own += _files(place, VOLUME_SUFFIXES)
            own += [path for path in beside if stem(path) in [case.name + ending for ending in ENDINGS]]
            found[case] = (series, own)
    return found if any(labels for _, labels in found.values()) else {}


def dicom_cases(folder: Path, series: Series, report: Report) -> dict[str, list[Case]]:
    """Training cases: each series of :func:`find_series` with its label."""
    cases: list[Case] = []
    used: set[Path] = set()
    for place, (folders, labels) in series.items():
        name = place.resolve().name
        used.update(labels)
        if len(folders) > 1:
            text = f"{place} holds {len(folders)} series ({', '.join(str(p.relative_to(place)) for p in folders)}); "
            report(Problem("series", text + "keep one, or list the pairs in a CSV", name))
            continue
        if len(labels) > 1:  # an image that somebody converted may lie there, too
            labels = [path for path in labels if any(end[1:] in stem(path).lower() for end in ENDINGS[1:])] or labels
        if len(labels) == 1:
            cases.append({"id": name, "image": str(folders[0]), "label": str(labels[0])})
        elif labels:
            report(Problem("label", f"{_names(labels)} could all be the label of {place}; keep one", name))
        else:
            text = f"{place} has no label; put {name}.nii.gz (.nrrd, .mha) beside it or into {folder / 'labels'}"
            report(Problem("missing", text, name))
    every = _files(folder, VOLUME_SUFFIXES)
    for place in _subfolder(folder, LABEL_FOLDERS):
        every += _files(place, VOLUME_SUFFIXES)
    for path in every:
        if path not in used:
            report(
                Problem("no image", f"{path} belongs to no DICOM folder; remove it, or name both alike", stops=False)
            )
    return {"training": cases}


def _series_below(folder: Path, depth: int) -> list[Path]:
    if has_dicom(folder):
        return [folder]
    below = [path for path in _inside(folder) if path.is_dir()] if depth else []
    return [series for path in below for series in _series_below(path, depth - 1)]


# -------------------------------------------------------------------------------------------------------------- scans


def scan_cases(path: Path) -> dict[str, list[Case]]:
    """Test cases: one scan, or every scan and every DICOM series folder in a folder.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return {"test": [{"image": str(path)}]}
    scans = _files(path)
    if all(p.suffix.lower() == ".dcm" for p in scans) and has_dicom(path):  # often without any suffix
        return {"test": [{"id": path.resolve().name, "image": str(path)}]}
    found = _scans(path)
    if not found:
        near = "add its dataset.json" if (path / "imagesTr").is_dir() else "list images and labels in a CSV or JSON"
        raise InputError(
            f"{path} holds no scans; give {', '.join(SCAN_SUFFIXES)} files or DICOM folders, or {near} (data/README.md)"
        )
    return {"test": [{"image": str(p)} for p in found]}


def _scans(folder: Path) -> list[Path]:
    """Scan files and DICOM series folders in a folder."""
    return sorted([*_files(folder), *(p for p in _inside(folder) if p.is_dir() and has_dicom(p))])
