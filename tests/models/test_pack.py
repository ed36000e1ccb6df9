# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from samda.adapters.adapter_file import NEXT
from samda.cli.main import main
from samda.errors import InputError, SamdaError, UsageError
from samda.io import file_sha256
from samda.models.folder import load_model, save_model
from samda.models.pack import model_card, pack_model, shared_record, unpack_model
from samda.networks.segmenter import SamSegmenter
from samda.task import Task

TASK = Task(name="liver | <b>", classes=("background", "liver"), image_size=64)
RECORD = {
    "purpose": "research use only",
    "training": {"cases": {"training": 3, "validation": 1}, "split": "by patient", "names": ["Doe^Jane"]},
    "metrics": {"where": "validation cases", "dice": {"liver": 0.912}},
    "history": [{"case": "Doe^Jane"}],
}


@pytest.fixture
def model(make_segmenter: Callable[..., SamSegmenter], tmp_path: Path) -> Path:
    network = make_segmenter("tiny_vit", num_classes=2, head="pyramid", adapters=["ssf"])
    save_model(network, tmp_path / "model", TASK, RECORD, with_base=True)
    for name in ("last.pt", "history.json"):
        (tmp_path / "model" / name).write_text("Doe^Jane")
    (tmp_path / "model" / "tensorboard").mkdir()
    (tmp_path / "model" / "tensorboard" / "events").write_text("Doe^Jane")
    return tmp_path / "model"


@pytest.fixture
def pack(model: Path, tmp_path: Path) -> Path:
    return pack_model(model, tmp_path / "liver.samda.zip", license="CC-BY-4.0")


def test_a_stranger_gets_the_same_model_and_nothing_of_patients(model: Path, pack: Path, tmp_path: Path) -> None:
    assert b"Jane" not in pack.read_bytes()
    assert b"Jane" in (model / "adapter.json").read_bytes()
    assert main(["unpack", str(pack), "-o", str(tmp_path / "got")]) == 0
    names = {path.name for path in (tmp_path / "got").iterdir()}
    assert names == {"README.md", "adapter.json", "adapter.safetensors", "base.safetensors"}
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        answers = [load_model(folder)[0](images) for folder in (model, tmp_path / "got")]
    assert torch.equal(*answers)
    card = (tmp_path / "got" / "README.md").read_text("utf-8")
    assert "# liver \\| \\<b\\>\n" in card
    assert "| liver | 0.912 |" in card
    assert 'license: "CC-BY-4.0"' in card
    assert "3 training and 1 validation cases; validation by patient" in card


def test_nothing_is_replaced(model: Path, pack: Path, tmp_path: Path) -> None:
    before = file_sha256(pack)
    with pytest.raises(UsageError, match="exists; choose another name"):
        pack_model(model, pack)
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        unpack_model(pack, model)
    assert file_sha256(pack) == before


Members = list[tuple[zipfile.ZipInfo, bytes]]


def rewritten(pack: Path, path: Path, change: Callable[[Members], Members]) -> Path:
    with zipfile.ZipFile(pack) as old, zipfile.ZipFile(path, "w") as new:
        for info, content in change([(info, old.read(info)) for info in old.infolist()]):
            new.writestr(info, content)
    return path


def altered(members: Members) -> Members:
    return [(i, c[:-4] + b"\1\2\3\4" if i.filename == "adapter.safetensors" else c) for i, c in members]


def climbing(members: Members) -> Members:
    return [*members, (zipfile.ZipInfo("../evil"), b"x")]


def absolute(members: Members) -> Members:
    return [*members, (zipfile.ZipInfo("/tmp/evil"), b"x")]


def running(members: Members) -> Members:
    return [*members, (zipfile.ZipInfo("configs/train.json"), b"{}")]


def linked(members: Members) -> Members:
    for info, _ in members:
        if info.filename == "README.md":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return [(i, b"/etc/passwd" if i.filename == "README.md" else c) for i, c in members]


def compressed(members: Members) -> Members:
    bomb = zipfile.ZipInfo("README.md")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    return [(bomb, bytes(10**7)) if i.filename == "README.md" else (i, c) for i, c in members]


def unlisted(members: Members) -> Members:
    return [m for m in members if m[0].filename != "base.safetensors"]


def newer(members: Members) -> Members:
    about = json.loads(members[0][1]) | {"format_version": 2}
    return [(members[0][0], json.dumps(about).encode()), *members[1:]]


