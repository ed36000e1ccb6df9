# SPDX-License-Identifier: Apache-2.0
"""Packs in a hub, by the real client against a local server that keeps its files in memory."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

from samda.cli.main import main
from samda.models.folder import load_model, save_model
from samda.networks.segmenter import SamSegmenter
from samda.task import Task

TASK = Task(name="liver", classes=("background", "liver"), image_size=64)
TOKEN = "hf_testtoken"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's interface that uploads and downloads use; pages of the huggingface_hub client name it."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    blobs: dict[str, bytes]  # of large files, by sha256
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit(), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.repositories.items())).encode()).hexdigest()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body, parts = self.body(), unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if parts[-1] == "validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.repositories:
                return self.answer({"error": "exists", "url": self.url(name)}, 409)
            self.repositories[name] = {".gitattributes": b"*.zip filter=lfs"}
            self.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            return self.answer({"url": self.url(name)})
        if parts[-1] == "batch":
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.url('lfs')}/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        files = self.repositories["/".join(parts[2:4])]
        if parts[4] == "preupload":
            modes = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if ".zip" in f["path"] else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        assert parts[4:] == ["commit", "main"]
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        return self.answer({"commitUrl": f"{self.url('/'.join(parts[2:4]))}/commit/1", "commitOid": "1" * 40})

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.split("/")[-1]
        self.blobs[self.path.split("/")[-1]] = content
        self.answer()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            files = self.repositories["/".join(parts[2:4])]
            rows = [{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in files.items()]
            return self.answer(rows)
        name, file = "/".join(parts[:2]), parts[-1]
        if name not in self.repositories:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if parts[3] != "main":
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if file not in self.repositories[name]:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = self.repositories[name][file]
        return self.answer(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    do_HEAD = do_GET

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    class Own(Hub):
        repositories, private, blobs = {}, {}, {}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def samda(
    hub: http.server.ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> Command:
    """The command -> exit code and the last line of its errors; its client uses the local server and a cache here."""
    address = f"http://127.0.0.1:{hub.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server takes large files as Git LFS sends them
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*words: object) -> tuple[int, str]:
        code = main([*map(str, words)])
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def model(make_segmenter: Callable[..., SamSegmenter], tmp_path: Path) -> Path:
    network = make_segmenter("tiny_vit", num_classes=2, head="pyramid", adapters=["ssf"])
    save_model(network, tmp_path / "model", TASK, {"history": [{"case": "Doe^Jane"}]}, with_base=True)
    return tmp_path / "model"


def test_a_pulled_model_is_the_pushed_one(
    samda: Command, hub: http.server.ThreadingHTTPServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert samda("push", model, "clinic/liver", "--license", "CC-BY-4.0")[0] == 0
    handler = hub.RequestHandlerClass
    files = handler.repositories["clinic/liver"]  # type: ignore[attr-defined]
    assert set(files) == {".gitattributes", "README.md", "model.samda.zip"}
    assert handler.private["clinic/liver"]  # type: ignore[attr-defined]
    assert b'license: "CC-BY-4.0"' in files["README.md"]
    assert not any(b"Jane" in content for content in files.values())
    assert samda("push", model, "clinic/liver")[0] == 0  # again: a new commit
    assert b'license: "other"' in files["README.md"]
    assert samda("pull", "clinic/liver", "-o", tmp_path / "got")[0] == 0
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(*(load_model(folder)[0](images) for folder in (model, tmp_path / "got")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert samda("pull", "clinic/liver", "-o", tmp_path / "again")[0] == 0


def test_what_a_hub_refuses_is_one_line(
    samda: Command, hub: http.server.ThreadingHTTPServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repositories = hub.RequestHandlerClass.repositories  # type: ignore[attr-defined]
    repositories["clinic/other"] = {"README.md": b"mine"}
    pull = ("-o", tmp_path / "got")
    cases = {
        ("push", model, "clinic/other"): "README.md",
        ("push", model, "liver"): "OWNER/NAME",
        ("pull", "clinic/missing", *pull): "clinic/missing",
        ("pull", "clinic/other", *pull): "clinic/other",
        ("pull", "clinic/other", "--revision", "v9", *pull): "v9",
        ("pull", "clinic/o ther", *pull): "clinic/o ther",
    }
    for words, named in cases.items():
        code, line = samda(*words)
        assert code in (1, 2) and line.startswith(f"samda {words[0]}: ") and named in line, line
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, line = samda("push", model, "clinic/liver")
    assert code == 1 and "hf auth login" in line
    assert not (tmp_path / "got").exists()
    assert repositories == {"clinic/other": {"README.md": b"mine"}}
