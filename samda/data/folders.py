# SPDX-License-Identifier: Apache-2.0
"""Data sets that are mere folders: images and masks, DICOM series with labels, scans.

Problems of a case are reported as :class:`Problem` and the case is skipped; problems of the whole data set raise
InputError. Whatever a folder holds and is not used is reported, too.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.dicom_files import has_dicom, is_dicom, no_images, series_in, visible
from samda.data.dicom_labels import is_dicom_label, referenced_series, series_uid
from samda.data.formats import SCAN_SUFFIXES, VOLUME_SUFFIXES, stem
from samda.errors import InputError
from samda.output import HIDDEN

logger = logging.getLogger(__name__)

Case = dict[str, Any]  # "id", "image" (a path, or one per channel), optional "label", "fold", "patient" and "slices"
IMAGE_FOLDERS = ("images", "image")
LABEL_FOLDERS = ("masks", "labels", "mask", "label", "segmentations", "segmentation")
LABEL_NAME = re.compile(r"(?:(.+)[._-])?(?:mask|label|seg|segmentation)s?", re.IGNORECASE)  # CASE_mask, CASE.seg, seg
CHANNEL_FILE = re.compile(r"(.+)_(\d{4})")
DEPTH = 6  # levels of folders that are looked into
SHOWN = 5  # names in a report of what is not used


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

    The name of a label may end in _mask, -label, .seg and the like. Subfolders are looked into.
    """
    labels = by_name(_scans(masks, report, labels=True), report)
    cases, used = [], set()
    for name, image in _scans(images, report, labels=True):
        found = [label for other, label in labels.items() if is_label_of(other, name)]
        missing = f"{image} has no label {masks.name}/{name}.*; add it, or move the image"
        cases += _with_label(name, image, found, image, missing, report)
        used.update(found)
    report_unused([path for path in labels.values() if path not in used], f"file in {images.name}", report)
    if not cases:
        raise InputError(f"no file in {images} has the name of a file in {masks}; use the same names")
    return {"training": cases}


def is_label_of(label: str, name: str) -> bool:
    """Does a label's name mean the case `name`: the same, or with an ending as in `CASE_mask` and `CASE.seg`?"""
    match = LABEL_NAME.fullmatch(label)
    return label == name or (match is not None and match[1] == name)


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


def report_unused(labels: Iterable[Path], what: str, report: Report) -> None:
    """Report labels without an image."""
    for path in labels:
        text = f"{path} matches no {what}; remove it, or use the same name"
        report(Problem("no image", text, stops=False))


# --------------------------------------------------------------------------------------------------------------- DICOM

Series = dict[Path, tuple[list[Path], list[Path]]]  # folder of a case -> folders of its series, candidate labels


def find_series(folder: Path) -> Series:
    """The DICOM series of a folder with candidates for their labels; empty if none has a label.

    A case is a folder CASE that contains a series at any depth, or `folder` itself or each series in it. Its label is a
    volume in CASE, CASE.nii.gz (.nrrd, .mha) next to it or in `labels`, or a DICOM label below `folder` that refers to
    the series; of several series in CASE those count that a label refers to.
    """
    objects = _dicom_labels(folder, DEPTH)
    if has_dicom(folder):
        own = files_in(folder, VOLUME_SUFFIXES)
        single = series_in(folder)[0]
        found = {path: ([path], (own if len(single) == 1 else []) + _referring([path], objects)) for path in single}
        return found if any(labels for _, labels in found.values()) else {}
    beside = _volumes(folder)
    found = {}
    for case in visible(folder):
        series = _series_below(case, DEPTH) if case.is_dir() and case.name.lower() not in LABEL_FOLDERS else []
        referring = _referring(series, objects)
        if referring:
            series = [path for path in series if _referring([path], objects)]
            found[case] = (series, referring)
        elif series:
            found[case] = (series, _volumes(case) + [path for path in beside if is_label_of(stem(path), case.name)])
    return found if any(labels for _, labels in found.values()) else {}


def _dicom_labels(folder: Path, depth: int) -> dict[Path, set[str]]:
    """The DICOM labels in a folder and the folders in it, with the series that they refer to."""
    found = {path: _references(path) for path in no_images(folder) if is_dicom_label(path)}
    for path in visible(folder):
        if path.is_dir() and depth and not (path / HIDDEN).is_dir():
            found |= _dicom_labels(path, depth - 1)
    return found


