# SPDX-License-Identifier: Apache-2.0
"""MONAI Label serves a trained model folder as a bundle: the same label map as `samda predict`, voxel by voxel."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from environments import environment, surroundings

NAME = "abdomen_segmentation"  # MONAI Label reads the kind of the model from its name
START = 300  # seconds until the server must answer
LIMIT = 1800  # seconds after which the server ends by itself, whatever became of the test
LAUNCH = """
import os, threading
limit = threading.Timer(LIMIT, os._exit, [3])
limit.daemon = True
limit.start()
from monailabel.main import Main
Main().run()
""".replace("LIMIT", str(LIMIT))


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(url: str, data: bytes | None = None, timeout: float = 600) -> bytes:
    """What a server on this machine answers; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, data=data, timeout=timeout) as reply:
        return reply.read()


@pytest.fixture(scope="module")
def server(model: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of MONAI Label's server with the bundle and the scan; it listens on loopback only."""
    python = environment("monailabel")
    place = tmp_path_factory.mktemp("label")
    prefix = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix)"], capture_output=True, encoding="utf-8", check=True
    )
    app = place / "monaibundle"
    shutil.copytree(Path(prefix.stdout.strip()) / "monailabel" / "sample-apps" / "monaibundle", app)
    shutil.copytree(model, app / "model" / NAME)
    (place / "studies").mkdir()
    shutil.copy(scan, place / "studies" / "scan.nii.gz")
    port = free_port()
    command = [str(python), "-c", LAUNCH, "start_server", "--app", str(app), "--studies", str(place / "studies")]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    conf = {"models": NAME, "zoo_source": "ngc", "sam2": "false", "skip_trainers": "true"}
    for key, value in conf.items():  # "ngc" makes it look for the bundle in its folder, without a network
        command += ["--conf", key, value]
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=place, stdout=log, stderr=log, env=surroundings(MONAI_LABEL_SESSION_PATH=str(place / "s"))
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while True:
            try:
                answer(f"{address}/info/", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"no server:\n{(place / 'server.log').read_text('utf-8')[-4000:]}")
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_the_server_knows_the_classes(server: str) -> None:
    info = json.loads(answer(f"{server}/info/"))["models"][NAME]
    assert (info["type"], info["dimension"]) == ("segmentation", 3)
    names = ("liver", "spleen", "kidney_right", "kidney_left", "stomach", "aorta")
    assert info["labels"] == {name: k for k, name in enumerate(names, start=1)}


def test_its_label_map_is_that_of_samda_predict(server: str, model: Path, scan: Path, tmp_path: Path) -> None:
    form = urllib.parse.urlencode({"params": json.dumps({"device": "cpu"})}).encode()
    (tmp_path / "served.nii.gz").write_bytes(answer(f"{server}/infer/{NAME}?image=scan&output=image", form))
    predict = ["predict", "-m", model, "-i", scan, "-o", tmp_path / "own", "--device", "cpu", "--quiet"]
    command = [sys.executable, "-m", "samda", *map(str, predict)]
    subprocess.run(command, check=True, env=surroundings(), timeout=600)
    served, own = nib.load(tmp_path / "served.nii.gz"), nib.load(next((tmp_path / "own").glob("*.nii.gz")))
    a, b = np.asarray(served.dataobj), np.asarray(own.dataobj)
    assert a.shape == b.shape == nib.load(scan).shape
    assert len(np.unique(b)) >= 4, "there are organs to compare"
    assert int((a != b).sum()) == 0
    np.testing.assert_allclose(served.affine, own.affine, atol=1e-5)
