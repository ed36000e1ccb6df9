# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samda.cli.main import main
from samda.errors import SamdaError, UsageError
from samda.io import file_sha256
from samda.models.folder import load_model, save_model
from samda.models.pack import pack_model, unpack_model
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
    folder = tmp_path / "got"
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