def _references(path: Path) -> set[str]:
    """The series that a DICOM label refers to; none for a damaged label, which does not stop the other cases."""
    try:
        return referenced_series(path)
    except InputError as error:
        logger.warning("%s", error)
        return set()


def _referring(series: Sequence[Path], objects: Mapping[Path, set[str]]) -> list[Path]:
    """The DICOM labels that refer to one of the series."""
    uids = {series_uid(path) for path in series} if objects else set()
    return [path for path, wanted in objects.items() if wanted & uids]


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
            labels = [path for path in labels if LABEL_NAME.fullmatch(stem(path))] or labels
        missing = f"{place} has no label; put {name}.nii.gz (.nrrd, .mha) next to it or into {folder / 'labels'}"
        cases += _with_label(name, folders[0], labels, place, missing, report)
    report_unused([path for path in _volumes(folder) if path not in used], "DICOM folder", report)
    return {"training": cases}


def _series_below(folder: Path, depth: int) -> list[Path]:
    if has_dicom(folder):
        return series_in(folder)[0]
    below = [path for path in visible(folder) if path.is_dir()] if depth else []
    return [series for path in below for series in _series_below(path, depth - 1)]


def _volumes(folder: Path) -> list[Path]:
    """Volumes in a folder and in its label folders."""
    places = [folder, *_subfolders(folder, LABEL_FOLDERS)]
    return [path for place in places for path in files_in(place, VOLUME_SUFFIXES)]


# --------------------------------------------------------------------------------------------------------------- scans


def scan_cases(path: Path, report: Report) -> dict[str, list[Case]]:
    """Test cases: one scan, or every scan and every DICOM series in a folder and the folders in it."""
    if path.is_file():
        return {"test": [{"image": str(path)}]}
    found = _scans(path, report)
    if not found:
        near = "add its dataset.json" if (path / "imagesTr").is_dir() else "list images and labels in a CSV or JSON"
        raise InputError(
            f"{path} has no scans; give {', '.join(SCAN_SUFFIXES)} files or DICOM folders, or {near} (data/README.md)"
        )
    count = Counter(name for name, _ in found)
    doubled = [path for name, path in found if count[name] > 1]
    if doubled:
        names = ", ".join(path.name for path in doubled[:SHOWN]) + ", ..." * (len(doubled) > SHOWN)
        report(Problem("id", f"{path}: scans of one name ({names}) get ids with their endings", stops=False))
    endings = {path: path.name.removeprefix(stem(path)).replace(".", "_") for path in doubled}  # a.nii.gz -> _nii_gz
    return {"test": [{"id": name + endings.get(path, ""), "image": str(path)} for name, path in found]}


def join_channels(cases: Sequence[Case], count: int) -> list[Case]:
    """The cases of a model with `count` channels: CASE_0000, CASE_0001, ... in one folder are the channels of CASE."""
    groups: dict[tuple[Path, str], dict[int, Case]] = {}
    for case in cases if count > 1 else ():
        path = Path(case["image"]) if isinstance(case["image"], str) else None
        match = CHANNEL_FILE.fullmatch(stem(path)) if path and path.is_file() else None
        if path and match:
            groups.setdefault((path.parent, match[1]), {})[int(match[2])] = case
    joined: dict[int, Case | None] = {}
    for group in groups.values():
        if sorted(group) == list(range(count)):  # others fail alone, for want of channels
            first, *others = (group[k] for k in range(count))
            name = re.sub(r"_0000$", "", first["id"])
            joined[id(first)] = first | {"id": name, "image": [group[k]["image"] for k in range(count)]}
            joined |= dict.fromkeys(map(id, others))
    chosen = (joined.get(id(case), case) for case in cases)
    return [case for case in chosen if case is not None]


def _scans(root: Path, report: Report, labels: bool = False) -> list[tuple[str, Path]]:
    """Name and path of every scan file and DICOM series in a folder; what is not used is reported.

    Files that are labels by their names, and links that lead nowhere, are left out unless `labels`.
    """
    passed: dict[str, list[Path]] = defaultdict(list)
    found = _walk(root, passed, DEPTH, set(), labels)
    for reason, paths in passed.items():
        if not paths:
            continue
        names = ", ".join(str(path.relative_to(root)) for path in paths[:SHOWN]) + ", ..." * (len(paths) > SHOWN)
        report(Problem("not used", f"{root}: not used, {reason} ({len(paths)}): {names}", stops=False))
    return [(_name_below(path, root), path) for path in found]


