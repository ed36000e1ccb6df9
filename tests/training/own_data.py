# SPDX-License-Identifier: Apache-2.0
"""The same tiny scans in every layout that people bring."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from tiny_scans import AFFINE, CLASSES, write_case

UID = "1.2.826.0.1.3680043.2.1125"
CASES = "abc"


def arrays(folder: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a tiny CT, (40, 36, 8)."""
    case = write_case(folder, "made", seed)
    return tuple(np.asarray(nib.load(case[key]).dataobj) for key in ("image", "label"))  # type: ignore[return-value]


def write_csv(folder: Path, scratch: Path) -> Path:
    """CSV of pairs; the last row is a test case."""
    rows = [["image", "label", "id", "patient", "fold", "section"]]
    for seed, name in enumerate(CASES):
        case = write_case(scratch, name, seed)
        for key in ("image", "label"):
            shutil.copy(case[key], folder / Path(case[key]).name)
        rows.append([f"{name}.nii.gz", f"{name}_label.nii.gz", name, f"p{name}", "", "training"])
    shutil.copy(folder / "a.nii.gz", folder / "t.nii.gz")
    rows.append(["t.nii.gz", "", "t", "pt", "", ""])
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "pairs.csv"


def write_nnunet(folder: Path, scratch: Path) -> Path:
    """nnU-Net v2, two MR channels of different scale."""
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir()
    for seed, name in enumerate((*CASES, "t")):
        image, label = arrays(scratch, seed)
        place = "imagesTs" if name == "t" else "imagesTr"
        for channel, scale in enumerate((1, 40)):
            scaled = ((image + 1000.0) * scale).astype(np.float32)
            nib.save(nib.Nifti1Image(scaled, AFFINE), folder / place / f"{name}_{channel:04}.nii.gz")
        if name != "t":
            nib.save(nib.Nifti1Image(label, AFFINE), folder / "labelsTr" / f"{name}.nii.gz")
    labels = {name: k for k, name in enumerate(CLASSES)}
    content = {"labels": labels, "channel_names": {"0": "T2", "1": "ADC"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_pictures(folder: Path, scratch: Path) -> Path:
    """Color pictures with masks of 0 and 255."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for seed, name in enumerate(CASES):
        random = np.random.default_rng(seed)
        mask = np.zeros((40, 56), np.uint8)
        mask[8 + seed : 28, 16:40] = 255
        colors = random.integers(0, 90, (40, 56, 3)).astype(np.uint8)
        colors[..., 0] += mask // 2
        sitk.WriteImage(sitk.GetImageFromArray(colors, isVector=True), str(folder / "images" / f"{name}.jpg"))
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / "masks" / f"{name}.png"))
    return folder


def write_dicom(folder: Path, scratch: Path) -> Path:
    """DICOM series, with the labels in three places."""
    (folder / "labels").mkdir()
    for seed, (name, place) in enumerate(zip(CASES, (".", "labels", "c"), strict=True)):
        image, label = arrays(scratch, seed)
        (folder / name).mkdir()
        _write_series(folder / name, image, f"{UID}.{seed + 1}")
        nib.save(nib.Nifti1Image(label, AFFINE @ np.diag([-1, -1, 1, 1])), folder / place / f"{name}.nii.gz")
    return folder


def _write_series(folder: Path, image: np.ndarray, uid: str) -> None:
    volume = sitk.GetImageFromArray(image.transpose(2, 1, 0))
    volume.SetSpacing([float(s) for s in np.diag(AFFINE)[:3]])
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.shape[2]):
        plane = volume[:, :, k]
        tags: dict[str, Any] = {"0008|0060": "CT", "0008|0018": f"{uid}.{k + 1}", "0020|000d": f"{uid}.0"}
        tags |= {"0020|000e": uid, "0020|0013": k, "0020|0032": f"0\\0\\{k * 5.0}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            plane.SetMetaData(tag, str(value))
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(plane)


WRITERS = {"csv": write_csv, "nnunet": write_nnunet, "masks": write_pictures, "dicom": write_dicom}
