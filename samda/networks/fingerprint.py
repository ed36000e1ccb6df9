# SPDX-License-Identifier: Apache-2.0
"""Which base weights a network holds: its answer to a fixed probe, and the norm of every tensor it computes with.

Batch norms count together with their convolution, so the same base with batch norms folded or not has the same
fingerprint. Compared with a tolerance: devices and libraries round differently, other weights differ by far more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from samda.adapters.base import disabled
from samda.errors import WeightsError
from samda.networks.ops import ConvNorm

TOLERANCE = 1e-3  # relative
PROBE_SIZE = 64  # pixels
GROUPS = 32  # numbers kept of each part of the answer
UNUSED = ("prompt_encoder.point_embeddings", "prompt_encoder.not_a_point_embed", "prompt_encoder.mask_downscaling")


def compute_fingerprint(network: Any) -> dict[str, Any]:
    """The fingerprint of the base of a `SamSegmenter`; adapters and class head play no part.

    Returns:
        Plain values: `backbone` and `file` (names), `response` (part -> numbers), `norms` (tensor -> Euclidean norm).

    Raises:
        WeightsError: the network does not answer with finite numbers.
    """
    report = network.base_report
    with torch.no_grad(), disabled(network):
        response = {part: _summary(answer) for part, answer in _respond(network)}
        norms = {name: _round(tensor.float().norm().item()) for name, tensor in _base_tensors(network)}
    if not all(number == number and abs(number) != float("inf") for part in response.values() for number in part):
        raise WeightsError(f"{report.path if report else 'the base'}: the weights give values that are not finite")
    file = report.path.name if report else None
    return {"backbone": network.config.name, "file": file, "response": response, "norms": norms}


def check_fingerprint(network: Any, stored: Mapping[str, Any]) -> None:
    """Refuse a `SamSegmenter` whose base is not the one of the `stored` fingerprint.

    Raises:
        WeightsError: naming both, and the first difference.
    """
    own = network.fingerprint()
    difference = _difference(own, stored)
    if difference:
        raise WeightsError(
            f"other base weights: the model was trained on {_name(stored)}, this network holds {_name(own)} "
            f"({difference}); give the file it was trained on as weights"
        )


def response_of(fingerprint: Mapping[str, Any]) -> torch.Tensor:
    """The answer of a fingerprint as one tensor."""
    return torch.tensor(
        [number for part in sorted(fingerprint["response"]) for number in fingerprint["response"][part]]
    )


def same_response(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are these two answers of one base?"""
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm() + 1e-6)


def _name(fingerprint: Mapping[str, Any]) -> str:
    return f"{fingerprint['backbone']} ({fingerprint.get('file') or 'weights of no file'})"


def _difference(own: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    if own["backbone"] != stored["backbone"]:
        return "another backbone"
    for part, numbers in own["response"].items():
        a, b = torch.tensor(numbers), torch.tensor(stored["response"].get(part, []))
        if not same_response(a, b):
            return f"another answer of the {part} to the probe"
    if own["norms"].keys() != stored["norms"].keys():
        return "other tensors"
    for name, norm in own["norms"].items():
        if abs(norm - stored["norms"][name]) > TOLERANCE * abs(stored["norms"][name]) + 1e-6:
            return f"norm of {name} {norm:.6g} instead of {stored['norms'][name]:.6g}"
    return None


def _wave(*shape: int, step: float) -> torch.Tensor:
    """A fixed pattern in [-1, 1] that needs no random generator."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step).view(shape).float()


def _respond(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of the base's answer, channels in dimension 1."""
    device = network.pixel_mean.device
    embedding = network.image_encoder(_wave(1, 3, PROBE_SIZE, PROBE_SIZE, step=0.37).to(device))
    yield "image encoder", embedding
    if network.mask_decoder is None:
        return
    tokens = _wave(1, 2, embedding.shape[1], step=0.61).to(device)
    tokens, image = network.mask_decoder(embedding, *network.prompts(embedding), tokens)
    yield "mask decoder (tokens)", tokens.transpose(1, 2)
    yield "mask decoder (image)", image


def _summary(answer: torch.Tensor) -> list[float]:
    """`GROUPS` means over neighboring channels and all positions."""
    means = answer.float().flatten(2).mean(2)
    return [_round(value) for value in nn.functional.adaptive_avg_pool1d(means, GROUPS)[0].tolist()]


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _base_tensors(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the base by name; convolutions as they are with their batch norm folded in."""
    skipped = set(network.head_params())
    for path, module in network.named_modules():
        if isinstance(module, ConvNorm):
            weight, bias = module.fold()
            yield f"{path}.weight", weight
            yield f"{path}.bias", bias
            skipped |= {f"{path}.{name}" for name, _ in module.named_parameters()}
        elif ".adapters." not in f"{path}.":
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{name}"
                if full not in skipped and not full.startswith(UNUSED):
                    yield full, parameter
    if network.prompt_encoder is not None:
        yield "prompt_encoder.pe_layer", network.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
