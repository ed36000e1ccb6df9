# SPDX-License-Identifier: Apache-2.0
"""Data sets as people have them: MONAI and MSD datalists, nnU-Net v2 folders, and plain folders of scans.

They are told apart by content, never by name. A case is a plain dict: "id", "image" (path), and where known "label"
(path), "fold", "patient" and "slices".
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.formats import SCAN_SUFFIXES, stem
from samda.data.itk import has_dicom
from samda.errors import InputError, nearest

__all__ = ["Case", "DataList", "read_datalist", "read_labels"]

Case = dict[str, Any]
SECTIONS = {"training": "training", "validation": "validation", "test": "test", "testing": "test"}  # key -> section
NNUNET_SPLITS = {"training": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}


@dataclasses.dataclass(frozen=True)
class DataList:
    """The cases of a data set.

    Attributes:
        cases: "training", "validation" and "test", each a list of cases, perhaps empty.
        labels: class name -> ids in the label files, where the data set states them.
        layout: "datalist" (MONAI, MSD), "nnunet" or "scans" (no labels).
    """

    cases: dict[str, list[Case]]
    labels: dict[str, tuple[int, ...]] | None
    layout: str


def read_datalist(path: str | Path) -> DataList:
    """Read a data set.

    * a JSON file, or a folder with `dataset.json`, that lists cases under "training", "validation" or "test": MONAI's
      and MSD's datalist. Paths are relative to the JSON file; entries hold "image", "label" and perhaps "fold", "id"
      and "patient"; a test entry may be a path alone;
    * a folder whose `dataset.json` lists none: nnU-Net v2, `imagesTr/CASE_0000.nii.gz` and `labelsTr/CASE.nii.gz`;
    * a folder without `dataset.json`: every scan and every DICOM series folder in it is a test case;
    * one scan, or the folder of one DICOM series: one test case.

    Args:
        path: file or folder.

    Raises:
        InputError: nothing to read, a malformed list, missing files, or cases that cannot be told apart.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no data set {path}{_similar(path)}")
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.suffix.lower() != ".json" or not listing.is_file():
        return _finish(DataList({"test": _scans(path)}, None, "scans"), path.parent if path.is_file() else path)
    content = _read_json(listing)
    labels = read_labels(content["labels"], listing) if content.get("labels") else None
    if any(isinstance(content.get(key), list) for key in SECTIONS):
        return _finish(DataList(_listed(content, listing), labels, "datalist"), listing.parent)
    if (listing.parent / "imagesTr").is_dir() or "file_ending" in content:
        return _finish(DataList(_nnunet(content, listing), labels, "nnunet"), listing.parent)
    near = [nearest(key, SECTIONS) for key, value in content.items() if isinstance(value, list) and key not in SECTIONS]
    remedy = near[0] if near else 'list cases under "training", "validation" or "test", or add imagesTr and labelsTr'
    raise InputError(f"{listing} lists no cases (keys: {', '.join(content) or 'none'}); {remedy}")


