# SPDX-License-Identifier: Apache-2.0
"""Peak memory of predicting, or adapting to, one large CT, file to file, in a process of its own:

    python benchmarks/memory.py [--network cheap] [--shape 512 512 600] [--classes 7] [--budget 512]
    python benchmarks/memory.py --adapt
    python benchmarks/memory.py --dicom-seg --shape 512 512 400 --limit 2

Prints the peak resident memory, the time, and the share that Python and torch take before any work. `--network vit_t`
(the default) is the real segmenter; `cheap` is one convolution, so that what remains is samda's own handling of the
volume. `--adapt` trains a model for a few steps, and adapts it to the CT with all of its output. `--dicom-seg` writes a
label map of a series as DICOM SEG.
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


def write_series(folder: Path, shape: tuple[int, int, int]) -> None:
    """A CT series of DICOM, a file per slice, of 0.75 x 0.75 x 1 mm; its values do not matter."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    series, study, frame = (generate_uid() for _ in range(3))
    pixels = np.random.default_rng(0).integers(0, 2000, (shape[1], shape[0]), np.uint16).tobytes()
    for k in range(shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        file = FileDataset(str(folder / f"{k}.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        file.SeriesInstanceUID, file.StudyInstanceUID, file.FrameOfReferenceUID = series, study, frame
        file.Modality, file.PatientID, file.PatientName = "CT", "none", "none"
        file.PatientBirthDate = file.PatientSex = file.StudyDate = file.StudyTime = file.StudyID = ""
        file.AccessionNumber = file.ReferringPhysicianName = ""
        file.SeriesNumber, file.InstanceNumber, file.Rows, file.Columns = 1, k + 1, shape[1], shape[0]
        file.ImagePositionPatient, file.ImageOrientationPatient = [0.0, 0.0, float(k)], [1, 0, 0, 0, 1, 0]
        file.PixelSpacing, file.SliceThickness = [0.75, 0.75], 1.0
        file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
        file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
        file.RescaleSlope, file.RescaleIntercept, file.PixelData = 1, -1024, pixels
        file.save_as(folder / f"{k}.dcm")


def write_dicom_seg(series: Path, output: Path, shape: tuple[int, int, int], classes: int) -> dict:
    """Write ellipsoids, one a class, as DICOM SEG of the series in this process; returns what it took."""
    from samda import Task
    from samda.data.readers import read_geometry
    from samda.inference import Prediction

    labels = np.zeros(shape, np.uint8)
    x, y = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    for plane, z in zip(np.moveaxis(labels, 2, 0), np.linspace(-1, 1, shape[2]), strict=True):
        for k in range(1, classes):
            center = 2 * np.pi * k / classes
            apart = (x - 0.6 * np.cos(center)) ** 2 + (y - 0.6 * np.sin(center)) ** 2
            plane[apart / 0.28**2 + (z / 0.9) ** 2 < 1] = k
    task = Task(classes=("background", *(f"class {k}" for k in range(1, classes))))
    affine = np.asarray(read_geometry(series)[1], float)
    prediction = Prediction("ct", labels, affine, task.classes, scan=series, task=task)
    before, start = peak_gb(), time.perf_counter()
    prediction.to_dicom_seg(output)
    seconds = round(time.perf_counter() - start, 1)
    return {"peak_gb": round(peak_gb(), 2), "before_gb": round(before, 2), "seconds": seconds, "weights": "none"}


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
    parser.add_argument("--dicom-seg", action="store_true", help="write a DICOM SEG instead of predicting")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)  # the child process
    args = parser.parse_args()
    if args.scan and args.dicom_seg:
        print(json.dumps(write_dicom_seg(args.scan, args.scan.parent / "seg.dcm", tuple(args.shape), args.classes)))
        return 0
    if args.scan:
        folder = args.scan.parent / "labels"
        if args.adapt:
            print(json.dumps(adapt(args.scan, folder, args.scan.parent / "model", args.batch_size)))
            return 0
        print(json.dumps(predict(args.scan, folder, args.network, args.classes, args.budget, args.batch_size)))
        return 0
    with tempfile.TemporaryDirectory() as folder:  # in a fresh process
        scan = Path(folder) / ("series" if args.dicom_seg else "ct.nii.gz")
        (write_series if args.dicom_seg else write_ct)(scan, tuple(args.shape))
        if args.adapt:
            write_model(Path(folder), args.network, args.classes)
        command = [sys.executable, __file__, *sys.argv[1:], "--scan", str(scan)]
        result = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout.splitlines()[-1]
        )
        if not args.dicom_seg:
            saved = nib.load(Path(folder) / "labels" / "ct.nii.gz")
            if saved.shape != tuple(args.shape):
                raise SystemExit(f"the label map has shape {saved.shape}, expected {tuple(args.shape)}")
    size = " x ".join(map(str, args.shape))
    what = "DICOM SEG" if args.dicom_seg else args.network
    print(f"{what}, {size}, {args.classes} classes, weights {result['weights']}:")
    print(f"peak {result['peak_gb']} GB ({result['before_gb']} GB before the scan), {result['seconds']} s")
    if result["peak_gb"] > args.limit:
        print(f"above the limit of {args.limit} GB")
    return int(result["peak_gb"] > args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
