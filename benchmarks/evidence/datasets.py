# SPDX-License-Identifier: Apache-2.0
"""The data sets of the evidence: where their files lie, who trains and who is held out.

They lie in one folder, which is not part of this repository; docs/evidence.md names the sources. `splits.json` holds
the held-out patients of each, the patients that may train, and for each seed the first of them in a random order: one
patient is among the three, the three among the ten, and every method sees the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from samda.data.formats import stem
from samda.io import write_json

SPLITS: dict[str, Any] = json.loads(Path(__file__).with_name("splits.json").read_text(encoding="utf-8"))
ALL = 0  # patients: as many as may train

Case = dict[str, str]  # "id", "patient", "image" and "label" (paths)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        about: what it is.
        source: where it comes from, and its license.
        classes: background first; class k has the id k in the label files.
        folders: pairs of folders (images, labels) of files of the same names.
        patient: pattern of the patient at the start of a file's name.
        counts: of training patients; `ALL` for all of them.
        dimensions: 3 for volumes, 2 for pictures.
        tolerance: of the surface distance, in mm (a pixel of a picture counts as 1 mm).
        elsewhere: another data set that its models are tested on.
    """

    about: str
    source: str
    classes: tuple[str, ...]
    folders: tuple[tuple[str, str], ...]
    patient: str
    counts: tuple[int, ...] = (3, 10, ALL)
    dimensions: int = 2
    tolerance: float = 2.0
    elsewhere: str | None = None


def _pictures(folder: str) -> tuple[tuple[str, str], ...]:
    return ((f"{folder}/images", f"{folder}/masks"),)


DATASETS = {
    "hippocampus": DataSet(
        "T1 MR crops, 1 mm",
        "Medical Segmentation Decathlon, Task04 (medicaldecathlon.com), Vanderbilt University, CC BY-SA 4.0",
        ("background", "Anterior", "Posterior"),
        (("hippocampus/imagesTr", "hippocampus/labelsTr"),),
        r"hippocampus_\d+",
        (1, 3, 10, 30, ALL),
        dimensions=3,
        tolerance=1.0,
    ),
    "lungs_montgomery": DataSet(
        "chest X-ray, 256 x 256",
        "Montgomery County set of the US National Library of Medicine (openi.nlm.nih.gov), reduced to 256 x 256",
        ("background", "lungs"),
        _pictures("lungs_montgomery"),
        r"MCUCXR_\d+",
    ),
    "vessels_chase": DataSet(
        "fundus, 999 x 960, two pictures of each child",
        "CHASE_DB1, Kingston University (blogs.kingston.ac.uk/retinal/chasedb1), CC BY 4.0",
        ("background", "vessel"),
        _pictures("vessels_chase"),
        r"Image_\d+",
        (3, ALL),
        elsewhere="vessels_lesav",
    ),
    "vessels_lesav": DataSet(
        "fundus of another site, 1077 x 960; tests the models of vessels_chase",
        "LES-AV (figshare.com, doi 10.6084/m9.figshare.11857698), CC BY 4.0, arteries and veins joined",
        ("background", "vessel"),
        _pictures("vessels_lesav"),
        r"\d+",
        (),
    ),
    "nuclei_fluo": DataSet(
        "fluorescence microscopy of many labs; each picture counts as a patient",
        "Data Science Bowl 2018 (bbbc.broadinstitute.org/BBBC038), corrected masks, instances joined, CC0",
        ("background", "nucleus"),
        _pictures("nuclei_fluo"),
        r"fluo_\w+",
    ),
    "nuclei_stain": DataSet(
        "stained tissue; each picture counts as a patient",
        "as nuclei_fluo",
        ("background", "nucleus"),
        _pictures("nuclei_stain"),
        r"stain_\w+",
    ),
    "heart_sunnybrook": DataSet(
        "short-axis cine MR, 256 x 256 slices that show the left ventricle; the spacing is lost, lengths are pixels",
        "Sunnybrook Cardiac Data (cardiacatlas.org), CC0",
        ("background", "left ventricle"),
        (*_pictures("heart_sunnybrook/train"), *_pictures("heart_sunnybrook/test")),
        r"SC(?:-[A-Z]+)+-\d+",
    ),
}


def cases_of(name: str, root: Path) -> list[Case]:
    """All cases of a data set.

    Raises:
        FileNotFoundError: a folder or a label is missing.
        ValueError: a file's name does not begin with a patient.
    """
    data, found = DATASETS[name], []
    for images, labels in data.folders:
        if not (root / images).is_dir():
            raise FileNotFoundError(f"there is no folder {root / images}; docs/evidence.md names the source of {name}")
        known = {stem(file): file for file in sorted((root / labels).iterdir())}
        for image in sorted((root / images).iterdir()):
            case = stem(image).removesuffix("_0000")
            patient = re.match(data.patient, case)
            if patient is None:
                raise ValueError(f"{image}: the name does not begin with a patient ({data.patient})")
            if case not in known:
                raise FileNotFoundError(f"{image} has no label {case} in {root / labels}")
            paths = {"image": str(image.resolve()), "label": str(known[case].resolve())}
            found.append({"id": case, "patient": patient.group()} | paths)
    return found


def training_patients(name: str, count: int, seed: int) -> list[str]:
    """The patients that train: the first `count` of the seed's order, or all.

    Raises:
        ValueError: the order of the seed is shorter, or there is no such seed.
    """
    if count == ALL:
        return SPLITS[name]["train"]
    orders = SPLITS[name]["first"]
    if not (0 <= seed < len(orders) and 1 <= count <= len(orders[seed])):
        raise ValueError(f"{name}: splits.json holds no {count} patients of seed {seed}")
    return orders[seed][:count]


def split(name: str, root: Path, count: int, seed: int) -> tuple[list[Case], list[Case]]:
    """Training cases and held-out cases; a data set that only tests has no training cases.

    Raises:
        FileNotFoundError: a patient of the list has no case.
    """
    cases = cases_of(name, root)
    if name not in SPLITS:
        return [], cases
    parts = []
    for patients in (training_patients(name, count, seed), SPLITS[name]["test"]):
        part = [case for case in cases if case["patient"] in patients]
        if missing := sorted(set(patients) - {case["patient"] for case in part}):
            raise FileNotFoundError(f"{name}: no case of patient {', '.join(missing[:5])} in {root}")
        parts.append(part)
    return parts[0], parts[1]


def write_list(name: str, training: list[Case], test: list[Case], file: Path) -> Path:
    """What samda reads: a data list with absolute paths, so that nothing is copied."""
    labels = {label: k for k, label in enumerate(DATASETS[name].classes)}
    write_json(file, {"name": name, "labels": labels, "training": training, "test": test})
    return file
