# SPDX-License-Identifier: Apache-2.0
"""A trained model for programs that have no samda: a folder with the files of one format, and `export.json` about them.

================ ==================================== ==============================================================
format           files                                for
================ ==================================== ==============================================================
`sam`            `sam.pth`, `class_head.safetensors`  `segment_anything` (`vit_b`, `vit_l`, `vit_h`) or MobileSAM's
                                                      package (`vit_t`): a SAM with the adapters in its weights. The
                                                      class head, which SAM does not have, lies apart
`onnx`           `encoder.onnx`, `decoder.onnx`       ONNX runtimes: image to embedding, embedding to class logits
`torch`          `encoder.pt2`, `decoder.pt2`         `torch.export.load`: the same two graphs
================ ==================================== ==============================================================

What is written is read back and compared with the network first, and the difference stands in `export.json`. Graphs
hold one size, the task's `image_size`, and one image a call.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import torch as safetensors

from samda.adapters.base import attached
from samda.errors import UsageError, nearest
from samda.files import check_room, new_folder, write_json
from samda.networks.files import sha256_of
from samda.networks.graphs import GRAPHS, compare, probe_images, write_graphs
from samda.networks.sam_file import class_head, sam_state
from samda.version import __version__

if TYPE_CHECKING:
    from samda.data.task import Task
    from samda.networks.segmenter import SamSegmenter

__all__ = ["FORMATS", "check_folder", "export_model"]

FORMATS = ("sam", *GRAPHS)
ABOUT = "export.json"
PURPOSE = "research use only, not for clinical decisions"
PACKAGES = {"sam": ("torch",), "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torch": ("torch",)}


def export_model(
    network: SamSegmenter, folder: str | Path, task: Task, format: str = "onnx", version: str = "source"
) -> dict[str, Any]:
    """Write a trained network for other programs; the folder appears complete or not at all.

    Args:
        network: with its adapters; it stays as it is.
        folder: a new or empty folder.
        task: what the network segments; `image_size` fixes the size of the graphs.
        format: "sam", "onnx" or "torch", see :mod:`samda.networks.export`.
        version: name of the model's version, for `export.json`.

    Returns:
        The content of `export.json`: files with their sha256 and difference, classes, preprocessing, input, versions.

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
    """The folder, if an export can be put there: asked before any work is done.

    Raises:
        UsageError: it holds something, is named like a file, or the folder above it is missing.
    """
    if folder.suffix in (".pth", ".pt", ".pt2", ".onnx", ".safetensors"):
        plain = str(folder.with_suffix(""))
        raise UsageError(f"output {folder} is the name of a file; give a folder, for instance {plain!r}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"output {folder} exists and is no empty folder; choose another name")
    if not folder.parent.is_dir():
        raise UsageError(f"output folder {folder} cannot be made, {folder.parent} does not exist; make it first")
    return folder


def _write_sam(network: SamSegmenter, size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """`sam.pth`, read back into a SAM whose embedding of a probe must be the network's; and the class head."""
    from samda.networks.original import to_segment_anything

    probes = probe_images(network.in_channels, size)
    with torch.no_grad():
        expected = [network.encode(probe) for probe in probes]
        torch.save(sam_state(network), folder / "sam.pth")
        (folder / "class_head.safetensors").write_bytes(safetensors.save(class_head(network)))
        sam = to_segment_anything(network.config, folder / "sam.pth")
        images = [(probe.expand(-1, 3, -1, -1) - network.pixel_mean) / network.pixel_std for probe in probes]
        found = [sam.image_encoder(image) for image in images]
    return {
        "sam.pth": {"tensors": "all of SAM, adapters merged", **compare(found, expected, "sam.pth")},
        "class_head.safetensors": {
            "tensors": "mask tokens and hypernetworks of the classes; SAM has no place for them"
        },
    }


def _with_sha256(files: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What is known of each file, its size and its hash; files that came along (ONNX weights) included."""
    names = [*files, *sorted(path.name for path in folder.iterdir() if path.name not in files)]
    sizes = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    return {name: size | dict(files.get(name, {})) for name, size in sizes.items()}


def _about(network: SamSegmenter, task: Task, format: str, version: str) -> dict[str, Any]:
    report, size = network.base_report, task.image_size
    return {
        "purpose": PURPOSE,
        "format": format,
        "made_by": {"samda": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES[format]}},
        "model": {
            "backbone": network.config.to_json(),
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
        return (
            f"{package}.sam_model_registry[{name!r}](checkpoint='sam.pth') loads encoder, prompt encoder and the mask "
            "decoder's transformer; SAM's own mask tokens and quality head are those of the base. That package works "
            "at 1024 pixels, on (image - mean) / std with SAM's mean and std for 0 .. 255. Class logits: let the "
            "transformer attend with mask_tokens of class_head.safetensors as its only tokens (no quality token), and "
            "multiply what output_hypernetworks_mlps.k gives for token k with the upscaled image"
        )
    tool = "an ONNX runtime" if format == "onnx" else "torch.export.load (a program: load only what you trust)"
    return f"{tool}: the encoder gives the embedding that the decoder takes; one image a call"
