# SPDX-License-Identifier: Apache-2.0
"""Data sets as lists of cases; the layout is detected from the content, not from names."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.data.dicom_files import is_series
from samda.data.dicom_labels import is_dicom_label, label_names
from samda.data.folders import (
    Case,
    Problem,
    Report,
    by_name,
    dicom_cases,
    files_in,
    find_series,
    is_label_of,
    mask_folder,
    masked_cases,
    refuse,
    scan_cases,
)
from samda.data.formats import SCAN_SUFFIXES, stem
from samda.data.layouts import (
    SECTIONS,
    given_cases,
    is_nnunet,
    is_pair_list,
    listed_cases,
    nnunet_cases,
    pair_cases,
    read_channels,
    read_json,
    report_counts,
)
from samda.errors import InputError, UsageError, nearest
from samda.io import files_of
from samda.task import name_id

logger = logging.getLogger(__name__)

LAYOUTS = {
    "datalist": "MONAI or MSD datalist (JSON)",
    "nnunet": "nnU-Net",
    "csv": "CSV of pairs",
    "masks": "images with masks of the same name",
    "dicom": "DICOM series with label volumes",
    "scans": "scans without labels",
}
LISTS = (".csv", ".tsv")
LARGEST_CHANNELS = 3  # input channels of SAM's encoder


@dataclasses.dataclass(frozen=True)
class DataList:
    """The cases of a data set.

    Attributes:
        cases: lists of cases for "training", "validation" and "test", possibly empty.
        labels: class name -> ids in the label files, if the data set defines them.
        layout: a key of `LAYOUTS`.
        channels: names of the channels, if the data set defines them.
        listing: the file that lists the cases, if there is one.
    """

    cases: dict[str, list[Case]]
    labels: dict[str, tuple[int, ...]] | None
    layout: str
    channels: tuple[str, ...] | None = None
    listing: Path | None = None


def read_datalist(path: str | Path, report: Report = refuse, unlabeled: bool = False) -> DataList:
    """Read a data set.

    * a JSON file, or a folder with `dataset.json`, that lists cases under "training", "validation" or "test" (MONAI,
      MSD). Paths are relative to the JSON file; entries have "image" (a path, or a list of one path per channel),
      "label" and optionally "fold", "id", "patient" and "unlabeled" (names of classes that its label lacks); a test
      entry may be a path;
    * a folder whose `dataset.json` lists none: nnU-Net, `imagesTr/CASE_0000.nii.gz` (`_0001`, `_0002` for further
      channels) and `labelsTr/CASE.nii.gz`, or the training cases of its entry "dataset";
    * a CSV file, or a folder with one, with the columns image and label (optionally id, patient, fold, section);
    * a folder with `images` and `masks` (or `labels`) with files of the same names;
    * a folder of DICOM series folders, CASE, with label volumes in them, next to them or in `labels`, or with DICOM
      labels (SEG, RTSTRUCT) that refer to the series; these may also all lie in one folder;
    * any other folder: every scan and every DICOM series (by SeriesInstanceUID) in it and the folders in it is a test
      case; what is not used is reported. With `unlabeled`, also a folder of DICOM series with label volumes;
    * one scan, the folder of one DICOM series, or FOLDER/SeriesInstanceUID of one among several: one test case.

    `report` is called with every problem (missing files, duplicate ids, ...); if it returns, the case is skipped. The
    default raises InputError.
    """
    path = Path(path).expanduser()
    if not path.exists() and is_series(path):
        return _finish(DataList({"test": [{"image": str(path)}]}, None, "scans"), path.parent, report)
    if not path.exists():
        raise InputError(f"there is no data set {path}{_similar(path)}")
    root = path if path.is_dir() else path.parent
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.suffix.lower() == ".json" and listing.is_file():
        return _finish(_from_json(listing, report), root, report)
    pairs = _pair_list(path)
    if pairs is not None:
        return _finish(DataList(pair_cases(pairs, report), None, "csv", listing=pairs), root, report)
    if path.is_dir():
        folders = mask_folder(path)
        if folders is not None:
            return _finish(DataList(masked_cases(*folders, report), None, "masks"), root, report)
        series = {} if unlabeled else find_series(path)
        if series:
            return _finish(DataList(dicom_cases(path, series, report), None, "dicom"), root, report)
    return _finish(DataList(scan_cases(path, report), None, "scans"), root, report)


def find_cases(inputs: str | Path, section: str | None = None) -> list[Case]:
    """The cases of a section of a data set, or of a scan, a folder of scans or a DICOM series, see `read_datalist`.

    `section` is "training", "validation" or "test"; None takes "test".
    """
    data = read_datalist(inputs, unlabeled=section is None)
    chosen = data.cases.get(section or "test", [])
    if not chosen:
        counts = ", ".join(f"{name} ({len(cases)})" for name, cases in data.cases.items() if cases)
        raise UsageError(f"{inputs} holds no cases in section {section or 'test'!r}; choose from {counts or 'none'}")
    return chosen


def is_labeled(path: str | Path) -> bool:
    """Is this, by its layout, a data set of images with labels (not a folder of scans or label files)?"""
    path = Path(path).expanduser()
    if path.is_file():
        return path.suffix.lower() in (".json", *LISTS)
    if (path / "dataset.json").is_file() or _pair_list(path) is not None:
        return True
    return mask_folder(path) is not None or bool(find_series(path))


def _pair_list(path: Path) -> Path | None:
    """The CSV of pairs at or in `path`."""
    if path.is_file():
        return path if path.suffix.lower() in LISTS else None
    found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in LISTS and p.is_file() and is_pair_list(p)]
    if len(found) > 1:
        raise InputError(f"{path} has several lists of pairs ({', '.join(p.name for p in found)}); give one of them")
    return found[0] if found else None


def _from_json(listing: Path, report: Report) -> DataList:
    content = read_json(listing)
    labels = None
    if content.get("labels"):
        try:
            labels = read_labels(content["labels"], listing)
        except InputError as error:
            report(Problem("labels", str(error)))
    channels = read_channels(content)
    layout, read = "nnunet", None
    if isinstance(content.get("dataset"), Mapping):
        read = given_cases
    elif is_nnunet(content, listing):
        read = nnunet_cases
    elif any(isinstance(content.get(key), list) for key in SECTIONS):
        layout, read = "datalist", listed_cases
    if read is not None:
        cases = read(content, listing, report)
        report_counts(content, cases, listing, report)
        return DataList(cases, labels, layout, channels, listing)
    near = [nearest(key, SECTIONS) for key, value in content.items() if isinstance(value, list) and key not in SECTIONS]
    remedy = near[0] if near else 'list cases under "training", "validation" or "test", or add imagesTr and labelsTr'
    raise InputError(f"{listing} lists no cases (keys: {', '.join(content) or 'none'}); {remedy}")


def read_labels(labels: Any, where: str | Path) -> dict[str, tuple[int, ...]]:
    """The `labels` entry of a dataset.json as class name -> ids.

    nnU-Net v2 writes name -> id (or a list of ids), MSD and nnU-Net v1 write "id" -> name. nnU-Net's "ignore" is kept:
    voxels with its id are of no known class, see :class:`samda.data.labels.PartialLabels`.
    """
    expected = f'{where}: labels must be {{"name": id}} or {{"id": "name"}}, got'
    if not isinstance(labels, Mapping) or not labels:
        raise InputError(f"{expected} {labels!r}")
    found: dict[str, tuple[int, ...]] = {}
    if all(_is_id(key) and isinstance(value, str) for key, value in labels.items()):
        for key, name in labels.items():
            found[name] = (*found.get(name, ()), int(key))
    else:
        for name, value in labels.items():
            ids = value if isinstance(value, list) else [value]
            if _is_id(name) or not ids or not all(_is_id(i) for i in ids):
                raise InputError(f"{expected} {name!r}: {value!r}")
            found[str(name)] = tuple(int(i) for i in ids)
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip().lstrip("-").isdigit()


def find_pairs(
    predictions: str | Path, labels: str | Path, section: str | None = None
) -> tuple[dict[str, tuple[Path | None, Path]], Mapping[str, tuple[int, ...]] | None]:
    """Prediction (None if missing) and label of each case, and the label ids of the data set; see `match_cases`."""
    found, dataset_labels = match_cases(predictions, labels, section)
    return {name: (prediction, Path(case["label"])) for name, (prediction, case) in found.items()}, dataset_labels


def match_cases(
    predictions: str | Path, labels: str | Path, section: str | None = None
) -> tuple[dict[str, tuple[Path | None, Case]], Mapping[str, tuple[int, ...]] | None]:
    """Prediction (None if missing) and labeled case of each id, sorted, and the label ids of the data set, if any.

    Cases are matched by name; `CASE_0000` of a prediction is CASE, as in nnU-Net. Two single files always match.

    Args:
        predictions: folder of label maps, or one file.
        labels: folder of label files, one file, or a data set with labels.
        section: of a data set; None takes the sections with predictions.
    """
    root, path = Path(predictions).expanduser(), Path(labels).expanduser()
    groups, dataset_labels = _labels(path, section)
    if not root.exists():
        raise InputError(f"predictions {root} do not exist; check the path")
    if root.is_file() and path.is_file() and not is_labeled(path):
        return {stem(path): (root, {"id": stem(path), "label": str(path)})}, dataset_labels
    found = {stem(root): root} if root.is_file() else _label_maps(root)
    if not found:
        raise InputError(f"{root} has no label maps ({', '.join(SCAN_SUFFIXES)}); give the output folder of predict")
    pairs: dict[str, tuple[Path | None, Case]] = {}
    for group in groups:
        chosen = {name: _prediction_of(name, found) for name in group}
        if any(chosen.values()):
            pairs |= {name: (chosen[name], case) for name, case in group.items()}
    if not pairs:
        names = [", ".join(sorted(group)[:3]) for group in (found, {case for group in groups for case in group})]
        raise InputError(f"no prediction ({names[0]}, ...) matches a label ({names[1]}, ...); use the same names")
    used = {prediction for prediction, _ in pairs.values()}
    unused = [case for case, prediction in found.items() if prediction not in used]
    if unused:
        logger.warning("no label for %d predictions: %s", len(unused), ", ".join(unused))
    return dict(sorted(pairs.items())), dataset_labels


def _prediction_of(label: str, found: Mapping[str, Path]) -> Path | None:
    """The prediction of a label named CASE (also as CASE_mask and the like): CASE or CASE_0000."""
    names = [label, f"{label}_0000", *(name for name in found if is_label_of(label, name))]
    return next((found[name] for name in names if name in found), None)


def _labels(path: Path, section: str | None) -> tuple[list[dict[str, Case]], Mapping[str, tuple[int, ...]] | None]:
    """The labeled cases by id, for each section of a data set; and the data set's ids."""
    if path.exists() and not is_labeled(path):
        found = {stem(path): path} if path.is_file() else _label_maps(path)
        if not found:
            raise InputError(f"{path} contains no label files; give a folder of label files, or a data set")
        listing = path.parent / "dataset.json"  # of nnU-Net's labelsTr
        named = path.is_dir() and listing.is_file() and read_json(listing).get("labels")
        cases = {name: {"id": name, "label": str(file)} for name, file in found.items()}
        return [cases], read_labels(named, listing) if named else None
    data = read_datalist(path)
    groups = {name: {case["id"]: case for case in cases if case.get("label")} for name, cases in data.cases.items()}
    chosen = [group for name, group in groups.items() if group and section in (None, name)]
    if not chosen:
        counts = ", ".join(f"{name} ({len(group)})" for name, group in groups.items())
        raise InputError(f"{path} has no labels in section {section or 'any'}; labels per section: {counts}")
    return chosen, data.labels


