# SPDX-License-Identifier: Apache-2.0
"""Files as they are written."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samda.errors import InputError, UsageError
from samda.inference.writer import label_path, probability_path, write_labels, write_probabilities
from samda.output import check_output_folder

AFFINE = np.array([[0.0, -2.0, 0, 7], [1.5, 0, 0, -3], [0, 0, 4, 11], [0, 0, 0, 1]])
CLASSES = ("background", "Leber", "Gef\u00e4\u00df")


def test_names() -> None:
    assert label_path("out", "a.b", "a.b.nrrd") == Path("out/a.b.nii.gz")
    assert label_path("out", "a", "somewhere/a.PNG") == Path("out/a.png")
    assert label_path("out", "a") == Path("out/a.nii.gz")
    assert probability_path("out", "a") == Path("out/probabilities/a.nii.gz")


@pytest.mark.parametrize(("classes", "kind"), [(255, np.uint8), (256, np.uint16)])
@pytest.mark.parametrize("suffix", [".nii.gz", ".png"])
def test_as_many_bytes_as_the_classes_need(tmp_path: Path, classes: int, kind: type, suffix: str) -> None:
    labels = np.arange(12).reshape(4, 3, 1) + classes - 12
    path = write_labels(tmp_path / f"x{suffix}", labels, [str(k) for k in range(classes)], affine=AFFINE)
    if suffix == ".png":
        saved = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T[..., None]
    else:
        image = nib.load(path)
        saved = np.asanyarray(image.dataobj)
        assert np.allclose(image.affine, AFFINE)
        assert image.header.get_xyzt_units()[0] == "mm"
    assert saved.dtype == kind
    assert np.array_equal(saved, labels)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_what_the_header_says_of_the_patient_or_the_intensities_is_not_passed_on(tmp_path: Path, kind: type) -> None:
    scan = kind(np.ones((5, 4, 3), np.float32), AFFINE)
    scan.header["descrip"], scan.header["aux_file"] = b"Doe, Jane", b"jane.txt"
    scan.header["cal_max"] = 400
    for key in ("data_type", "db_name", "unused_str"):
        if key in scan.header:
            scan.header[key] = b"jane"
    scan.header.set_intent("z score", name="jane")
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, born 1970"))
    nib.save(scan, tmp_path / "scan.nii")
    path = write_labels(tmp_path / "out.nii", np.full((5, 4, 3), 2), CLASSES, tmp_path / "scan.nii")
    assert b"ane" not in path.read_bytes()
    saved = nib.load(path)
    assert type(saved) is kind
    assert np.array_equal(np.asanyarray(saved.dataobj), np.full((5, 4, 3), 2))
    assert np.array_equal(saved.affine, nib.load(tmp_path / "scan.nii").affine)
    assert saved.header.get_intent()[0] == "none"
    assert float(saved.header["cal_max"]) == 0


def test_scaled_scans_give_plain_labels(tmp_path: Path) -> None:
    scan = nib.Nifti1Image(np.linspace(-1000, 1000, 60, dtype=np.float32).reshape(5, 4, 3), AFFINE)
    scan.set_data_dtype(np.int16)  # saved with slope and intercept
    nib.save(scan, tmp_path / "scan.nii.gz")
    labels = (np.arange(60).reshape(5, 4, 3) % 3).astype(np.uint8)
    saved = nib.load(write_labels(tmp_path / "out.nii.gz", labels, CLASSES, tmp_path / "scan.nii.gz"))
    assert (saved.dataobj.slope, saved.dataobj.inter) == (1, 0)
    assert np.array_equal(np.asanyarray(saved.dataobj), labels)


def test_the_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [write_labels(tmp_path / f"{n}.nii.gz", np.ones((5, 4, 3)), CLASSES, affine=AFFINE) for n in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["labels"] == {
        "background": 0,
        "Leber": 1,
        "Gef\u00e4\u00df": 2,
    }


def test_probabilities_of_a_flat_scan_stay_four_dimensional(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((5, 4), np.int16), AFFINE), tmp_path / "flat.nii.gz")
    p = np.random.default_rng(0).random((3, 5, 4, 1))
    saved = nib.load(write_probabilities(tmp_path / "p.nii.gz", p, tmp_path / "flat.nii.gz"))
    assert saved.shape == (5, 4, 1, 3)
    assert np.array_equal(np.asanyarray(saved.dataobj), np.moveaxis(p, 0, -1).astype(np.float32))


def test_output_folders(tmp_path: Path) -> None:
    assert check_output_folder(tmp_path / "new") == tmp_path / "new"
    assert (tmp_path / "new").is_dir() and not any((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="file"):
        check_output_folder(tmp_path / "file" / "below")
    assert check_output_folder(tmp_path / "with" / "parents").is_dir()


def test_refuses(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 3), np.int16), AFFINE), tmp_path / "scan.nii.gz")
    ones = np.ones((5, 4, 3), np.uint8)
    with pytest.raises(InputError, match=r"\(4, 5, 3\) voxels, its result \(5, 4, 3\)"):
        write_labels(tmp_path / "out.nii.gz", ones, CLASSES, tmp_path / "scan.nii.gz")
    with pytest.raises(UsageError, match="a PNG holds one slice"):
        write_labels(tmp_path / "out.png", ones, CLASSES)
    with pytest.raises(UsageError, match="an affine is needed"):
        write_labels(tmp_path / "out.nii.gz", ones, CLASSES)
    with pytest.raises(UsageError, match=r"written as \.nii\.gz"):
        write_labels(tmp_path / "out.nrrd", ones, CLASSES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.nii.gz"]


def test_a_label_map_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()  # in the way of the file of names, which is put in place before the map
    with pytest.raises(InputError, match=r"x.nii.gz cannot be written \(Is a directory\); make room"):
        write_labels(tmp_path / "x.nii.gz", np.zeros((2, 3, 4), np.uint8), CLASSES, affine=AFFINE)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
