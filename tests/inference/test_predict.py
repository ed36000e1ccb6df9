# SPDX-License-Identifier: Apache-2.0
"""From files to label maps on the files' own grids, and what happens to the files that are not usable."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from scipy import ndimage

from samda.data.transforms import build_preprocessing
from samda.errors import InputError, SamdaError, UsageError
from samda.inference.folder import find_cases, predict_folder
from samda.inference.postprocessing import build_postprocessing
from samda.inference.predict import Predictor
from samda.inference.volume import VolumeInferer
from samda.processes import Shard
from samda.task import Task


@pytest.fixture
def predictor(band_network: torch.nn.Module, band_task: Task) -> Predictor:
    """Predicts the phantom's classes."""
    return Predictor(band_network, band_task, batch_size=4)


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder that nobody can write to, the administrator included."""
    if os.geteuid() == 0:
        return Path("/proc")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    return folder


def inside(labels: np.ndarray) -> np.ndarray:
    """Voxels whose neighborhood (two voxels each way) is of one class."""
    return ndimage.minimum_filter(labels, 5) == ndimage.maximum_filter(labels, 5)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# ----------------------------------------------------------------------------------------------------------- own grid


def permuted(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Array axes that run superior, left, anterior."""
    affine = np.zeros((4, 4))
    affine[[2, 0, 1], [0, 1, 2]] = np.asarray(spacing_mm) * (1, -1, 1)
    affine[:, 3] = (80.0, -40.0, 12.5, 1.0)
    return affine


GRIDS = {
    "straight": ((46, 38, 20), lambda p: np.diag([1.0, 1.0, 3.0, 1.0])),
    "anisotropic": ((70, 44, 30), lambda p: np.diag([0.7, 1.4, 2.2, 1.0])),
    "flipped": ((50, 40, 14), lambda p: np.diag([-0.9, -1.1, 4.0, 1.0])),
    "oblique": ((60, 52, 24), lambda p: p.oblique((0.8, 1.0, 2.5))),
    "oblique and flipped": ((52, 60, 24), lambda p: p.oblique((1.2, 0.9, 2.5), flips=(-1, 1, -1))),
    "permuted": ((26, 54, 44), lambda p: permuted((2.0, 1.1, 0.9))),
    "larger than the field of view": ((120, 100, 12), lambda p: np.diag([-1.0, -1.0, 5.0, 1.0])),
}


@pytest.mark.parametrize("name", GRIDS)
def test_labels_return_on_the_scans_own_grid(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, name: str
) -> None:
    shape, make = GRIDS[name]
    labels, affine = phantom.truth(shape), make(phantom)
    scan = phantom.write(tmp_path / "scan.nii.gz", labels, affine)
    prediction = predictor.predict(scan)
    saved = nib.load(prediction.save(tmp_path / "out"))
    source = nib.load(scan)
    assert saved.get_filename() == str(tmp_path / "out" / "scan.nii.gz")
    assert np.array_equal(saved.affine, source.affine)
    assert saved.get_data_dtype() == np.uint8
    result = np.asarray(saved.dataobj)
    assert np.array_equal(result, prediction.labels)
    assert result.shape == shape
    sure = inside(labels)
    assert np.array_equal(result[sure], labels[sure])
    assert sure[labels == 1].any() and sure[labels == 2].any()
    for k in (1, 2):
        assert dice(result == k, labels == k) > 0.9


