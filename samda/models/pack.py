# SPDX-License-Identifier: Apache-2.0
"""A trained model as one file to share: what a stranger needs, and nothing of patients.

A pack is a zip archive whose members are stored without compression:

====================== ====================================================================
`pack.json`            format version, and size and sha256 of every other member
`README.md`            model card, from the record
`adapter.json`         as in the model folder; of the record, the entries of :data:`RECORD`
`adapter.safetensors`  adapters and class head
`base.safetensors`     base weights, where they lie in the model folder
====================== ====================================================================

Reading one runs no code and writes no other names. The hashes tell a damaged or altered pack; they are no signature.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samda.adapters.adapter_file import HEADER, NEXT, TENSORS
from samda.errors import AdapterError, InputError, UsageError, one_line, printable
from samda.io import check_room, file_sha256, new_folder, parse_json, plain, refuse_full, replacing
from samda.models.folder import BASE, own_base, read_model
from samda.models.versions import version_folder
from samda.task import Task
from samda.version import __version__

ABOUT, CARD = "pack.json", "README.md"
MEMBERS = (CARD, HEADER, TENSORS, BASE)
FORMAT_VERSION = 1
LARGEST_TEXT = 64 << 20  # bytes of a member that is no tensor file
PIECE = 1 << 20  # bytes copied at once
# what of the record of a model is shared; whatever else it holds may name patients, files or machines
RECORD: dict[str, Any] = {
    "purpose": None,
    "versions": None,
    "training": ("epochs", "best_epoch", "seconds", "parameters", "split", "cases", "settings", "parent"),
    "version": ("name", "from_version", "rule"),
    "metrics": None,
    "statistics": None,
    "calibration": None,
}


def pack_model(model: str | Path, file: str | Path, version: str | None = None, license: str | None = None) -> Path:
    """Write a version of a model folder (None: the active one) as a pack; an existing file is not replaced.

    Args:
        license: under which the model is shared, for its card.
    """
    file, folder = Path(file), version_folder(model, version)
    if file.exists():
        raise UsageError(f"{file} exists; choose another name")
    model_file, _ = read_model(folder)  # a damaged model is not passed on
    header = parse_json((folder / HEADER).read_text(encoding="utf-8"))
    if header["sha256"] != file_sha256(folder / TENSORS):  # a save was interrupted between the two
        header = parse_json((folder / NEXT).read_text(encoding="utf-8"))
    header["record"] = shared_record(model_file.record)
    texts = {
        CARD: model_card(header, license).encode(),
        HEADER: (json.dumps(plain(header), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    paths = {TENSORS: folder / TENSORS, BASE: own_base(folder) or own_base(Path(model))}
    files = {name: path for name, path in paths.items() if path is not None}
    about = {name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in texts.items()}
    about |= {name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for name, p in files.items()}
    content = {"format_version": FORMAT_VERSION, "samda": __version__, "members": about}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(ABOUT, json.dumps(content, indent=2) + "\n")
            for name, text in texts.items():
                archive.writestr(name, text)
            for name, path in files.items():
                archive.write(path, name)
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror or error}); choose another file") from error
    return file


def shared_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record that are shared."""
    shared = {key: record[key] for key in RECORD if key in record}
    for key, inner in RECORD.items():
        if inner is not None and isinstance(shared.get(key), Mapping):
            shared[key] = {name: shared[key][name] for name in inner if name in shared[key]}
    ancestor = shared.get("training", {})
    while isinstance(ancestor.get("parent"), Mapping):  # names of folders may tell of whom the scans are
        ancestor["parent"] = {key: value for key, value in ancestor["parent"].items() if key != "model"}
        ancestor["parent"]["training"] = ancestor = dict(ancestor["parent"].get("training", {}))
    return shared