def _label_maps(folder: Path) -> dict[str, Path]:
    files = [path for path in files_in(folder) if path.suffix.lower() != ".dcm" or is_dicom_label(path)]
    return by_name(((stem(path), path) for path in files), refuse)


# --------------------------------------------------------------------------------------------------------------- checks


def _finish(data: DataList, root: Path, report: Report) -> DataList:
    """Name every case, and drop cases with missing files, duplicate ids or too many channels."""
    cases = {section: data.cases.get(section, []) for section in ("training", "validation", "test")}
    every = [case for section in cases.values() for case in section]
    _name(every, root)
    left_out = _report_missing(every, report) | _report_doubled(every, data.layout, report)
    for case in every:
        count = len(files_of(case["image"]))
        if count > LARGEST_CHANNELS:
            text = f"{files_of(case['image'])[0]} comes with {count} channel files, the network takes "
            report(Problem("channels", f"{text}{LARGEST_CHANNELS}; select channels in a data list", case["id"]))
            left_out.add(id(case))
    kept = {section: [case for case in chosen if id(case) not in left_out] for section, chosen in cases.items()}
    names = _dicom_names([case for section in kept.values() for case in section], report)
    labels = {**(data.labels or {}), **names} if names else data.labels
    return dataclasses.replace(data, cases=kept, labels=labels)