def read_labels(labels: Any, where: str | Path) -> dict[str, tuple[int, ...]]:
    """The `labels` entry of a dataset.json as class name -> ids.

    nnU-Net v2 writes name -> id (or a list of ids), MSD and nnU-Net v1 write "id" -> name. nnU-Net's "ignore" is left
    out: it is no class, and voxels that bear it are refused later.

    Raises:
        InputError: neither of the two.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise InputError(f'{where}: labels must be {{"name": id}} or {{"id": "name"}}, got {labels!r}')
    found: dict[str, tuple[int, ...]] = {}
    if all(_is_id(key) and isinstance(value, str) for key, value in labels.items()):
        for key, name in labels.items():
            found[name] = (*found.get(name, ()), int(key))
    else:
        for name, value in labels.items():
            ids = value if isinstance(value, list) else [value]
            if _is_id(name) or not ids or not all(_is_id(i) for i in ids):
                raise InputError(f'{where}: labels must be {{"name": id}} or {{"id": "name"}}, got {name!r}: {value!r}')
            found[str(name)] = tuple(int(i) for i in ids)
    return {name: ids for name, ids in found.items() if name != "ignore"}


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip().lstrip("-").isdigit()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


# ------------------------------------------------------------------------------------------------------------ layouts


def _listed(content: Mapping[str, Any], listing: Path) -> dict[str, list[Case]]:
    cases: dict[str, list[Case]] = {}
    for key, section in SECTIONS.items():
        entries = content.get(key) or []
        if not isinstance(entries, list):
            raise InputError(f"{listing}: {key!r} must be a list of cases, got {type(entries).__name__}")
        for number, entry in enumerate(entries):
            cases.setdefault(section, []).append(_entry(entry, section, f"{listing}: {key}[{number}]", listing.parent))
    return cases


def _entry(entry: Any, section: str, where: str, folder: Path) -> Case:
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, Mapping):
        raise InputError(f'{where} must be {{"image": path, "label": path}}, got {entry!r}')
    case = dict(entry)
    for key in ("image", "label") if section != "test" else ("image",):
        if not case.get(key):
            raise InputError(f"{where} has no {key!r}; {nearest(key, map(str, case))}")
    for key in ("image", "label"):
        if case.get(key):
            if not isinstance(case[key], str):
                raise InputError(f"{where}: {key!r} must be one path, got {case[key]!r}; merge channels into one file")
            case[key] = str(folder / case[key])
        else:
            case.pop(key, None)
    if "fold" in case and (isinstance(case["fold"], bool) or not isinstance(case["fold"], int)):
        raise InputError(f"{where}: fold must be a whole number, got {case['fold']!r}")
    return case


def _nnunet(content: Mapping[str, Any], listing: Path) -> dict[str, list[Case]]:
    ending = str(content.get("file_ending", ".nii.gz"))
    cases: dict[str, list[Case]] = {}
    for section, (images, labels) in NNUNET_SPLITS.items():
        folder = listing.parent / images
        names = sorted(p.name[: -len(ending)] for p in folder.glob(f"*{ending}")) if folder.is_dir() else []
        extra = [name for name in names if not name.endswith("_0000")]
        if extra:
            raise InputError(
                f"{folder / (extra[0] + ending)} is no first channel (CASE_0000{ending}); "
                "samda reads one file a case: merge the channels into one file"
            )
        for name in names:
            case = {"id": name[:-5], "image": str(folder / (name + ending))}
            label = listing.parent / labels / (name[:-5] + ending)
            if section == "training" or label.is_file():
                case["label"] = str(label)
            cases.setdefault(section, []).append(case)
    if not cases.get("training") and not cases.get("test"):
        raise InputError(f"{listing.parent / 'imagesTr'} holds no CASE_0000{ending}; check file_ending in {listing}")
    return cases


def _scans(path: Path) -> list[Case]:
    if path.is_file():
        return [{"image": str(path)}]
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    scans = [p for p in inside if p.is_file() and p.name.lower().endswith(SCAN_SUFFIXES)]
    if all(p.suffix.lower() == ".dcm" for p in scans) and has_dicom(path):  # often without any suffix
        return [{"id": path.resolve().name, "image": str(path)}]
    series = [p for p in inside if p.is_dir() and has_dicom(p)]
    if not scans and not series:
        raise InputError(
            f"{path} holds no scans; give {', '.join(SCAN_SUFFIXES)} files, DICOM folders or a dataset.json"
        )
    return [{"image": str(p)} for p in sorted(scans + series)]


# ------------------------------------------------------------------------------------------------------------- checks


def _finish(data: DataList, root: Path) -> DataList:
    """Give every case an id and refuse missing files and doubled ids."""
    cases = {section: data.cases.get(section, []) for section in ("training", "validation", "test")}
    every = [case for section in cases.values() for case in section]
    _refuse_missing(every)
    _name(every, root)
    doubled = [name for name, count in Counter(case["id"] for case in every).items() if count > 1]
    if doubled:
        paths = [case["image"] for case in every if case["id"] == doubled[0]]
        raise InputError(
            f"{len(doubled)} ids are used twice, first {doubled[0]!r} ({', '.join(paths)}); give each its own"
        )
    return DataList(cases, data.labels, data.layout)


def _name(cases: Sequence[Case], root: Path) -> None:
    """Ids from file names or, where these repeat (`case1/ct.nii.gz`), from the path below `root`."""
    unnamed = [case for case in cases if not case.get("id")]
    stems = [stem(case["image"]) for case in unnamed]
    if len(set(stems)) < len(stems):
        stems = [_path_name(Path(case["image"]), root) for case in unnamed]
    for case, name in zip(unnamed, stems, strict=True):
        case["id"] = name
    for case in cases:
        case["id"] = str(case["id"])


def _path_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts[-2:]
    return "_".join([*(part for part in parts[:-1] if part != ".."), stem(path)])


def _refuse_missing(cases: Iterable[Case]) -> None:
    paths = [Path(case[key]) for case in cases for key in ("image", "label") if key in case]
    missing = [path for path in paths if not path.exists()]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{len(missing)} of {len(paths)} listed files are missing: {shown}{_similar(missing[0])}")


def _similar(path: Path) -> str:
    """The nearest existing name beside a missing path, as the end of a message."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if not names:
        return f"; there is nothing in {path.parent}"
    hint = nearest(path.name, names)
    return f"; {hint}" if hint.startswith("did you mean") else "; check the paths"