def unpack_model(file: str | Path, folder: str | Path) -> Path:
    """Write the model folder of a pack; it appears complete or not at all.

    Raises:
        InputError: no pack, an altered or damaged one, or one with members that a pack does not have.
        AdapterError: its model cannot be read.
        UsageError: the folder holds something, or cannot be made.
    """
    file, folder = Path(file), Path(folder).expanduser()
    refuse_full(folder)
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is no file; give a pack of samda")
    folder = folder.resolve() if folder.is_symlink() else folder
    new = [parent for parent in folder.parents if not parent.exists()]
    try:
        with zipfile.ZipFile(file) as archive:
            about = _checked(archive, file)
            folder.parent.mkdir(parents=True, exist_ok=True)
            check_room(folder.parent, sum(entry["bytes"] for entry in about.values()))
            with new_folder(folder) as place:
                for name, entry in about.items():
                    _extract(archive, name, place / name, entry, file)
                try:
                    read_model(place)
                except (AdapterError, InputError) as error:
                    raise InputError(str(error).replace(str(place), str(file))) from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{file} is no pack of samda, or damaged ({one_line(error)}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{file} cannot be unpacked to {folder} ({error.strerror or one_line(error)})") from error
    finally:
        for parent in new if not folder.exists() else ():
            with contextlib.suppress(OSError):
                parent.rmdir()
    return folder


def _checked(archive: zipfile.ZipFile, file: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and hash of the members, all of which are as they should be by their headers."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    odd = [name for name in names if name not in (ABOUT, *MEMBERS)] or [n for n in names if names.count(n) > 1]
    if odd:
        raise InputError(f"{file} holds {printable(odd[0])!r}, which is no member of a pack; nothing was written")
    for info in infos:
        link = (info.external_attr >> 16) & 0o170000 not in (0, 0o100000)
        if link or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise InputError(f"{file}: {info.filename} is a link, compressed or encrypted; nothing was written")
        if info.file_size != info.compress_size or info.file_size > file.stat().st_size:
            raise InputError(f"{file}: {info.filename} states {info.file_size} bytes; nothing was written")
        if info.filename not in (TENSORS, BASE) and info.file_size > LARGEST_TEXT:
            raise InputError(f"{file}: {info.filename} has {info.file_size} bytes; nothing was written")
    missing = [name for name in (ABOUT, CARD, HEADER, TENSORS) if name not in names]
    if missing:
        raise InputError(f"{file} is no pack of samda, it lacks {missing[0]}; fetch it again")
    try:
        content = parse_json(archive.read(ABOUT))
        version, members = content["format_version"], content["members"]
        about = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in members.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: {ABOUT} is damaged ({one_line(error)}); fetch it again") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{file} has format version {version!r}, this samda reads {FORMAT_VERSION}; update samda")
    if {ABOUT, *about} != set(names):
        raise InputError(f"{file}: {ABOUT} lists other members than there are; fetch it again")
    for info in infos:
        if info.filename != ABOUT and about[info.filename]["bytes"] != info.file_size:
            raise InputError(
                f"{file}: {info.filename} has {info.file_size} bytes, {ABOUT} says {about[info.filename]['bytes']!r}; "
                "nothing was written, fetch it again"
            )
    return about


def _extract(archive: zipfile.ZipFile, name: str, path: Path, entry: Mapping[str, Any], file: Path) -> None:
    digest = hashlib.sha256()
    with archive.open(name) as source, path.open("wb") as target:
        while piece := source.read(PIECE):
            digest.update(piece)
            target.write(piece)
    if digest.hexdigest() != entry["sha256"]:
        raise InputError(f"{file}: {name} was altered (sha256); nothing was written, fetch it again")


def model_card(header: Mapping[str, Any], license: str | None = None) -> str:
    """A model card in Markdown from the content of adapter.json."""
    task, record = Task.from_dict(header["task"]), header["record"]
    training, metrics = record.get("training", {}), record.get("metrics", {})
    cases, version = training.get("cases", {}), record.get("version")
    network, base = header["network"], header["base"]
    backbone = network["backbone"] if isinstance(network["backbone"], str) else network["backbone"].get("name")
    scores = [f"| {_cell(name)} | {_score(value)} |" for name, value in (metrics.get("dice") or {}).items()]
    ancestors, parent = [], training.get("parent")
    while isinstance(parent, Mapping):
        kept = parent.get("training", {})
        count = kept.get("cases", {}).get("training", "?")
        names = ", ".join(parent.get("classes", [])[1:])
        ancestors.append(f"* {_cell(parent.get('task'))} ({_cell(names)}), {count} training cases, "
                         f"sha256 {_cell(str(parent.get('sha256'))[:12])}")  # fmt: skip
        parent = kept.get("parent")
    adapted = []
    if version:
        before, name = _cell(version.get("from_version")), _cell(version.get("name"))
        adapted = [f"These are of the version {before}, from which the one in this pack, {name}, was adapted to the "
                   "scans of a site without labels.", ""]  # fmt: skip
    lines = [
        "---",
        "library_name: samda",
        f"license: {json.dumps(license or 'other')}",
        "tags: [medical-imaging, segmentation, sam]",
        "---",
        f"# {_cell(task.name)}",
        "",
        f"Segments {_cell(', '.join(task.classes[1:]))} in {_modality(task)}. A model of samda: adapters "
        f"({_cell(', '.join(header['adapters']) or 'none')}) and a class head on {_cell(backbone)}.",
        "",
        "```",
        "samda unpack FILE -o model",
        "samda predict -m model -i SCANS -o LABELS",
        "```",
        "",
        "## Intended use and limits",
        "",
        "Research use only, not for clinical decisions. It was trained on the data below; on other scanners, "
        "protocols, patients or diseases it may fail without a warning; `samda adapt` helps with some. Check it on "
        "labeled cases of your own (`samda evaluate`) before you rely on it.",
        "",
        "## Data",
        "",
        f"{cases.get('training', '?')} training and {cases.get('validation', '?')} validation cases; validation "
        f"{_cell(training.get('split', 'unknown'))}. Slices {task.axis}, {task.image_size} pixels of "
        f"{task.spacing:g} mm. The pack holds no scan, no label and no name of a case; statistics in adapter.json "
        "are quantiles and moments over all training slices.",
        *(["", "It was trained from:", "", *ancestors] if ancestors else []),
        "",
        "## Scores",
        "",
        *adapted,
        f"Dice, {_cell(metrics.get('where', 'unknown'))}:",
        "",
        "| class | Dice |",
        "| --- | --: |",
        *(scores or ["| not measured | |"]),
        "",
        "## License",
        "",
        f"Of this model: {_cell(license or 'not stated')}. Base weights: {_cell(base.get('file') or 'in the pack')}, "
        "under their own license. samda: Apache-2.0.",
    ]
    return "\n".join(lines) + "\n"


def _modality(task: Task) -> str:
    return {"CT": "CT scans", "MR": "MR scans", "image": "2-D images"}[task.modality]


def _score(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "not measured"


def _cell(text: Any) -> str:
    """A text without line breaks, markup or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in one_line(printable(str(text))))
