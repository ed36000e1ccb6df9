# SPDX-License-Identifier: Apache-2.0
"""The fingerprint tells base weights apart, and does not mind how their batch norms are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samda.errors import WeightsError
from samda.networks.fingerprint import check_fingerprint, compute_fingerprint
from samda.networks.segmenter import SamSegmenter
from samda.networks.weights import read_state

Make = Callable[..., SamSegmenter]


def with_other_norms(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same function with other batch norms: what they scale by more, their convolution scales by less."""
    generator, changed = torch.Generator().manual_seed(seed), dict(state)
    for name in [name for name in state if name.endswith(".bn.weight")]:
        prefix = name.removesuffix("bn.weight")
        old = {key: state[f"{prefix}bn.{key}"].double() for key in ("weight", "bias", "running_mean", "running_var")}
        new = {key: torch.rand(len(old["bias"]), generator=generator).double() + 0.5 for key in old}
        scale, new_scale = (norm["weight"] / (norm["running_var"] + 1e-5).sqrt() for norm in (old, new))
        changed[f"{prefix}c.weight"] = (state[f"{prefix}c.weight"] * (scale / new_scale).view(-1, 1, 1, 1)).float()
        new["bias"] = old["bias"] - old["running_mean"] * scale + new["running_mean"] * new_scale
        changed |= {f"{prefix}bn.{key}": tensor.float() for key, tensor in new.items()}
    return changed


def check_same(first: SamSegmenter, second: SamSegmenter) -> None:
    stored = json.loads(json.dumps(first.fingerprint()))
    check_fingerprint(second, stored)
    for part, numbers in stored["response"].items():
        a, b = torch.tensor(numbers), torch.tensor(second.fingerprint()["response"][part])
        assert (a - b).norm() < 1e-4 * a.norm()


def test_batch_norms_folded_or_not(make_segmenter: Make, tiny_tinyvit_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(with_other_norms(torch.load(tiny_tinyvit_weights, weights_only=True), seed=0), path)
    check_same(make_segmenter("tiny_vit"), make_segmenter("tiny_vit", weights=path))


def test_batch_norms_folded_or_not_in_the_real_weights(vit_t_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "mobile_sam_written_otherwise.pt"
    torch.save(with_other_norms(read_state(vit_t_weights), seed=1), path)
    check_same(SamSegmenter("vit_t", weights=vit_t_weights), SamSegmenter("vit_t", weights=path))


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_adapters_head_and_classes_play_no_part(make_segmenter: Make, kind: str) -> None:
    plain = make_segmenter(kind)
    network = make_segmenter(kind, num_classes=5, in_channels=3, adapters={"lora": {}, "lka": {}, "sam_da": {}})
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert compute_fingerprint(network) == compute_fingerprint(plain)


def test_a_trained_base_keeps_the_fingerprint_of_its_start(make_segmenter: Make) -> None:
    plain, network = make_segmenter("tiny_vit"), make_segmenter("tiny_vit", adapters={"full": {}})
    with torch.no_grad():
        network.image_encoder.neck[0].weight.mul_(2)
    check_fingerprint(network, plain.fingerprint())
    with pytest.raises(WeightsError):
        check_fingerprint(plain, compute_fingerprint(network))


def test_other_weights_are_refused_by_both_names(make_segmenter: Make, tiny_weights: Path, tmp_path: Path) -> None:
    state = torch.load(tiny_weights, weights_only=True)
    state["image_encoder.blocks.0.mlp.lin1.weight"] *= 1.05
    path = tmp_path / "medical.pth"
    torch.save(state, path)
    other = make_segmenter(weights=path)
    with pytest.raises(WeightsError) as caught:
        check_fingerprint(other, make_segmenter().fingerprint())
    message = str(caught.value)
    assert "test_vit (tiny_vit.pth)" in message and "test_vit (medical.pth)" in message
    assert "another answer of the image encoder" in message


def test_every_tensor_counts(make_segmenter: Make) -> None:
    network = make_segmenter()
    stored = network.fingerprint()
    stored["norms"]["mask_decoder.output_upscaling.0.weight"] *= 1.01
    with pytest.raises(WeightsError, match=r"norm of mask_decoder\.output_upscaling\.0\.weight"):
        check_fingerprint(network, stored)


def test_another_backbone_is_refused(make_segmenter: Make) -> None:
    with pytest.raises(WeightsError, match=r"trained on test_vit \(.*holds test_tinyvit \(.*another backbone"):
        check_fingerprint(make_segmenter("tiny_vit"), make_segmenter().fingerprint())


def test_a_new_base_has_a_new_fingerprint(make_segmenter: Make) -> None:
    network, other = make_segmenter(), make_segmenter(weights=None)
    before = network.fingerprint()
    other.full_state_dict = True
    network.load_state_dict(other.state_dict())
    assert network.fingerprint()["response"] != before["response"]


def test_damaged_weights_are_refused(make_segmenter: Make, tiny_weights: Path, tmp_path: Path) -> None:
    state = torch.load(tiny_weights, weights_only=True)
    state["image_encoder.neck.0.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(WeightsError, match=r"damaged\.pth: the weights give values that are not finite"):
        make_segmenter(weights=tmp_path / "damaged.pth")


def test_the_caller_cannot_change_it(make_segmenter: Make) -> None:
    network = make_segmenter()
    network.fingerprint()["norms"].clear()
    assert network.fingerprint()["norms"]