@pytest.mark.parametrize("axis", ["axial", "sagittal"])
@pytest.mark.parametrize("shape", [(37, 45, 31), (90, 26, 33)])
def test_all_axes_return_on_an_oblique_grid(
    tmp_path: Path,
    phantom: SimpleNamespace,
    band_network: torch.nn.Module,
    band_task: Task,
    shape: tuple[int, int, int],
    axis: str,
) -> None:
    labels = phantom.truth(shape)
    scan = phantom.write(tmp_path / "scan.nii.gz", labels, phantom.oblique((1.1, 0.9, 1.2), flips=(-1, 1, -1)))
    predictor = Predictor(band_network, dataclasses.replace(band_task, axis=axis), axes="all")
    prediction = predictor.predict(scan, probabilities=True)
    assert prediction.labels.shape == shape and np.array_equal(prediction.affine, nib.load(scan).affine)
    sure = inside(labels)
    assert np.array_equal(prediction.labels[sure], labels[sure])
    assert prediction.probabilities is not None
    assert np.abs(prediction.probabilities.sum(0) - 1).max() < 1e-5
    for k in (1, 2):
        assert dice(prediction.labels == k, labels == k) > 0.9


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("thin", [0, 1, 2])
def test_two_voxels_thick(
    tmp_path: Path, phantom: SimpleNamespace, band_network: torch.nn.Module, band_task: Task, thin: int, axis: str
) -> None:
    shape = tuple(np.insert([40, 32], thin, 2))
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(0, n - 1) if n == 2 else slice(n // 4, n // 2) for n in shape)] = 2
    scan = phantom.write(tmp_path / "thin.nii.gz", labels, np.diag([-1.0, 1.0, 1.0, 1.0]))
    result = Predictor(band_network, dataclasses.replace(band_task, axis=axis)).predict(scan)
    assert np.array_equal(result.labels, labels)


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (2, 4), (1, 1)])
def test_form_codes_are_kept(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, codes: tuple[int, int]
) -> None:
    scan = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((40, 32, 6)), phantom.oblique((1, 1, 4)), codes)
    saved = nib.load(predictor.predict(scan).save(tmp_path / "out")).header
    source = nib.load(scan).header
    assert (int(saved["qform_code"]), int(saved["sform_code"])) == codes
    keys = ("dim", "pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units")
    for key in (*keys, "srow_x", "srow_y", "srow_z"):
        assert np.array_equal(saved[key], source[key]), key
    assert bytes(saved["descrip"].tobytes()).rstrip(b"\0") == b"research use only, not for clinical decisions"


def test_forms_that_differ_are_both_kept(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    scan = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((40, 32, 6)), np.diag([1.0, 1.0, 4.0, 1.0]))
    image = nib.load(scan)
    image.set_qform(phantom.oblique((1, 1, 4)), 1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), scan)
    with pytest.warns(UserWarning, match="sform and qform differ"):
        saved = nib.load(predictor.predict(scan).save(tmp_path / "out"))
    assert np.array_equal(saved.get_sform(), nib.load(scan).get_sform())
    assert np.array_equal(saved.get_qform(), nib.load(scan).get_qform())


@pytest.mark.parametrize("shape", [(40, 32), (40, 32, 1), (40, 32, 5, 1)])
def test_the_shape_of_the_file_is_kept(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, shape: tuple[int, ...]
) -> None:
    labels = phantom.truth((*shape, 1)[:3]).reshape(shape)
    scan = phantom.write(tmp_path / "scan.nii.gz", labels, np.diag([1.0, 1.0, 4.0, 1.0]))
    saved = nib.load(predictor.predict(scan).save(tmp_path / "out"))
    assert saved.shape == shape
    assert np.array_equal(np.asarray(saved.dataobj), labels)


def test_names_lie_beside_the_label_map(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    scan = phantom.write(tmp_path / "a.b.nii.gz", phantom.truth((40, 32, 4)), np.diag([1.0, 1.0, 4.0, 1.0]))
    predictor.predict(scan).save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".samda", "a.b.json", "a.b.nii.gz"]
    about = json.loads((tmp_path / "out" / "a.b.json").read_text("utf-8"))
    assert about["labels"] == {"background": 0, "bright": 1, "dark": 2}
    assert "research use only" in about["note"]


