# SPDX-License-Identifier: Apache-2.0
"""Which label map belongs to which label file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from samda.data.datalists import is_labeled, read_datalist
from samda.data.formats import SCAN_SUFFIXES, stem
from samda.errors import InputError

__all__ = ["find_pairs"]

logger = logging.getLogger(__name__)


def find_pairs(
    predictions: str | Path, labels: str | Path, section: str | None = None
) -> tuple[dict[str, tuple[Path | None, Path]], Mapping[str, tuple[int, ...]] | None]:
    """Prediction and label of each case, and the data set's own label ids.

    Cases pair by name; nnU-Net's `CASE_0000` of a prediction means CASE. Two single files always pair.

    Args:
        predictions: folder of label maps, or one file.
        labels: folder of label files, one file, or a data set whose cases have labels.
        section: of a data set; None takes the sections of which there are predictions.

    Returns:
        case -> (prediction, or None if it is missing, and label), sorted by case; name -> ids, where the data set
        states them

    Raises:
        InputError: no predictions, no labels, or not a single pair.
    """
    root, path = Path(predictions).expanduser(), Path(labels).expanduser()
    groups, dataset_labels = _labels(path, section)
    if not root.exists():
        raise InputError(f"there are no predictions {root}; check the path")
    if root.is_file() and path.is_file() and not is_labeled(path):
        return {stem(path): (root, path)}, dataset_labels
    found = {stem(root): root} if root.is_file() else _files(root)
    if not found:
        raise InputError(f"{root} holds no label maps ({', '.join(SCAN_SUFFIXES)}); give the output folder of predict")
    pairs: dict[str, tuple[Path | None, Path]] = {}
    for group in groups:
        chosen = {case: found.get(case) or found.get(f"{case}_0000") for case in group}
        if any(chosen.values()):
            pairs |= {case: (chosen[case], label) for case, label in group.items()}
    if not pairs:
        names = [", ".join(sorted(group)[:3]) for group in (found, {case for group in groups for case in group})]
        raise InputError(f"no prediction ({names[0]}, ...) has the name of a label ({names[1]}, ...); name them alike")
    used = {prediction for prediction, _ in pairs.values()}
    unused = [case for case, prediction in found.items() if prediction not in used]
    if unused:
        logger.warning("no label for %d predictions: %s", len(unused), ", ".join(unused))
    return dict(sorted(pairs.items())), dataset_labels


def _labels(path: Path, section: str | None) -> tuple[list[dict[str, Path]], Mapping[str, tuple[int, ...]] | None]:
    """Case -> label file, for each section of a data set; and the data set's ids."""
    if path.is_dir() and not is_labeled(path):
        found = _files(path)
        if not found:
            raise InputError(f"{path} holds no label files; give a folder of label files, or a data set")
        return [found], None
    if path.is_file() and not is_labeled(path):
        return [{stem(path): path}], None
    data = read_datalist(path)
    groups = {name: {c["id"]: Path(c["label"]) for c in cases if c.get("label")} for name, cases in data.cases.items()}
    chosen = [group for name, group in groups.items() if group and section in (None, name)]
    if not chosen:
        counts = ", ".join(f"{name} ({len(group)})" for name, group in groups.items())
        raise InputError(f"{path} holds no labels in section {section or 'any'}; labels per section: {counts}")
    return chosen, data.labels


def _files(folder: Path) -> dict[str, Path]:
    suffixes = tuple(s for s in SCAN_SUFFIXES if s != ".dcm")
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.lower().endswith(suffixes)]
    found: dict[str, Path] = {}
    for path in files:
        if path.name.startswith("."):
            continue
        if stem(path) in found:
            raise InputError(f"{found[stem(path)]} and {path} bear one case name; keep one")
        found[stem(path)] = path
    return found
