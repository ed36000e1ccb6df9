# SPDX-License-Identifier: Apache-2.0
"""Example scans, downloaded from two packages, verified and cached.

Abdomen: the reference files in the source distribution of TotalSegmentator (Apache-2.0), one file each of patients A
(CT, and a smaller part of it), B (CT, another scanner, with contrast medium) and M (MR). The labels are predictions of
that project, not expert annotations. Chest: the CT of slicerio (MIT). There is one patient each: not a benchmark.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samda.errors import InputError, nearest
from samda.io import cache_dir, file_sha256, packaged, replacing
from samda.task import Task

PACKAGE, VERSION = "totalsegmentator", "2.18.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03"
MEMBERS = f"{PACKAGE}-{VERSION}/tests/reference_files/"
CHEST = "slicerio==1.4.0"
TIMEOUT = 600  # s, of the download

# scan -> patient, image, label, task; paths below the folder of the examples
SCANS = {
    "A": ("A", "A/ct.nii.gz", "A/labels.nii.gz", "abdomen_ct"),
    "A_small": ("A", "A_small/ct.nii.gz", "A_small/labels.nii.gz", "abdomen_ct"),
    "B": ("B", "B/dicom", "B/labels.nii.gz", "abdomen_ct"),
    "M": ("M", "M/mr.nii.gz", "M/labels.nii.gz", "abdomen_mr"),
    "slicerio": ("slicerio", "slicerio/ct.nrrd", "slicerio/labels.nrrd", "chest_ct"),
}
# datalist -> section -> scans
DATALISTS = {
    "abdomen_ct": {"training": ["A"], "test": ["B"]},
    "abdomen_mr": {"test": ["M"]},
    "chest_ct": {"training": ["slicerio"]},
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One scan with its labels and task (label ids differ between CT and MR)."""

    name: str
    patient: str
    image: Path
    label: Path
    task: Task

    @property
    def case(self) -> dict[str, Any]:
        """The scan as a case."""
        return {"id": self.name, "patient": self.patient, "image": str(self.image), "label": str(self.label)}


class Examples(dict[str, Example]):
    """The scans by name: "A", "A_small", "B", "M" and, if slicerio is installed, "slicerio".

    Attributes:
        folder: of the scans and of the datalists `abdomen_ct.json`, `abdomen_mr.json` and `chest_ct.json`.
    """

    def __init__(self, folder: Path, scans: Mapping[str, Example]) -> None:
        super().__init__(scans)
        self.folder = folder

    def __missing__(self, name: str) -> Example:
        if name in SCANS:
            raise InputError(f"the chest CT is part of slicerio, which is not installed; pip install {CHEST}")
        raise KeyError(f"there is no example scan {name!r}; {nearest(name, SCANS)}")


def fetch_examples(folder: str | Path | None = None) -> Examples:
    """The example scans, downloaded on the first call and verified on every call.

    pip downloads the package with its hash and does not install it; only the required members are unpacked. Without a
    network connection, put the archive into the folder; the error names both.

    Args:
        folder: None is `examples` in samda's cache folder.
    """
    folder = Path(folder).expanduser() if folder is not None else cache_dir() / "examples"
    files = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    if not _complete(folder, files[PACKAGE]):
        _fetch_abdomen(folder, files[PACKAGE])
    chest = _complete(folder, files["slicerio"]) or _copy_chest(folder, files["slicerio"])
    scans = {}
    for name, (patient, image, label, task) in SCANS.items():
        if chest or name != "slicerio":
            loaded = Task.from_file(packaged("configs", "tasks", f"{task}.yaml"))
            scans[name] = Example(name, patient, folder / image, folder / label, loaded)
    for name in DATALISTS:
        _write(folder / f"{name}.json", datalist_text(name).encode())
    return Examples(folder, scans)


def datalist_text(name: str) -> str:
    """The datalist `name` as JSON, its paths relative to the folder of the examples."""
    task = Task.from_file(packaged("configs", "tasks", f"{name}.yaml"))
    labels = {label: ids[0] if len(ids) == 1 else list(ids) for label, ids in (task.labels or {}).items()}
    content: dict[str, Any] = {"name": name, "labels": labels}
    for section, scans in DATALISTS[name].items():
        cases = [(scan, *SCANS[scan]) for scan in scans]
        content[section] = [{"id": i, "patient": p, "image": image, "label": label} for i, p, image, label, _ in cases]
    return json.dumps(content, indent=2) + "\n"


def _complete(folder: Path, files: Mapping[str, Mapping[str, str]]) -> bool:
    return all(
        (folder / path).is_file() and file_sha256(folder / path) == entry["sha256"] for path, entry in files.items()
    )


def _fetch_abdomen(folder: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        archive = folder / ARCHIVE
        if not archive.is_file():
            archive = _download(Path(temporary), archive)
        if file_sha256(archive) != ARCHIVE_SHA256:
            raise InputError(f"{archive} is not {ARCHIVE} of sha256 {ARCHIVE_SHA256}; delete it and fetch it again")
        with tarfile.open(archive) as tar:
            for path, entry in files.items():
                # names, links and modes of the archive are not used
                member = tar.extractfile(MEMBERS + entry["member"])
                content = member.read() if member is not None else b""
                if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                    raise InputError(f"{entry['member']} in {archive} is not the expected file; fetch {ARCHIVE} again")
                _write(folder / path, content)


def _download(target: Path, place: Path) -> Path:
    """Download the source archive to `target`; `place` is the path for a manual copy, named in the error."""
    requirements = target / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(target)]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT, check=False
        )
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if not (target / ARCHIVE).is_file():
        raise InputError(
            f"the example scans cannot be fetched ({reason}); connect to a package index, or put {ARCHIVE} "
            f"(sha256 {ARCHIVE_SHA256}) at {place}"
        )
    return target / ARCHIVE


def _copy_chest(folder: Path, files: Mapping[str, Mapping[str, str]]) -> bool:
    """Copy the files of an installed slicerio; False if they are missing or differ."""
    spec = importlib.util.find_spec("slicerio")  # does not import it
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).parent / "data"
    for path, entry in files.items():
        file = source / entry["member"]
        if not file.is_file() or file_sha256(file) != entry["sha256"]:
            return False
        _write(folder / path, file.read_bytes())
    return True


def _write(path: Path, content: bytes) -> None:
    """Write the file unless its content is the same."""
    if path.is_file() and path.read_bytes() == content:
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)