def _dicom_names(cases: Iterable[Case], report: Report) -> dict[str, tuple[int, ...]]:
    """The names in DICOM labels with their ids."""
    names: dict[str, tuple[int, ...]] = {}
    for case in cases:
        for path in files_of(case.get("label") or []):
            try:
                found = label_names(path) if is_dicom_label(path) else []
            except InputError as error:
                report(Problem("unreadable", str(error), case["id"]))
                continue
            names |= {name: (name_id(name),) for name in found if (name_id(name),) not in names.values()}
    return names


def _name(cases: Sequence[Case], root: Path) -> None:
    """Ids from file names or, if these are not unique (`case1/ct.nii.gz`), from the path below `root`."""
    unnamed = [case for case in cases if not case.get("id")]
    paths = [files_of(case["image"])[0] for case in unnamed]
    stems = [stem(path) for path in paths]
    if len(set(stems)) < len(stems):
        stems = [_path_name(path, root) for path in paths]
    for case, name in zip(unnamed, stems, strict=True):
        case["id"] = name
    for case in cases:
        case["id"] = str(case["id"])


def _path_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts[-2:]
    return "_".join([*(part for part in parts[:-1] if part != ".."), stem(path)])


def _report_missing(cases: Iterable[Case], report: Report) -> set[int]:
    """Report missing files; return the indices of their cases."""
    paths = [(case, path) for case in cases for path in [*files_of(case["image"]), *files_of(case.get("label", []))]]
    missing = [(case, path) for case, path in paths if not _exists(path)]
    if missing and report is refuse:  # one line for all of them
        shown = ", ".join(str(path) for _, path in missing[:5]) + (", ..." if len(missing) > 5 else "")
        text = f"{len(missing)} of {len(paths)} listed files are missing: {shown}{_similar(missing[0][1])}"
        report(Problem("missing", text))
    for case, path in missing:
        report(Problem("missing", f"there is no file {path}{_similar(path)}", case["id"]))
    return {id(case) for case, _ in missing}


