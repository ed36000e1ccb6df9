# SPDX-License-Identifier: Apache-2.0
"""Graphs of encoder and decoder: read by other programs, they give our numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from samda.adapters import attached, trainable_parameters
from samda.errors import SamdaError, UsageError
from samda.models import export as graphs
from samda.models.export import export_model
from samda.networks.segmenter import SamSegmenter
from samda.task import Task

TASK = Task("t", classes=("background", "a", "b"), image_size=64, window=(-100, 200), spacing=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sam: tiny_vit, sam_da": ("tiny_vit", {"sam_da": {"side": "both"}}),
    "pyramid: tiny_vit": ("tiny_vit", {"lora": {}, "ssf": {}, "intensity": {}}),
    "pyramid: vit, sam_da": ("vit", {"sam_da": {}}),
    "sam: vit, all kinds": (
        "vit",
        {"salt": {"rank": 2}, "lka": {}, "dka": {"large_kernel": 7, "conv_backend": "fft"}, "norm": {}, "sam_da": {}},
    ),
}


@torch.no_grad()
def trained(network: SamSegmenter) -> SamSegmenter:
    """The network with everything that is trained moved by a visible amount."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(network).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def run_onnx(path: Path, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return [torch.from_numpy(result) for result in session.run(None, {name: given[name].numpy() for name in names})]


def run_torch(path: Path, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return torch.export.load(path).module()(*given.values())


RUN = {"onnx": (run_onnx, ".onnx"), "torch": (run_torch, ".pt2")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "onnx") for name in CASES] + [("sam: vit, all kinds", "torch"), ("pyramid: vit, sam_da", "torch")],
)
@torch.no_grad()
def test_graphs_give_our_numbers(
    name: str, kind: str, tmp_path: Path, make_segmenter: Callable[..., SamSegmenter]
) -> None:
    backbone, adapters = CASES[name]
    network = trained(make_segmenter(backbone, adapters=adapters, head=name.partition(": ")[0]))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(7))
    pyramid, logits = network.encode(image), network(image)
    names = {level: f"level_{level}" if level.isdigit() else level for level in network.levels}

    about = export_model(network, tmp_path / "out", TASK, kind, version="clinic-a")
    run, suffix = RUN[kind]
    found = run(tmp_path / "out" / f"encoder{suffix}", {"image": image})
    inner = [level for level in network.levels if level != "image"]
    for level, result in zip(inner, found, strict=True):
        assert torch.allclose(result, pyramid[level], atol=1e-4 * float(pyramid[level].abs().max()))
    own = {"image": image} | dict(zip(inner, found, strict=True))
    (result,) = run(tmp_path / "out" / f"decoder{suffix}", {names[level]: own[level] for level in network.levels})
    assert torch.allclose(result, logits, atol=1e-3 * float(logits.abs().max()))

    assert sorted(path.name for path in tmp_path.joinpath("out").iterdir()) == sorted([*about["files"], "export.json"])
    for file, entry in about["files"].items():
        content = (tmp_path / "out" / file).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"])
        assert entry["difference"] <= 1e-3 * entry["largest"]
    output = about["files"][f"decoder{suffix}"]["output"]
    assert output == {"name": "logits", "shape": [1, 3, 64, 64], "type": "float32"}
    assert about["preprocessing"][0] == "clip to -100 .. 200 HU and map linearly to [0, 1]"
    assert (about["classes"], about["model"]["version"]) == (["background", "a", "b"], "clinic-a")
    assert list(about["model"]["adapters"]) == list(adapters)
    assert json.loads((tmp_path / "out" / "export.json").read_text("utf-8")) == about

    after = network.state_dict()  # the network is untouched, and still of any size
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert list(attached(network)) == list(adapters)
    assert network(torch.rand(1, 1, 96, 32)).shape == (1, 3, 96, 32)


def test_large_onnx_weights_lie_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "INLINE_BYTES", 1000)
    layer, given = torch.nn.Linear(64, 64), torch.rand(1, 64)
    program = torch.export.export(layer.eval(), (given,))
    answer = graphs.write_onnx(program, tmp_path / "layer.onnx", (["x"], ["y"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer.onnx", "layer.onnx.data"]
    assert (tmp_path / "layer.onnx.data").stat().st_size >= 4 * 64 * 64
    onnx.checker.check_model(tmp_path / "layer.onnx")
    assert torch.allclose(answer([given])[0], layer(given), atol=1e-5)


def test_what_does_not_agree_is_not_written(tmp_path: Path, make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = make_segmenter("tiny_vit")
    with torch.no_grad():
        network.image_encoder.neck[0].weight[0] = float("nan")
    with pytest.raises(SamdaError, match=r"encoder.pt2 differs from the network by nan .*nothing was written"):
        export_model(network, tmp_path / "out", TASK, "torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "differs"), [(1.0, False), (1.0009, False), (1.002, True), (float("nan"), True), (float("inf"), True)]
)
def test_compare_allows_a_thousandth(found: float, differs: bool) -> None:
    expected = [(torch.tensor([0.5, -1.0]),)]
    other = [(torch.tensor([0.5, -found]),)]
    if differs:
        with pytest.raises(SamdaError, match=r"file differs from the network by .* \(largest value 1\)"):
            graphs.compare(other, expected, "file")
    else:
        assert graphs.compare(other, expected, "file")["difference"] == pytest.approx(found - 1, abs=1e-6)


def test_refusals(tmp_path: Path, make_segmenter: Callable[..., SamSegmenter]) -> None:
    network = make_segmenter("tiny_vit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for folder, kind, words in [
        ("out", "onx", r"no format 'onx'; did you mean 'onnx'\?"),
        ("full", "onnx", "full exists and is not an empty folder"),
        ("full/file", "onnx", "file exists and is not an empty folder"),
        ("no/where", "onnx", "no does not exist; make it first"),
        ("model.onnx", "onnx", "model.onnx is the name of a file; give a folder, for instance '.*model'"),
    ]:
        with pytest.raises(UsageError, match=words):
            export_model(network, tmp_path / folder, TASK, kind)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
    with pytest.raises(SamdaError, match=r"needs the package no_such_package; pip install 'samda\[export\]'"):
        graphs.need("no_such_package")
