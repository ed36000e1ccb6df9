# SPDX-License-Identifier: Apache-2.0
"""Data sets without a list: images with masks of the same name, DICOM series with their labels, and plain scans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samda.data.formats import SCAN_SUFFIXES, VOLUME_SUFFIXES, stem
from samda.data.itk import has_dicom
from samda.data.listings import Case
from samda.data.problems import Problem, Report
from samda.errors import InputError

__all__ = ["Series", "dicom_cases", "find_series", "mask_folder", "masked_cases", "scan_cases"]

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