def _exists(path: Path) -> bool:
    try:
        return path.exists() or is_series(path)
    except OSError:  # a name that is too long
        return False


def _report_doubled(cases: Sequence[Case], layout: str, report: Report) -> set[int]:
    """Report duplicate ids; return their cases except the first."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case["id"]].append(case)
    doubled = {name: same for name, same in groups.items() if len(same) > 1}
    left_out: set[int] = set()
    for name, same in doubled.items():
        paths = " and ".join(dict.fromkeys(str(files_of(case["image"])[0]) for case in same))
        is_list = layout in ("datalist", "csv")
        remedy = 'give each a unique "id", or keep one' if is_list else "rename or move all but one"
        more = f", as have those of {len(doubled) - 1} more ids" if len(doubled) > 1 and report is refuse else ""
        report(Problem("id", f"{len(same)} cases have the id {name!r} ({paths}){more}; {remedy}", name))
        left_out |= {id(case) for case in same[1:]}
    return left_out


def _similar(path: Path) -> str:
    """A remedy for a missing path. A file of another name may be another patient's, so only spellings are suggested."""
    if path.is_symlink():
        return f"; it is a link to {path.readlink()}, which is not there (git annex get, datalad get or dvc pull?)"
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if not names:
        return f"; there is nothing in {path.parent}"
    same = [name for name in names if _letters(name) == _letters(path.name)]
    return f"; did you mean {same[0]!r}?" if same else "; check the paths"


def _letters(name: str) -> str:
    """A name without suffix, case, and whatever separates words."""
    return "".join(c for c in stem(name).lower() if c.isalnum())