def test_volumes(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    labels = phantom.truth((40, 32, 6))
    prediction = predictor.predict(phantom.write(tmp_path / "a.nii.gz", labels, phantom.oblique((1, 1, 4))))
    assert np.array_equal(prediction.labels, labels)
    expected = {"bright": (labels == 1).sum() * 0.004, "dark": (labels == 2).sum() * 0.004}  # 4 mm3 a voxel
    assert prediction.volumes_ml() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------- formats and objects


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_formats_get_a_nifti_of_the_same_geometry(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, suffix: str
) -> None:
    labels, affine = phantom.truth((44, 36, 8)), phantom.oblique((1.0, 1.0, 3.0))
    nifti = phantom.write(tmp_path / "scan.nii.gz", labels, affine)
    scan = tmp_path / "other" / f"scan{suffix}"
    scan.parent.mkdir()
    sitk.WriteImage(sitk.ReadImage(str(nifti)), str(scan))
    saved = nib.load(predictor.predict(scan).save(tmp_path / "out"))
    assert saved.get_filename().endswith("out/scan.nii.gz")
    assert np.allclose(saved.affine, nib.load(nifti).affine, atol=1e-4)
    assert np.array_equal(np.asarray(saved.dataobj), labels)
    assert (int(saved.header["qform_code"]), int(saved.header["sform_code"])) == (1, 1)


def write_dicom(folder: Path, labels: np.ndarray, hu: tuple[int, ...]) -> None:
    """A CT series of axial slices, 1 x 1 x 3 mm."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(labels.shape[2]):
        image = sitk.GetImageFromArray(np.asarray(hu, np.int16)[labels[:, :, k].T][None])
        image.SetSpacing((1.0, 1.0, 3.0))
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{k + 1}",
            "0020|0032": f"-20\\-10\\{3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(k + 1),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(image)


def test_dicom_series(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    labels = phantom.truth((40, 32, 6))
    write_dicom(tmp_path / "in" / "series_7", labels, (0, 160, -120))
    result = predict_folder(predictor, tmp_path / "in" / "series_7", tmp_path / "one")
    assert result.done == ["series_7"]
    phantom.write(tmp_path / "in" / "scan.nii.gz", labels, np.diag([1.0, 1.0, 3.0, 1.0]))
    assert sorted(predict_folder(predictor, tmp_path / "in", tmp_path / "many").done) == ["scan", "series_7"]
    first, second = (nib.load(tmp_path / name / "series_7.nii.gz") for name in ("one", "many"))
    assert np.array_equal(np.asarray(first.dataobj), labels)
    assert np.array_equal(np.asarray(second.dataobj), labels)
    expected = np.array([[-1, 0, 0, 20], [0, -1, 0, 10], [0, 0, 3, 0], [0, 0, 0, 1]], float)
    assert np.allclose(first.affine, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_give_pictures(tmp_path: Path, band_network: torch.nn.Module, channels: int) -> None:
    # rows x columns; percentiles 0 and 100 keep gray 0 ... 255, so 128, 230 and 51 are 0.5, 0.9 and 0.2
    labels = np.zeros((30, 46), np.uint8)
    labels[4:12, 6:30], labels[20:28, 26:42] = 1, 2
    pixels = np.array([128, 230, 51], np.uint8)[labels]
    pixels[:15, -1], pixels[15:, -1] = 0, 255
    if channels == 3:
        pixels = np.stack([pixels, pixels // 2, pixels // 3], -1)
        pixels[15:, -1] = 255
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=channels == 3), str(tmp_path / "photo.png"))
    task = Task(
        classes=("background", "bright", "dark"),
        modality="image",
        percentiles=(0, 100),
        spacing=1.0,
        image_size=64,
        in_channels=channels,
    )
    path = Predictor(band_network, task).predict(tmp_path / "photo.png").save(tmp_path / "out")
    assert path == tmp_path / "out" / "photo.png"
    saved = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert saved.dtype == np.uint8
    labels[:, -1] = saved[:, -1]  # the marks themselves
    assert np.array_equal(saved, labels)


def test_objects_are_predicted_as_their_files(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    scan = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((40, 32, 6)), phantom.oblique((1.2, 0.9, 4)))
    expected = predictor.predict(scan)
    loaded = nib.load(scan)
    for image in (loaded, {"id": "scan", "image": scan, "label": "nowhere.nii.gz"}):
        result = predictor.predict(image)
        assert np.array_equal(result.labels, expected.labels)
        assert np.array_equal(result.affine, expected.affine)
        assert result.case == "scan"
    assert loaded.get_filename() == str(scan)


def test_probabilities_are_one_file_on_the_same_grid(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor
) -> None:
    phantom.write(tmp_path / "in.nii.gz", phantom.truth((40, 32, 6)), phantom.oblique((1.2, 0.9, 4), flips=(-1, 1, 1)))
    result = predict_folder(predictor, tmp_path / "in.nii.gz", tmp_path / "out", save_probabilities=True)
    assert result.done == ["in"]
    labels, p = nib.load(tmp_path / "out" / "in.nii.gz"), nib.load(tmp_path / "out" / "probabilities" / "in.nii.gz")
    assert p.shape == (40, 32, 6, 3)
    assert p.get_data_dtype() == np.float32
    assert np.array_equal(p.affine, labels.affine)
    values = np.asarray(p.dataobj)
    assert np.allclose(values.sum(-1), 1, atol=1e-5)
    assert np.array_equal(values.argmax(-1), np.asarray(labels.dataobj))


# ----------------------------------------------------------------------------------------------------------- bad scans


def spoil(path: Path, kind: str, phantom: SimpleNamespace) -> str:
    """Write an unusable scan to `path`; returns a word of the message it must cause."""
    labels, affine = phantom.truth((40, 32, 6)), np.diag([1.0, 1.0, 4.0, 1.0])
    if kind == "no image":
        path.write_bytes(b"dear diary, today I was saved as a scan")
        return "cannot be read as a scan"
    if kind == "truncated":
        rng = np.random.default_rng(0)
        nib.save(nib.Nifti1Image(rng.integers(-500, 500, (40, 32, 6)).astype(np.int16), affine), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return "cannot be read as a scan"
    values = np.array([0, 160, -120], np.float32)[labels]
    if kind == "4D":
        values = np.stack([values, values + 1, values + 2], -1)
    elif kind == "NaN":
        values[3, 3, 3] = np.nan
    else:
        values[:] = 40.0
    nib.save(nib.Nifti1Image(values, affine), path)
    return {"4D": "one channel", "NaN": "NaN", "constant": "constant"}[kind]


KINDS = ("no image", "truncated", "4D", "NaN", "constant")


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_unusable_scans(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, kind: str) -> None:
    word = spoil(tmp_path / "bad.nii.gz", kind, phantom)
    with pytest.raises(InputError, match=word) as caught:
        predictor.predict(tmp_path / "bad.nii.gz")
    message = str(caught.value)
    assert "bad.nii.gz" in message and "\n" not in message


def test_bad_scans_do_not_stop_the_good_ones(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    labels = phantom.truth((40, 32, 6))
    words = {f"bad {kind}": spoil(folder / f"bad {kind}.nii.gz", kind, phantom) for kind in KINDS}
    for name in ("a_first", "z_last"):
        phantom.write(folder / f"{name}.nii.gz", labels, np.diag([1.0, 1.0, 4.0, 1.0]))
    phantom.write(folder / "void.nii", np.zeros_like(labels) + (np.arange(6) == 5) * 2, np.diag([1.0, 1.0, 4.0, 1.0]))
    (folder / "notes.txt").write_text("no scan")
    outcomes: dict[str, str] = {}
    with caplog.at_level(logging.WARNING):
        result = predict_folder(predictor, folder, tmp_path / "out", on_case=outcomes.__setitem__)
    assert result.done == ["a_first", "void", "z_last"]
    assert sorted(result.failed) == sorted(words)
    for name, word in words.items():
        assert word in result.failed[name] and "\n" not in result.failed[name]
        assert outcomes[name] == result.failed[name]
        assert f"case {name}: " in caplog.text
    assert result.exit_code == 1
    assert outcomes["z_last"] == "done"
    files = {p.name for p in (tmp_path / "out").glob("[!.]*")}
    assert files == {f"{name}.{end}" for name in result.done for end in ("json", "nii.gz")}
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out" / "z_last.nii.gz").dataobj), labels)


def test_an_empty_result_is_named(
    tmp_path: Path, phantom: SimpleNamespace, band_task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    phantom.write(tmp_path / "case_9.nii.gz", phantom.truth((40, 32, 6)), np.diag([1.0, 1.0, 4.0, 1.0]))
    blind = Predictor(lambda x: torch.tensor([1.0, 0, 0])[None, :, None, None].expand(len(x), 3, 64, 64), band_task)
    with caplog.at_level(logging.WARNING):
        result = predict_folder(blind, tmp_path / "case_9.nii.gz", tmp_path / "out")
    assert (result.done, result.empty, result.exit_code) == (["case_9"], ["case_9"], 0)
    assert "case case_9: no foreground" in caplog.text
    assert not np.asarray(nib.load(tmp_path / "out" / "case_9.nii.gz").dataobj).any()


def test_finished_cases_can_be_skipped(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("one", "two"):
        phantom.write(folder / f"{name}.nii.gz", phantom.truth((40, 32, 4)), np.diag([1.0, 1.0, 4.0, 1.0]))
    predict_folder(predictor, folder / "one.nii.gz", tmp_path / "out")
    before = (tmp_path / "out" / "one.nii.gz").stat().st_mtime_ns
    result = predict_folder(predictor, folder, tmp_path / "out", skip_finished=True)
    assert (result.skipped, result.done) == (["one"], ["two"])
    assert (tmp_path / "out" / "one.nii.gz").stat().st_mtime_ns == before
    again = predict_folder(predictor, folder, tmp_path / "out", skip_finished=True, save_probabilities=True)
    assert (again.skipped, again.done) == ([], ["one", "two"])
    assert predict_folder(predictor, folder, tmp_path / "out").done == ["one", "two"]


def test_a_case_of_another_scan_or_model_is_not_finished(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, band_network: torch.nn.Module, band_task: Task
) -> None:
    folder, affine = tmp_path / "in", np.diag([1.0, 1.0, 4.0, 1.0])
    folder.mkdir()
    for name in ("one", "two"):
        phantom.write(folder / f"{name}.nii.gz", phantom.truth((40, 32, 4)), affine)
    predict_folder(predictor, folder, tmp_path / "out")
    phantom.write(folder / "one.nii.gz", phantom.truth((40, 32, 6)), affine)
    corrected = nib.load(tmp_path / "out" / "two.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(corrected.shape, np.uint8), corrected.affine), tmp_path / "out" / "two.nii.gz")
    again = predict_folder(predictor, folder, tmp_path / "out", skip_finished=True)
    assert (again.done, again.skipped) == (["one"], ["two"])
    assert nib.load(tmp_path / "out" / "one.nii.gz").shape == (40, 32, 6)
    assert not np.asarray(nib.load(tmp_path / "out" / "two.nii.gz").dataobj).any(), "corrected by hand, so it stays"
    other = Predictor(band_network, dataclasses.replace(band_task, keep_largest=True))
    (tmp_path / "out" / "two.nii.gz").unlink()
    assert predict_folder(other, folder, tmp_path / "out", skip_finished=True).done == ["one", "two"]


# ------------------------------------------------------------------------------------------- inputs, outputs, refusals


def test_refuses_output_folders_before_any_work(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, band_network: torch.nn.Module, read_only: Path
) -> None:
    scan = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((40, 32, 4)), np.diag([1.0, 1.0, 4.0, 1.0]))
    (tmp_path / "file").write_text("")
    for output, message in (
        (read_only, "cannot be written"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "is the folder of the scan"),
    ):
        with pytest.raises(UsageError, match=message):
            predict_folder(predictor, scan, output)
    assert band_network.shapes == []
    assert sorted(p.name for p in tmp_path.iterdir() if p != read_only) == ["file", "scan.nii.gz"]


def test_sections_of_a_data_set(tmp_path: Path, phantom: SimpleNamespace) -> None:
    for name in ("a", "b", "c"):
        phantom.write(tmp_path / f"{name}.nii.gz", phantom.truth((8, 8, 4)), np.eye(4))
    entry = {"image": "a.nii.gz", "label": "b.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry], "test": ["c.nii.gz"]}))
    assert [c["id"] for c in find_cases(tmp_path)] == ["c"]
    assert [c["id"] for c in find_cases(tmp_path / "dataset.json", "training")] == ["a"]
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]}))
    with pytest.raises(UsageError, match=r"no cases in section 'test'; choose from training \(1\)"):
        find_cases(tmp_path / "list.json")
    with pytest.raises(InputError, match="there is no data set"):
        find_cases(tmp_path / "nowhere")


def test_names_that_cannot_be_written_fail_alone(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor
) -> None:
    phantom.write(tmp_path / "c.nii.gz", phantom.truth((40, 32, 4)), np.diag([1.0, 1.0, 4.0, 1.0]))
    names = ["../c", ".c", "x" * 300, "a\nb"]
    entries = [{"image": "c.nii.gz", "id": name} for name in [*names, "good"]]
    (tmp_path / "list.json").write_text(json.dumps({"test": entries}))
    for skip in (False, True):
        result = predict_folder(predictor, tmp_path / "list.json", tmp_path / "out", skip_finished=skip)
        assert list(result.failed) == names and result.done + result.skipped == ["good"]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["good.json", "good.nii.gz"]


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((40, 32, 4)), np.diag([1.0, 1.0, 4.0, 1.0]))
    original = gzip.GzipFile.write

    def full(self: gzip.GzipFile, data: bytes) -> int:
        if "out" in str(getattr(self.fileobj, "name", self.name)):
            raise OSError(28, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(gzip.GzipFile, "write", full)
    with pytest.raises(SamdaError, match=r"the disk of .* is full"):
        predict_folder(predictor, scan, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".samda"]


# -------------------------------------------------------------------------------------------------------- MONAI bundle


def test_the_bundles_chain_writes_the_same_bytes(
    tmp_path: Path,
    phantom: SimpleNamespace,
    band_task: Task,
    small_sam: torch.nn.Module,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, affine in (("one", phantom.oblique((0.9, 1.2, 4), flips=(-1, -1, 1))), ("two", permuted((1.0, 1.3, 3)))):
        phantom.write(folder / f"{name}.nii.gz", phantom.truth((24, 20, 4)), affine, (2, 4))
    predict_folder(Predictor(small_sam, band_task, batch_size=3), folder, tmp_path / "cli")
    preprocessing = build_preprocessing(band_task, labels=False)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(find_cases(folder), preprocessing), batch_size=1),
        network=small_sam,
        inferer=VolumeInferer(band_task.to_dict(), batch_size=3),
        postprocessing=build_postprocessing(band_task.to_dict(), preprocessing, tmp_path / "bundle"),
    )
    evaluator.run()
    for name in ("one.nii.gz", "two.nii.gz"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes(), name
    for name in ("one.json", "two.json"):
        facts = json.loads((tmp_path / "cli" / name).read_text("utf-8"))
        assert sorted(facts.pop("source")) == ["model", "scan"], "the engine of inference.json adds it"
        assert facts == json.loads((tmp_path / "bundle" / name).read_text("utf-8"))
    assert len(list((tmp_path / "bundle").glob("[a-z]*"))) == 4
    assert len(np.unique(np.asarray(nib.load(tmp_path / "cli" / "two.nii.gz").dataobj))) > 1


def test_postprocessing_without_a_folder_saves_nothing(
    tmp_path: Path, phantom: SimpleNamespace, band_task: Task, band_network: torch.nn.Module
) -> None:
    labels = phantom.truth((40, 36, 6))
    scan = phantom.write(tmp_path / "scan.nii.gz", labels, np.diag([-1.0, 1.0, 4.0, 1.0]))
    preprocessing = build_preprocessing(band_task, labels=False)
    data = preprocessing({"image": str(scan)})
    data["pred"] = VolumeInferer(band_task)(data["image"][None], band_network)[0]
    result = build_postprocessing(band_task, preprocessing)(data)["pred"]
    assert np.array_equal(result[0].numpy(), labels)
    assert np.allclose(np.asarray(result.affine), np.diag([-1.0, 1.0, 4.0, 1.0]))
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_parts_of_a_folder_are_the_folder(tmp_path: Path, phantom: SimpleNamespace, predictor: Predictor) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        phantom.write(tmp_path / "in" / f"{name}.nii.gz", phantom.truth((20, 16, 3)), np.diag([1.0, 1.0, 4.0, 1.0]))
    first = predict_folder(predictor, tmp_path / "in", tmp_path / "out", part=Shard(1, 2))
    second = predict_folder(predictor, tmp_path / "in", tmp_path / "out", part=Shard(2, 2))
    assert (first.done, second.done) == (["a", "c"], ["b"])
    assert predict_folder(predictor, tmp_path / "in", tmp_path / "out", part=Shard(4, 4)).done == []
    again = predict_folder(predictor, tmp_path / "in", tmp_path / "out", part=Shard(1, 2), skip_finished=True)
    assert (again.done, again.skipped) == ([], ["a", "c"])
    assert (first + second).to_dict() == {
        "done": ["a", "c", "b"], "skipped": [], "empty": [], "failed": {}, "quality": {}, "exit_code": 0,
    }  # fmt: skip
