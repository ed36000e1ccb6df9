# SPDX-License-Identifier: Apache-2.0
"""Rows of :mod:`benchmarks.speed` about whole jobs and other runtimes: the encoder in ONNX runtimes, one and two
processes, pyramids on disk, and a small scan from the shell to its file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from samda import SamSegmenter, fetch_examples
from samda.cli.demo import hold_out
from samda.io import write_json
from samda.models.export import Encoder, graph_name, keep_derived, write_onnx

from .evidence.datasets import split, write_list
from .timing import Row, interleave, median, relative_error

STEPS = 100  # of a round; the first one is not counted
SMALL = (35, 51, 35)  # voxels


def runtimes(options: argparse.Namespace) -> Iterator[Row]:
    """The encoder of the default network without gradients, against the ONNX runtimes with the same threads."""
    network = SamSegmenter("vit_t", 2, weights=None, adapters={"ssf": {}}, head="pyramid").eval()
    for size, batch in ((256, 8), (1024, 1)):
        image = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            encoder = Encoder(network)
            expected = encoder(image)
            rivals = _runtimes(encoder, image, Path(folder) / "encoder.onnx")
            seconds = interleave({**_ours(encoder, image), **rivals}, options.repeats, 2)
            found = encoder(image)[0], *(run()[0] for run in rivals.values())
        ours, half, *others = (median(values) for values in seconds.values())
        errors = [f"{relative_error(torch.as_tensor(maps), expected[0]):.0e}" for maps in found[1:]]
        what = f"vit_t encoder forward, {batch} x {size} px, fp32"
        result = ", ".join(f"{theirs / ours:.2f}x" for theirs in others) or "no rival installed"
        rival, goal = " / ".join(name.removesuffix(" fp32") for name in rivals), ">= 1x the faster one"
        reached = min(others) >= ours if others else None
        notes = f"largest differences of the finest level {', '.join(errors)}"
        yield Row(what, rival or "onnxruntime, OpenVINO", goal, seconds, result, reached, notes)
        what = f"vit_t encoder forward, {batch} x {size} px, bf16"
        yield Row(what, "samda fp32", ">= 1.8x", {}, f"{ours / half:.2f}x", ours / half >= 1.8, "same run")


def _ours(encoder: torch.nn.Module, image: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def half() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(image)

    return {"samda fp32": lambda: encoder(image), "samda bf16": half}


def _runtimes(encoder: Encoder, image: torch.Tensor, path: Path) -> dict[str, Callable[[], Any]]:
    """Those that are installed: name -> a call on the image."""
    encoder = copy.deepcopy(encoder)
    encoder(image)
    keep_derived(encoder.network)
    program = torch.export.export(encoder, (image,), strict=False)
    write_onnx(program, path, [["image"], [graph_name(name) for name in encoder.outputs]])
    threads, runs, pixels = torch.get_num_threads(), {}, image.numpy()
    try:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        runs[f"onnxruntime {onnxruntime.__version__} fp32"] = lambda: session.run(None, {"image": pixels})
    except ImportError:
        pass
    try:
        import openvino

        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"})
        request = core.compile_model(core.read_model(path), "CPU").create_infer_request()
        version = openvino.__version__.partition("-")[0]
        runs[f"OpenVINO {version} fp32"] = lambda: list(request.infer([pixels]).values())
    except ImportError:
        pass
    return runs


def processes(options: argparse.Namespace) -> Iterator[Row]:
    """Slices per second of a training on embeddings: one process with two threads, two with one each (gloo)."""
    example, rates = fetch_examples()["A"], {}
    with tempfile.TemporaryDirectory() as folder:
        data, task = hold_out(example, Path(folder) / "data"), Path(folder) / "task.yaml"
        write_json(task, example.task.to_dict())  # JSON is YAML
        for name, count in (("one process, two threads", 1), ("two processes, one thread each", 2)):
            words = ["-m", "samda", "train", "-d", data, "--task", task, "-o", Path(folder) / str(count)]
            launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc-per-node=2"]
            settings = os.environ | {"OMP_NUM_THREADS": str(2 // count)}
            _train([sys.executable, *launcher, *words], settings)
            rates[name] = count * _rate(Path(folder) / str(count))
    one, two = rates.values()
    notes = "; ".join(f"{name} {rate:.0f} slices/s" for name, rate in rates.items())
    what = "training on embeddings, vit_t, patient A"
    yield Row(what, "one process with two threads", ">= 1.3x", {}, f"{two / one:.2f}x", two / one >= 1.3, notes)


def disk(options: argparse.Namespace) -> Iterator[Row]:
    """A training whose pyramids lie on disk against one that keeps them in memory: what disk takes is waited for."""
    what, goal = "training on 200 patients of the hippocampus, pyramids on disk", ">= 90 % of the steps"
    if options.data is None:
        yield Row(what, "-", goal, notes="`python -m benchmarks.speed --rows disk --data FOLDER`")
        return
    training, test = split("hippocampus", options.data, 0, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_list("hippocampus", [*training, *test], [], folder / "all.json")
        for part, memory in (("disk", 64), ("memory", 16000)):
            words = ["-m", "samda", "train", "-d", data, "-o", folder / part, "--set", f"memory_mb={memory}"]
            _train([sys.executable, *words], os.environ | {"OMP_NUM_THREADS": "1"})
        rates = {part: _rate(folder / part) for part in ("disk", "memory")}
        cost = json.loads((folder / "disk" / "adapter.json").read_text("utf-8"))["record"]["training"]["embeddings"]
    share = rates["disk"] / rates["memory"]
    notes = f"{cost['megabytes']:.0f} MB; {rates['disk']:.0f} and {rates['memory']:.0f} slices/s"
    yield Row(what, "pyramids in memory", goal, {}, f"{100 * share:.0f} % of its steps", share >= 0.9, notes)


def _train(command: list[Any], settings: dict[str, str]) -> None:
    further = f"--steps {3 * STEPS} --set val_interval={STEPS} --device cpu --tracking none --quiet".split()
    subprocess.run(list(map(str, [*command, *further])), env=settings, check=True, stdout=subprocess.DEVNULL)


def _rate(model: Path) -> float:
    """Slices per second and process, without the first round."""
    rows = json.loads((model / "history.json").read_text("utf-8"))["epochs"][1:]
    return 4 * STEPS * len(rows) / sum(row["seconds"] for row in rows)  # four slices a step, the default


def small(options: argparse.Namespace) -> Iterator[Row]:
    """`samda predict` of a small scan as a whole process, imports included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = np.random.default_rng(0).random(SMALL, dtype=np.float32)
        label = np.zeros(SMALL, np.uint8)
        label[10:25, 15:35, 10:25] = 1
        values += label
        for part, array in (("images", values), ("labels", label)):
            (folder / "data" / part).mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "data" / part / "case.nii.gz")
        quiet = "--quiet --device cpu"
        train = f"-m samda train -d data -o model --steps 20 --tracking none {quiet}"
        predict = f"-m samda predict -m model -i data/images -o out {quiet}"
        run = functools.partial(subprocess.run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        run([sys.executable, *train.split()])
        commands = {"samda predict": predict.split(), "import torch": ["-c", "import torch"]}
        runs = {name: lambda words=words: run([sys.executable, *words]) for name, words in commands.items()}
        seconds = interleave(runs, options.repeats)
    took = median(seconds["samda predict"])
    what = f"`samda predict` of a scan of {' x '.join(map(str, SMALL))}, the whole process"
    yield Row(what, "version 0.1.0: 8.2 s", "<= 4.1 s", seconds, f"{took:.2f} s", took <= 4.1)
