# SPDX-License-Identifier: Apache-2.0
"""Damaged inputs: scans, label files, lists, tasks, adapter files and model folders.

    python -m benchmarks.fuzz [--count 2000] [--first 0] [--seed 0]

Each input runs as a command in a forked process with a limit of time and memory. A run is sound if it ends by itself
with exit code 0, 1 or 2, without traceback or "unexpected", and the good scan beside a bad one is predicted. Prints the
counts and every run that was not sound, and exits with 1 if there was one; `--first N --count 1` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch

from samda.cli import main as cli
from samda.inference.dicom_out import write_dicom
from samda.models.folder import save_model
from samda.networks.backbones import ViTConfig
from samda.networks.segmenter import SamSegmenter
from samda.task import Task

SECONDS = 30.0  # of a run
MEMORY = 1_500_000_000  # bytes that a run may take beyond those of the process that it starts from
VOLUMES = ("a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd")
FLAT = (".png", ".jpg", ".tif", ".bmp")
TEXTS = ("dataset.json", "list.csv", "task.yaml", "adapter.yaml")
MODEL = ("adapter.json", "adapter.safetensors", "versions/active.json")
KINDS = {
    "scans": (*VOLUMES, "a.mgz", "a.hdr", *(f"a{ending}" for ending in FLAT), "dicom"),
    "labels": (*VOLUMES, "dicom-seg.dcm", "rtstruct.dcm"),
    "texts": TEXTS,
    "model": MODEL,
}
NUMBERS = (b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4), b"\0\0\x80\x7f", b"\1\0\0\x80", b"\0\0\xc0\x7f")
ODD = ["-1", "0", "1e400", "99999999999", "2147483647", "NaN", "null", "'x'", "[]", "{}", '"\\ud800"', "[" * 3000]
ODD += ["1e-30", "!!int x", "&a [*a]", "\x00", "\x1b[2J", "x" * 200_000, "true", "1.5", "$x", '"', "10" * 200]


def write_scan(folder: Path, name: str, label: bool = False) -> Path:
    """A phantom (32, 28, 6) or its label in the format of the name; returns the file to damage."""
    x, y, z = np.ogrid[-1:1:32j, -1:1:28j, -1:1:6j]
    organ = (x - 0.2) ** 2 + y**2 + 0 * z < 0.1
    noise = np.random.default_rng(0).normal(0, 9, organ.shape)
    array = organ if label else np.where(x**2 + y**2 < 0.8, 40, -1000) + 100 * organ + noise
    endings = {".nii": nib.Nifti1Image, ".nii.gz": nib.Nifti1Image, ".hdr": nib.Nifti1Pair, ".mgz": nib.MGHImage}
    kind = next((kind for ending, kind in endings.items() if name.endswith(ending)), None)
    if kind is not None:
        nib.save(kind(array.astype(np.int16), np.diag([-3.0, -3.0, 5.0, 1.0])), folder / name)
        return folder / name
    if name.endswith(".dcm"):
        series, task = write_scan(folder, "dicom").parent, Task(codes={"foreground": ["10200004", "SCT", "Liver"]})
        return write_dicom(name.removesuffix(".dcm"), folder / name, array.astype(np.uint8), task, series)
    image = sitk.GetImageFromArray(array.astype(np.int16).T.copy())
    image.SetSpacing((3, 3, 5))
    if name.endswith(FLAT):
        image = sitk.Cast(image[:, :, 3] / 4 + 60, sitk.sitkUInt8)
    if name != "dicom":
        sitk.WriteImage(image, str(folder / name))
        return folder / name
    (folder / name).mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    tags = {
        "0008|0060": "CT",
        "0020|000d": "1.2.1",
        "0020|000e": "1.2.2",
        "0020|0052": "1.2.3",
        "0020|0037": "1\\0\\0\\0\\1\\0",
    }
    for k in range(array.shape[2]):
        plane = image[:, :, k]
        for key, value in (tags | {"0020|0032": f"0\\0\\{5 * k}", "0020|0013": str(k + 1)}).items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / name / f"{k}.dcm"))
        writer.Execute(plane)
    return folder / name / "2.dcm"


def write_model(folder: Path, modality: str) -> None:
    """An untrained model on a tiny encoder, which is part of the folder."""
    torch.manual_seed(0)
    backbone = ViTConfig("fuzz", 32, 2, 2, (1,), window_size=3, image_size=64)
    network = SamSegmenter(backbone, 2, weights=None, adapters={"sam_da": {}})
    save_model(network, folder, Task(spacing=3, image_size=64, modality=modality))
    (folder / "versions").mkdir()
    (folder / "versions" / "active.json").write_text('{"stack": ["source"], "history": []}')


def write_text(folder: Path, name: str) -> Path:
    """A list, a task or an adapter file beside the scans `good` and `label`."""
    entry = {"image": "good.nii.gz", "label": "label.nii.gz", "id": "p1", "fold": 0, "slices": [[0, 3]]}
    lists = {"labels": {"background": 0, "foreground": 1}, "training": [entry], "test": ["good.nii.gz"]}
    values = "window: [-160, 240]\nspacing: 3\nimage_size: 64\naxis: axial\nkeep_largest: [foreground]\n"
    texts = {
        "dataset.json": json.dumps(lists),
        "list.csv": "image,label,id,fold\n" + "".join(f"good.nii.gz,label.nii.gz,p{k},{k}\n" for k in range(2)),
        "task.yaml": "classes: [background, foreground]\nlabels: {foreground: 1}\nmodality: CT\n" + values,
        "adapter.yaml": "adapters:\n  salt: {rank: 4, r: preset}\nlearning_rate: 1e-3\n",
    }
    (folder / name).write_text(texts[name])
    return folder / name


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four random changes of a file: bits, cuts, doubled parts, extreme numbers, odd values in text."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        head = min(len(data), 600)  # headers decide most
        at = int(rng.integers(0, (head if rng.random() < 0.7 else len(data)) or 1))
        length, kind = int(rng.integers(1, 400)), rng.integers(0, 6)
        words = [*re.finditer(rb"[-+.\w]+", bytes(data[: 4 * head]))]
        if kind == 0 and data:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at : at + length if rng.random() < 0.5 else None]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + 4] = NUMBERS[rng.integers(len(NUMBERS))]
        elif kind == 4:
            data[at : at + 8] = rng.bytes(8)
        elif words:
            word = words[rng.integers(len(words))]
            data[word.start() : word.end()] = ODD[rng.integers(len(ODD))].encode("utf-8", "surrogatepass")
    return bytes(data)


def command(kind: str, name: str, place: Path, base: Path, change: Callable[[bytes], bytes]) -> tuple[list[str], Path]:
    """Write a damaged input to `place`; the command that meets it, and a file that must be there afterwards."""
    good = "good.png" if name.endswith(FLAT) else "good.nii.gz"
    data = shutil.copytree(base / good.partition(".")[2], place / "data")
    model, out = shutil.copytree(base / f"model.{good[5:8]}", place / "model"), place / "out"
    if kind == "texts":
        target = write_text(data, name)
    else:
        target = model / name if kind == "model" else write_scan(data, name, kind == "labels")
    target.write_bytes(change(target.read_bytes()))
    argv = {
        "labels": ["evaluate", "-m", model, "-i", data / "label.nii.gz", "--labels", target, "-o", out],
        "dataset.json": ["check", data, "--device", "cpu"],
        "list.csv": ["check", target, "--device", "cpu"],
        "task.yaml": ["check", base / "set", "--task", target, "--device", "cpu"],
        "adapter.yaml": ["train", "-d", data, "-o", out, "--adapter", target, "--backbone", "no", "--device", "cpu"],
        "predict": ["predict", "-m", model, "-i", data, "-o", out, "--quiet", "--device", "cpu"],
    }[name if kind == "texts" else "labels" if kind == "labels" else "predict"]
    return [*map(str, argv)], out / good if kind == "scans" else data


def run(argv: list[str], result: Path) -> tuple[str, str]:
    """Outcome and output of a command in a forked process."""
    reading, writing = os.pipe()
    pages = Path("/proc/self/statm").read_text("utf-8").split()
    virtual, resident = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages[:2])
    child = os.fork()
    if not child:
        text, code = io.StringIO(), 99
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native libraries write there
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY,) * 2)
            try:
                code = cli.main(argv)
            except BaseException:
                traceback.print_exc()
        os.write(writing, text.getvalue().encode("utf-8", "backslashreplace")[-60_000:])
        os._exit(code)
    os.close(writing)
    done, until = 0, time.monotonic() + SECONDS
    while not done and time.monotonic() < until:
        done, status, usage = os.wait4(child, os.WNOHANG)
        time.sleep(0.002)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as file:
        text = file.read().decode()
    code = os.waitstatus_to_exitcode(status) if done else 0
    findings = {
        "over the time": not done,
        "ended by a signal": code < 0 or code > 2,
        "over the memory": usage.ru_maxrss * 1024 - resident > MEMORY or re.search("MemoryError|bad_alloc", text),
        "traceback": "Traceback" in text,
        "unexpected": re.search(r"unexpected \w*(Error|Exception|Interrupt|Iteration|Exit|Warning)", text),
        "good case lost": not result.exists(),
        "done": code == 0,
    }
    return next((name for name, found in findings.items() if found), "refused"), text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz")
    for name, default in (("--count", 2000), ("--first", 0), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    every = [(kind, name) for kind, names in KINDS.items() for name in names]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for ending, modality in (("nii.gz", "CT"), ("png", "image")):
            (base / ending).mkdir()
            write_scan(base / ending, f"good.{ending}")
            write_model(base / f"model.{ending[:3]}", modality)
        write_scan(base / "nii.gz", "label.nii.gz", label=True)
        write_text(shutil.copytree(base / "nii.gz", base / "set"), "list.csv")
        for kind, name in every:  # sound as they are; this also imports what all runs need
            argv, result = command(kind, name, base / f"{kind} {name.replace('/', ' ')}", base, bytes)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as text:
                code = cli.main(argv)
            assert code == (2 if name == "adapter.yaml" else 0) and result.exists(), (argv, text.getvalue())
        for number in range(args.first, args.first + args.count):
            (kind, name), rng = every[number % len(every)], np.random.default_rng([args.seed, number])
            argv, result = command(kind, name, base / "run", base, lambda data, rng=rng: damaged(data, rng))
            outcome, text = run(argv, result)
            counts[kind, outcome] += 1
            if outcome not in ("done", "refused"):
                print(f"{number} {kind} {name}: {outcome}: {text.strip()[-300:]}", flush=True)
            shutil.rmtree(base / "run")
    for (kind, outcome), number in sorted(counts.items()):
        print(f"{kind:<8} {outcome:<16} {number:>6}")
    return int(any(outcome not in ("done", "refused") for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
