# SPDX-License-Identifier: Apache-2.0
"""Trained models for programs without samda: a folder with the files of one format, and `export.json` about them.

================ ==================================== ==============================================================
format           files                                for
================ ==================================== ==============================================================
`sam`            `sam.pth`, `class_head.safetensors`  `segment_anything` (`vit_b`, `vit_l`, `vit_h`) or MobileSAM's
                                                      package (`vit_t`): a SAM with the adapters in its weights. The
                                                      class head, which SAM does not have, lies apart
`onnx`           `encoder.onnx`, `decoder.onnx`       ONNX runtimes: image to embedding (levels), to class logits
`torch`          `encoder.pt2`, `decoder.pt2`         `torch.export.load`: the same two graphs
================ ==================================== ==============================================================

Adapters are part of the graphs: those that merge are merged, the others are modules like any other. What is written is
read back and compared with the network first, and the difference stands in `export.json`. Graphs hold one size, the
task's `image_size`, and one image per call.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import torch as safetensors

from samda.adapters.attach import fold
from samda.adapters.base import attached, modules
from samda.errors import SamdaError, UsageError, muted, nearest
from samda.io import check_room, file_sha256, new_folder, refuse_full, write_json
from samda.models.sam_file import class_head, sam_state, to_segment_anything
from samda.networks.attention import DerivedTensors
from samda.networks.head import IMAGE
from samda.networks.segmenter import SamSegmenter
from samda.task import Task
from samda.version import __version__

TOLERANCE = 1e-3  # of the largest value: how far a graph may be from the network
INLINE_BYTES = 2**30  # weights of an ONNX file; beyond it they lie in a file of their own (protobuf ends at 2 GiB)
OPSET = 18


class Encoder(nn.Module):
    """Images (1, C, H, W) in [0, 1] -> the levels that the decoder takes beside the image."""

    unused = ("prompt_encoder", "mask_decoder", "class_head")

    def __init__(self, network: SamSegmenter) -> None:
        super().__init__()
        self.network = network
        self.inputs: tuple[str, ...] = (IMAGE,)
        self.outputs = tuple(name for name in network.levels if name != IMAGE)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pyramid = self.network.encode(image)
        return tuple(pyramid[name] for name in self.outputs)


class Decoder(nn.Module):
    """Levels (1, C, H / stride, W / stride), the image among them where the head reads it -> logits (1, K, H, W)."""

    unused = ("image_encoder",)

    def __init__(self, network: SamSegmenter) -> None:
        super().__init__()
        self.network, self.input = network, network.image_encoder.input  # both graphs take the image as it is
        self.inputs, self.outputs = network.levels, ("logits",)

    def forward(self, *levels: torch.Tensor) -> tuple[torch.Tensor]:
        pyramid = dict(zip(self.inputs, levels, strict=True))
        if IMAGE in pyramid:
            pyramid[IMAGE] = self.input(pyramid[IMAGE])  # type: ignore[operator]
        return (self.network(pyramid),)


def graph_name(level: str) -> str:
    """Name of an input or output of a graph: levels that are numbers become identifiers."""
    return f"level_{level}" if level.isdigit() else level


def probe_images(channels: int, size: int) -> list[torch.Tensor]:
    """Images (1, channels, size, size) that graphs are compared on: noise, and a smooth one with an edge."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, channels, size, size, generator=generator)
    ramp = torch.linspace(0, 1, size)
    smooth = (0.5 * ramp[:, None] + 0.5 * ramp[None, :] ** 2).expand(1, channels, size, size).clone()
    smooth[..., size // 4 : size // 2, size // 3 :] = 0.9
    return [noise, smooth]


def write_graphs(network: SamSegmenter, size: int, folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Write encoder and decoder for images of `size` pixels, read them back and compare.

    `network`, a copy on the CPU in single precision, is used up; `kind` is a key of :data:`GRAPHS`. Returns for each
    file its input, output, and how far its results are from the network's.
    """
    write, suffix = GRAPHS[kind]
    fold(network)
    for _, _, adapter in modules(network):
        adapter.prepare_export()
    probes = probe_images(network.in_channels, size)
    about = {}
    with torch.no_grad(), _quiet():
        pyramids = [network.encode(probe) | {IMAGE: probe} for probe in probes]
        parts: tuple[Encoder | Decoder, ...] = (Encoder(network), Decoder(network))
        inputs = [[tuple(pyramid[name] for name in part.inputs) for pyramid in pyramids] for part in parts]
        outputs = [[part(*levels) for levels in given] for part, given in zip(parts, inputs, strict=True)]
        keep_derived(network)
        for part, given, expected in zip(parts, inputs, outputs, strict=True):
            path = folder / f"{type(part).__name__.lower()}{suffix}"
            part.eval()
            with _without(network, part.unused):
                program = torch.export.export(part, given[0], strict=False)
            names = [[graph_name(name) for name in side] for side in (part.inputs, part.outputs)]
            answer = write(program, path, names)
            found = [answer(levels) for levels in given]
            about[path.name] = _describe(names, given[0], expected[0]) | compare(found, expected, path.name)
    return about


Answer = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def write_torch(program: torch.export.ExportedProgram, path: Path, _names: Any) -> Answer:
    """Save a program for `torch.export.load`; returns what the file computes."""
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda levels: loaded(*levels)


def write_onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[Sequence[str]]) -> Answer:
    """Save a program as ONNX, its inputs and outputs named; returns what onnxruntime computes from the file."""
    need("onnxscript")
    runtime = need("onnxruntime")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    graph = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=names[0],
        output_names=names[1],
    )
    assert graph is not None
    graph.save(path, external_data=weights > INLINE_BYTES)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = {name: level.numpy() for name, level in zip(names[0], levels, strict=True)}
        return [torch.from_numpy(result) for result in session.run(list(names[1]), given)]

    return answer


GRAPHS: dict[str, tuple[Callable[..., Answer], str]] = {
    "onnx": (write_onnx, ".onnx"),
    "torch": (write_torch, ".pt2"),
}


def need(package: str) -> Any:
    """Import a package that only the export to ONNX needs."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SamdaError(f"export to onnx needs the package {package}; pip install 'samda[export]'") from error


class _Kept:
    """Replaces :class:`DerivedTensors`: what was computed for the one size becomes a constant of the graph."""

    def __init__(self, derived: DerivedTensors) -> None:
        self.tensors = {key: tensor for key, (_, tensor) in derived._kept.items()}

    def __call__(self, _parameter: torch.Tensor, key: object, _compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.tensors[key]


def keep_derived(network: nn.Module) -> None:
    """Make resized position tables and the like constants, so that no runtime has to resize them as torch does."""
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, DerivedTensors):
                setattr(module, name, _Kept(value))


@contextlib.contextmanager
def _without(network: nn.Module, parts: tuple[str, ...]) -> Iterator[None]:
    """Remove parts that a graph does not use; it would hold their parameters all the same."""
    taken = {part: getattr(network, part) for part in parts if getattr(network, part, None) is not None}
    for part in taken:
        setattr(network, part, nn.Identity())
    try:
        yield
    finally:
        for part, module in taken.items():
            setattr(network, part, module)


def _describe(names: Sequence[Sequence[str]], *tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What goes in and comes out: one description, or a list where there are several."""
    sides = []
    for own, values in zip(names, tensors, strict=True):
        entries = [
            {"name": name, "shape": list(value.shape), "type": "float32"}
            for name, value in zip(own, values, strict=True)
        ]
        sides.append(entries[0] if len(entries) == 1 else entries)
    return dict(zip(("input", "output"), sides, strict=True))


def compare(
    found: Sequence[Sequence[torch.Tensor]], expected: Sequence[Sequence[torch.Tensor]], name: str
) -> dict[str, float]:
    """The largest absolute difference of a result, and its largest value: of the result where their ratio is largest.

    `found` and `expected` hold per probe the results of the file `name` and of the network. A difference of more than
    a thousandth of the largest value is refused.
    """
    worst = {"difference": -1.0, "largest": 1.0}
    for own, wanted in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        difference = max(float((a - b).abs().max()) for a, b in zip(own, wanted, strict=True))
        largest = max(float(b.abs().max()) for b in wanted)
        if not difference <= TOLERANCE * largest:
            raise SamdaError(
                f"{name} differs from the network by {difference:.3g} (largest value {largest:.3g}); "
                "nothing was written"
            )
        if difference * worst["largest"] > worst["difference"] * largest:
            worst = {"difference": difference, "largest": largest}
    return {key: float(f"{value:.3g}") for key, value in worst.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' notes about optimizations they leave out; errors are raised as before."""
    with muted(("torch.onnx", "onnxscript", "onnx_ir", "torch.export")), warnings.catch_warnings(action="ignore"):
        yield


FORMATS = ("sam", *GRAPHS)
ABOUT = "export.json"
PURPOSE = "research use only, not for clinical decisions"
PACKAGES = {"sam": ("torch",), "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torch": ("torch",)}


def export_model(
    network: SamSegmenter, folder: str | Path, task: Task, format: str = "onnx", version: str = "source"
) -> dict[str, Any]:
    """Write a trained network for other programs; the folder appears complete or not at all.

    Args:
        network: with its adapters; it is not changed.
        folder: a new or empty folder.
        task: what the network segments; `image_size` fixes the size of the graphs.
        format: "sam", "onnx" or "torch", see the module.
        version: name of the model's version, for `export.json`.

    Returns:
        The content of `export.json`.

    Raises:
        UsageError: an unknown format, or the folder holds something.
        AdapterError: the format has no place for an adapter.
        WeightsError: the base weights came from no complete SAM file.
        SamdaError: a package is missing, or what was written gives other numbers than the network.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; {nearest(str(format), FORMATS)}")
    folder = check_folder(Path(folder).expanduser())
    weights = sum(parameter.nbytes for parameter in network.parameters())
    check_room(folder.parent, 1.5 * weights)  # encoder, decoder, what both share; PyTorch aborts on a full disk
    own = copy.deepcopy(network).to("cpu", torch.float32).eval()
    try:
        with new_folder(folder) as place:
            if format == "sam":
                files = _write_sam(own, task.image_size, place)
            else:
                files = write_graphs(own, task.image_size, place, format)
            about = _about(network, task, format, version) | {"files": _with_sha256(files, place)}
            write_json(place / ABOUT, about)
    except OSError as error:
        raise UsageError(
            f"nothing can be written to {folder} ({error.strerror or error}); choose another output folder"
        ) from error
    return about


def check_folder(folder: Path) -> Path:
    """Refuse, before any work is done, a folder that holds something, is named like a file, or has no parent."""
    if folder.suffix in (".pth", ".pt", ".pt2", ".onnx", ".safetensors"):
        plain = str(folder.with_suffix(""))
        raise UsageError(f"output {folder} is the name of a file; give a folder, for instance {plain!r}")
    refuse_full(folder)
    if not folder.parent.is_dir():
        raise UsageError(f"output folder {folder} cannot be made, {folder.parent} does not exist; make it first")
    return folder


def _write_sam(network: SamSegmenter, size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """`sam.pth`, read back into a SAM whose embedding of a probe must be the network's; and the class head."""
    probes = probe_images(network.in_channels, size)
    with torch.no_grad():
        expected = [(network.image_encoder(network.normalize(probe)),) for probe in probes]
        torch.save(sam_state(network), folder / "sam.pth")
        (folder / "class_head.safetensors").write_bytes(safetensors.save(class_head(network)))
        sam = to_segment_anything(network.config, folder / "sam.pth")
        found = [(sam.image_encoder(network.normalize(probe)),) for probe in probes]
    return {
        "sam.pth": {"tensors": "all of SAM, adapters merged", **compare(found, expected, "sam.pth")},
        "class_head.safetensors": {"tensors": f"the class head {network.head.name!r}, which SAM's file does not hold"},
    }


def _with_sha256(files: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What is known of each file, its size and its hash; files that came along (ONNX weights) included."""
    names = [*files, *sorted(path.name for path in folder.iterdir() if path.name not in files)]
    sizes = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}
    return {name: size | dict(files.get(name, {})) for name, size in sizes.items()}


def _about(network: SamSegmenter, task: Task, format: str, version: str) -> dict[str, Any]:
    report, size = network.base_report, task.image_size
    return {
        "purpose": PURPOSE,
        "format": format,
        "made_by": {"samda": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES[format]}},
        "model": {
            "backbone": network.config.to_json(),
            "head": network.head_config.to_json(),
            "adapters": {name: config.to_dict() for name, config in attached(network).items()},
            "base": {"file": report.path.name, "sha256": report.sha256} if report else None,
            "version": version,
        },
        "classes": list(task.classes),
        "input": {"shape": [1, network.in_channels, size, size], "range": [0.0, 1.0], "type": "float32"},
        "preprocessing": _preprocessing(task),
        "task": task.to_dict(),
        "loading": _loading(network, format),
    }


def _preprocessing(task: Task) -> list[str]:
    """From a scan to the input, in words; the numbers repeat the task's."""
    low, high = task.window if task.modality == "CT" else task.percentiles
    intensities = {
        "CT": f"clip to {low:g} .. {high:g} HU and map linearly to [0, 1]",
        "MR": f"map the percentiles {low:g} and {high:g} of the voxels in the body to 0 and 1, clip",
        "image": f"map the percentiles {low:g} and {high:g} of all pixels to 0 and 1, clip",
    }[task.modality]
    rows = {"axial": "anterior to posterior", "coronal": "superior to inferior", "sagittal": "superior to inferior"}
    columns = {"axial": "right to left", "coronal": "right to left", "sagittal": "anterior to posterior"}
    return [
        intensities,
        f"cut {task.axis} slices: rows from {rows[task.axis]}, columns from {columns[task.axis]}",
        f"resample each slice to {task.spacing:g} mm per pixel, both directions",
        f"center the body on {task.image_size} x {task.image_size} pixels; pad with 0, or take overlapping windows",
        "softmax over the classes, resample back to the scan, then take the largest; class 0 is background",
    ]


def _loading(network: SamSegmenter, format: str) -> str:
    if format == "sam":
        name = network.config.name
        package = "mobile_sam" if name == "vit_t" else "segment_anything"
        if network.head.name != "sam":
            return (
                f"{package}.sam_model_registry[{name!r}](checkpoint='sam.pth') loads SAM with the adapted encoder. The "
                f"class head {network.head.name!r} reads {', '.join(network.head.reads)}; samda computes it, and the "
                "formats onnx and torch do"
            )
        return (
            f"{package}.sam_model_registry[{name!r}](checkpoint='sam.pth') loads encoder, prompt encoder and the mask "
            "decoder's transformer; SAM's own mask tokens and quality head are those of the base. That package works "
            "at 1024 pixels, on (image - mean) / std with SAM's mean and std for 0 .. 255. Class logits: let the "
            "transformer attend with mask_tokens of class_head.safetensors as its only tokens (no quality token), and "
            "multiply what output_hypernetworks_mlps.k gives for token k with the upscaled image"
        )
    tool = "an ONNX runtime" if format == "onnx" else "torch.export.load (a program: load only what you trust)"
    return f"{tool}: the encoder gives the levels that the decoder takes, by name; one image per call"
