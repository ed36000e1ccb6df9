# SPDX-License-Identifier: Apache-2.0
"""A network as two graphs of one size, encoder and decoder, for programs that have no samda: ONNX and torch.export.

Adapters are part of the graphs: those that merge are merged, the others are modules like any other. Every graph is
read back from its file and compared with the network before anybody else sees it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from samda.adapters.base import modules
from samda.adapters.folding import fold
from samda.adapters.kernel import KernelAdapter
from samda.errors import SamdaError
from samda.networks.attention import DerivedTensors

if TYPE_CHECKING:
    from samda.networks.segmenter import SamSegmenter

__all__ = ["GRAPHS", "compare", "probe_images", "write_graphs"]

TOLERANCE = 1e-3  # of the largest value: how far a graph may be from the network
INLINE_BYTES = 2**30  # weights of an ONNX file; beyond it they lie in a file of their own (protobuf ends at 2 GiB)
OPSET = 18


class Encoder(nn.Module):
    """Images (1, C, H, W) in [0, 1] -> embeddings (1, 256, H / 16, W / 16)."""

    names = ("image", "embedding")
    unused = ("prompt_encoder", "mask_decoder")

    def __init__(self, network: SamSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.encode(image)


class Decoder(nn.Module):
    """Embeddings (1, 256, H / 16, W / 16) -> class logits (1, K, H, W)."""

    names = ("embedding", "logits")
    unused = ("image_encoder",)

    def __init__(self, network: SamSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.network(embedding, embedded=True)


def probe_images(channels: int, size: int) -> list[torch.Tensor]:
    """Images (1, channels, size, size) that graphs are compared on: noise, and a smooth one with an edge."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, channels, size, size, generator=generator)
    ramp = torch.linspace(0, 1, size)
    smooth = (0.5 * ramp[:, None] + 0.5 * ramp[None, :] ** 2).expand(1, channels, size, size).clone()
    smooth[..., size // 4 : size // 2, size // 3 :] = 0.9
    return [noise, smooth]


def write_graphs(network: SamSegmenter, size: int, folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Write encoder and decoder, read them back and compare.

    Args:
        network: a copy on the CPU in single precision, of which nothing remains.
        size: side of the images in pixels.
        folder: where the files go.
        kind: "onnx" or "torch".

    Returns:
        File name -> input, output, the largest absolute difference to the network, and the largest value there.

    Raises:
        SamdaError: a package is missing, or a graph gives other numbers than the network.
    """
    write, suffix = GRAPHS[kind]
    fold(network)
    for _, _, adapter in modules(network):
        if isinstance(adapter, KernelAdapter):
            adapter.backend = "direct"  # what the adapter computes is the same; ONNX runtimes have no FFT of this kind
    probes = probe_images(network.in_channels, size)
    about = {}
    with torch.no_grad(), _quiet():
        embeddings = [network.encode(probe) for probe in probes]
        logits = [network(embedding, embedded=True) for embedding in embeddings]
        _keep_derived(network)
        for part, inputs, outputs in ((Encoder(network), probes, embeddings), (Decoder(network), embeddings, logits)):
            path = folder / f"{type(part).__name__.lower()}{suffix}"
            part.eval()
            with _without(network, part.unused):
                program = torch.export.export(part, (inputs[0],), strict=False)
            answer = write(program, path, part.names)
            found = [answer(each) for each in inputs]
            about[path.name] = _describe(part, inputs[0], outputs[0]) | compare(found, outputs, path.name)
    return about


def write_torch(program: torch.export.ExportedProgram, path: Path, _names: Any) -> Callable[..., torch.Tensor]:
    """Save a program for `torch.export.load`; returns what the file computes."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, names: tuple[str, str]
) -> Callable[..., torch.Tensor]:
    """Save a program as ONNX, its input and output named; returns what onnxruntime computes from the file."""
    need("onnxscript")
    runtime = need("onnxruntime")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    graph = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=names[:1],
        output_names=names[1:],
    )
    assert graph is not None
    graph.save(path, external_data=weights > INLINE_BYTES)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda each: torch.from_numpy(session.run(list(names[1:]), {names[0]: each.numpy()})[0])


GRAPHS: dict[str, tuple[Callable[..., Callable[..., torch.Tensor]], str]] = {
    "onnx": (write_onnx, ".onnx"),
    "torch": (write_torch, ".pt2"),
}


def need(package: str) -> Any:
    """Import a package that only the export to ONNX needs.

    Raises:
        SamdaError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SamdaError(f"export to onnx needs the package {package}; pip install 'samda[export]'") from error


class _Kept:
    """In the place of :class:`DerivedTensors`: what was computed for the one size, as constants of the graph."""

    def __init__(self, derived: DerivedTensors) -> None:
        self.tensors = {key: tensor for key, (_, tensor) in derived._kept.items()}

    def __call__(self, _parameter: torch.Tensor, key: object, _compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.tensors[key]


def _keep_derived(network: nn.Module) -> None:
    """Resized position tables and the like become constants: no runtime has to resize them as torch does."""
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, DerivedTensors):
                setattr(module, name, _Kept(value))


@contextlib.contextmanager
def _without(network: nn.Module, parts: tuple[str, ...]) -> Iterator[None]:
    """A graph holds every parameter of the module that it comes from, also those it does not use."""
    taken = {part: getattr(network, part) for part in parts}
    for part in parts:
        setattr(network, part, nn.Identity())
    try:
        yield
    finally:
        for part, module in taken.items():
            setattr(network, part, module)


def _describe(part: Any, given: torch.Tensor, result: torch.Tensor) -> dict[str, Any]:
    return {
        "input": {"name": part.names[0], "shape": list(given.shape), "type": "float32"},
        "output": {"name": part.names[1], "shape": list(result.shape), "type": "float32"},
    }


def compare(found: list[torch.Tensor], expected: list[torch.Tensor], name: str) -> dict[str, float]:
    """The largest absolute difference, and the largest value.

    Raises:
        SamdaError: the difference is more than a thousandth of the largest value.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(b.abs().max()) for b in expected)
    if not difference <= TOLERANCE * largest:
        raise SamdaError(
            f"{name} differs from the network by {difference:.3g} (largest value {largest:.3g}); nothing was written"
        )
    return {"difference": float(f"{difference:.3g}"), "largest": float(f"{largest:.3g}")}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of every optimization that they leave out; errors still come as errors."""
    chatty = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