def _walk(folder: Path, passed: dict[str, list[Path]], depth: int, seen: set[Path], keep: bool) -> list[Path]:
    """The scans in a folder and the folders in it; `passed` gets all other files and folders by reason."""
    found: list[Path] = []
    try:
        inside = visible(folder)
        seen.add(folder.resolve())
        broken = [path for path in inside if path.is_symlink() and not path.exists()]
        folders = [path for path in inside if path.is_dir()]
        files = [path for path in inside if path not in broken and path not in folders]
        files = [path for path in files if path.suffix != ".img" or path.with_suffix(".hdr") not in files]
        series = has_dicom(folder)
    except OSError:
        passed["folders that cannot be opened"].append(folder)
        return found
    if series:
        own, others = series_in(folder)
        others += [path for path in files if not is_dicom(path)]
        if len(own) > 1:  # a damaged file may be a slice of any of them; it fails alone
            own += [path for path in others if path.name.lower().endswith(".dcm") and not is_dicom(path)]
        found += own
        others = [path for path in others if path not in own]
        passed["beside a DICOM series"] += others
    else:
        scans = [path for path in files if path.name.lower().endswith(SCAN_SUFFIXES)]
        names = {stem(path) for path in scans}
        labels = [] if keep else [path for path in scans if _is_label_beside(stem(path), names)]
        found += [path for path in scans if path not in labels]
        passed["labels by their names"] += labels
        others = [path for path in files if path not in scans]
        lists = [path for path in others if path.suffix.lower() in (".csv", ".tsv")]
        passed["lists without the columns image and label"] += lists
        passed["no scans of a known format"] += [path for path in others if path not in lists]
    if keep:  # they are missing files of cases
        found += [path for path in broken if path.name.lower().endswith(SCAN_SUFFIXES)]
    else:
        passed["links that lead nowhere (git annex get, datalad get or dvc pull may help)"] += broken
    for path in folders:
        if path.name.lower() in LABEL_FOLDERS or path.name in ("labelsTr", "labelsTs"):
            passed["folders of labels"].append(path)
        elif (path / HIDDEN).is_dir():
            passed["folders that samda wrote"].append(path)
        elif depth == 0 or path.resolve() in seen:
            passed["folders too deep or met twice"].append(path)
        else:
            found += _walk(path, passed, depth - 1, seen, keep)
    return found


def _is_label_beside(name: str, names: Iterable[str]) -> bool:
    """Is this by its name the label of another scan in its folder: CASE_seg of CASE or CASE_t1?"""
    match = LABEL_NAME.fullmatch(name)
    others = set(names) - {name}
    return match is not None and any(match[1] is None or other.startswith(match[1]) for other in others)


def _name_below(path: Path, root: Path) -> str:
    """The name of a scan, with those of the folders below `root`: `p1/ct.nii.gz` -> `p1_ct`, `a.nii/a.nii` -> `a`."""
    if path == root:
        return path.resolve().name
    own = path.name if path.is_dir() else stem(path)
    above = [stem(part) for part in path.relative_to(root).parts[:-1]]
    return "_".join([*(above[:-1] if above and above[-1] == own else above), own])


def files_in(folder: Path, suffixes: Sequence[str] = SCAN_SUFFIXES) -> list[Path]:
    """The files of a folder with one of the suffixes, sorted, without hidden ones; links to missing files are kept."""
    named = [path for path in visible(folder) if path.name.lower().endswith(tuple(s.lower() for s in suffixes))]
    return [path for path in named if path.is_file() or (path.is_symlink() and not path.exists())]


def by_name(paths: Iterable[tuple[str, Path]], report: Report) -> dict[str, Path]:
    """Files by name; of two with one name, the second is reported."""
    found: dict[str, Path] = {}
    for name, path in paths:
        if name in found:
            report(Problem("label", f"{found[name]} and {path} have the same name; keep one", name))
        found.setdefault(name, path)
    return found


def _subfolders(folder: Path, names: Sequence[str]) -> list[Path]:
    return [path for path in visible(folder) if path.is_dir() and path.name.lower() in names]
