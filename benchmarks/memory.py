# SPDX-License-Identifier: Apache-2.0
"""Peak memory of predicting, or adapting to, one large CT, file to file, in a process of its own:

    python benchmarks/memory.py [--network cheap] [--shape 512 512 600] [--classes 7] [--budget 512]
    python benchmarks/memory.py --adapt

Prints the peak resident memory, the time, and the share that Python and torch take before any work. `--network vit_t`
(the default) is the real segmenter; `cheap` is one convolution, so that what remains is samda's own handling of the
volume. `--adapt` trains a model for a few steps, and adapts it to the CT with all of its output.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

# an adaptation goes through all of its stages, whatever the model thinks of the CT
ALWAYS = {"skip_agreement": 2, "plausible": 1, "tolerance": 10, "regain": 10, "drift_factor": 100, "improvement": -10}
LIMIT = 4.0  # GB, of a 512 x 512 x 600 CT with 7 classes


def peak_gb() -> float:
    """Largest resident memory of this process so far (10^9 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # rusage would also count the process that started this one
        line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def write_ct(path: Path, shape: tuple[int, int, int]) -> None:
    """An elliptic body of soft tissue with some organs and noise, int16, 0.75 x 0.75 x 1 mm."""
    rng = np.random.default_rng(0)
    x, y = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    volume = np.empty(shape, np.int16)
    noise = rng.normal(0, 20, shape[:2]).astype(np.int16)
    for k in range(shape[2]):
        plane = np.where((x / 0.85) ** 2 + (y / 0.6) ** 2 < 1, 40, -1000)
        plane[((x - 0.4) / 0.3) ** 2 + (y / 0.3) ** 2 < 1] = 110
        plane[((x + 0.3 * np.sin(k / 40)) / 0.15) ** 2 + ((y + 0.2) / 0.15) ** 2 < 1] = 180
        volume[:, :, k] = plane + np.roll(noise, 7 * k, axis=0)
    nib.save(nib.Nifti1Image(volume, np.diag([-0.75, -0.75, 1.0, 1.0])), path)


def predict(scan: Path, output: Path, network_name: str, classes: int, budget: float, batch_size: int) -> dict:
    """Predict in this process; returns what it took."""
    import torch

    from samda import Predictor, SamSegmenter, Task
    from samda.errors import WeightsError

    weights = None
    if network_name == "cheap":
        network: torch.nn.Module = torch.nn.Conv2d(1, classes, 3, padding=1)
    else:
        try:
            network, weights = SamSegmenter(network_name, classes), "pretrained"
        except WeightsError:  # memory does not depend on the values
            network, weights = SamSegmenter(network_name, classes, weights=None), "random"
    task = Task(classes=("background", *(f"class {k}" for k in range(1, classes))))
    before, start = peak_gb(), time.perf_counter()
    predictor = Predictor(network, task, memory_budget_mb=budget, batch_size=batch_size, progress=True)
    predictor.predict(scan).save(output)
    seconds = round(time.perf_counter() - start, 1)
    peak = round(peak_gb(), 2)
    return {"peak_gb": peak, "before_gb": round(before, 2), "seconds": seconds, "weights": weights}


def write_model(folder: Path, network_name: str, classes: int) -> Path:
    """A model folder, trained for a few steps on some slices of the CT with bands as labels."""
    from samda import Task, train

    write_ct(folder / "small.nii.gz", (256, 256, 16))
    labels = np.zeros((256, 256, 16), np.uint8)
    labels[32:-32, 64:-64] = 1 + np.arange(192)[:, None, None] * (classes - 1) // 192
    nib.save(nib.Nifti1Image(labels, nib.load(folder / "small.nii.gz").affine), folder / "labels.nii.gz")
    (folder / "pairs.csv").write_text("image,label\nsmall.nii.gz,labels.nii.gz\n", encoding="utf-8")
    task = Task(classes=("background", *(f"class {k}" for k in range(1, classes))))
    model = folder / "model"
    train(folder / "pairs.csv", model, task, backbone=network_name, steps=4, device="cpu", tracking="none")
    return model


def adapt(scan: Path, output: Path, model: Path, batch_size: int) -> dict:
    """Adapt in this process as `samda adapt` does; returns what it took."""
    from samda.adaptation.job import run_adaptation

    before, start = peak_gb(), time.perf_counter()
    result = run_adaptation(model, scan, output, {"batch_size": batch_size, "keep": "last", "guard": ALWAYS})
    seconds = round(time.perf_counter() - start, 1)
    if result["failed"]:
        raise SystemExit(str(result["failed"]))
    reasons = ", ".join(case["reason"] for case in result["cases"].values())
    peak = round(peak_gb(), 2)
    return {"peak_gb": peak, "before_gb": round(before, 2), "seconds": seconds, "weights": f"of a model ({reasons})"}


def main() -> int:
    """Run; the exit code is 1 where the peak exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_t", choices=("vit_t", "vit_b", "cheap"))
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 600))
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--budget", type=float, default=512.0, help="memory budget for class maps (MB)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest peak that passes (GB)")
    parser.add_argument("--adapt", action="store_true", help="adapt instead of predicting")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)  # the child process
    args = parser.parse_args()
    if args.scan:
        folder = args.scan.parent / "labels"
        if args.adapt:
            print(json.dumps(adapt(args.scan, folder, args.scan.parent / "model", args.batch_size)))
            return 0
        print(json.dumps(predict(args.scan, folder, args.network, args.classes, args.budget, args.batch_size)))
        return 0
    with tempfile.TemporaryDirectory() as folder:  # in a fresh process
        scan = Path(folder) / "ct.nii.gz"
        write_ct(scan, tuple(args.shape))
        if args.adapt:
            write_model(Path(folder), args.network, args.classes)
        command = [sys.executable, __file__, *sys.argv[1:], "--scan", str(scan)]
        result = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout.splitlines()[-1]
        )
        saved = nib.load(Path(folder) / "labels" / "ct.nii.gz")
        if saved.shape != tuple(args.shape):
            raise SystemExit(f"the label map has shape {saved.shape}, expected {tuple(args.shape)}")
    size = " x ".join(map(str, args.shape))
    print(f"{args.network}, {size}, {args.classes} classes, weights {result['weights']}:")
    print(f"peak {result['peak_gb']} GB ({result['before_gb']} GB before the scan), {result['seconds']} s")
    if result["peak_gb"] > args.limit:
        print(f"above the limit of {args.limit} GB")
    return int(result["peak_gb"] > args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