def repacked(members: Members, name: str, content: bytes, **about: Any) -> Members:
    """With another content of a member, of which pack.json says what is so, but for `about`."""
    listed = json.loads(members[0][1])
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} | about
    listed["members"][name] = entry
    rest = [(i, content if i.filename == name else c) for i, c in members[1:]]
    return [(members[0][0], json.dumps(listed).encode()), *rest]


def resized(members: Members) -> Members:
    card = next(c for i, c in members if i.filename == "README.md")
    return repacked(members, "README.md", card, bytes=math.inf)


def headless(members: Members) -> Members:
    """A header that is what pack.json says, but describes no network."""
    header = json.loads(next(c for i, c in members if i.filename == "adapter.json"))
    del header["network"]["backbone"]
    return repacked(members, "adapter.json", json.dumps(header).encode())


def torn(members: Members) -> Members:
    header = json.loads(next(c for i, c in members if i.filename == "adapter.json"))
    header["record"]["training"] = ["no mapping"]
    return repacked(members, "adapter.json", json.dumps(header).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resized, "README.md has [0-9]+ bytes, pack.json says inf"),
        (headless, r"odd.zip/adapter.json: network lacks 'backbone'"),
        (torn, r"odd.zip/adapter.json: training of the record is damaged"),
        (altered, "adapter.safetensors was altered"),
        (climbing, "holds '../evil', which is no member"),
        (absolute, "holds '/tmp/evil', which is no member"),
        (running, "holds 'configs/train.json', which is no member"),
        (linked, "README.md is a link"),
        (compressed, "README.md is a link, compressed"),
        (unlisted, "lists other members"),
        (newer, "format version 2"),
        (lambda members: members[1:], "it lacks pack.json"),
    ],
)
def test_what_is_no_sound_pack_leaves_nothing(pack: Path, tmp_path: Path, change: Callable, message: str) -> None:
    folder = tmp_path / "new" / "got"
    before = {path.name for path in tmp_path.iterdir()}
    odd = rewritten(pack, tmp_path / "odd.zip", change)
    with pytest.raises(SamdaError, match=message) as caught:
        unpack_model(odd, folder)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before | {"odd.zip"}


@pytest.mark.parametrize("cut", [0, 10, -30])
def test_a_damaged_file_is_refused(pack: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "odd.zip").write_bytes(pack.read_bytes()[:cut])
    with pytest.raises(SamdaError, match="no pack of samda, or damaged"):
        unpack_model(tmp_path / "odd.zip", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_member_that_states_more_bytes_than_the_file_has_is_refused(pack: Path, tmp_path: Path) -> None:
    content = bytearray(pack.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"adapter.safetensors"))
    for offset in (20, 24):  # sizes in the central directory
        content[place + offset : place + offset + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "odd.zip").write_bytes(content)
    with pytest.raises(SamdaError, match="states 2147483648 bytes"):
        unpack_model(tmp_path / "odd.zip", tmp_path / "got")


def test_an_interrupted_save_is_packed_as_it_is_read(model: Path, tmp_path: Path) -> None:
    """New tensors stand, their header is still called .adapter.json.next."""
    (model / NEXT).write_bytes((model / "adapter.json").read_bytes())
    header = json.loads((model / "adapter.json").read_text("utf-8")) | {"sha256": "0" * 64}
    (model / "adapter.json").write_text(json.dumps(header))
    folder = unpack_model(pack_model(model, tmp_path / "a.zip"), tmp_path / "got")
    assert file_sha256(folder / "adapter.safetensors") == file_sha256(model / "adapter.safetensors")


def test_names_of_ancestors_folders_stay_here_and_an_adapted_version_is_named(model: Path, tmp_path: Path) -> None:
    grandparent = {"model": "Doe^Jane", "task": "liver", "training": {}}
    descent = {"model": "Doe^Jane", "task": "liver", "training": {"parent": grandparent}}
    record = RECORD | {"version": {"name": "clinic-a", "from_version": "source", "input_sha256": ["0"]}}
    shared = shared_record(record | {"training": {"parent": descent}})
    assert shared["version"] == {"name": "clinic-a", "from_version": "source"}
    assert "Jane" not in json.dumps(shared) and descent["model"] == "Doe^Jane"
    header = json.loads((model / "adapter.json").read_text("utf-8")) | {"record": shared}
    assert "the version source, from which the one in this pack, clinic-a, was adapted" in model_card(header)


def test_a_pipe_is_no_pack(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no file"):
        unpack_model(tmp_path / "pipe", tmp_path / "got")


def test_a_pack_is_no_model_folder(pack: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["predict", "-m", str(pack), "-i", str(pack), "-o", "out"]) == 1
    assert f"samda unpack {pack} -o FOLDER" in capsys.readouterr().err
