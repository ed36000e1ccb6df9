# SPDX-License-Identifier: Apache-2.0
"""Geometry and values of DICOM files come from their headers, or the files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from samda.data.datalists import find_cases
from samda.data.dicom_files import has_dicom
from samda.data.readers import read_geometry, read_scan
from samda.data.transforms import build_preprocessing
from samda.errors import InputError
from samda.provenance import path_sha256
from samda.task import Task

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
VALUES = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 5))  # slices, rows, columns
HEIGHTS = (10.0, 12.0, 14.0, 16.0)
AFFINE = np.array([[-0.5, 0, 0, 4], [0, -0.25, 0, 6], [0, 0, 2, 10], [0, 0, 0, 1]])


def new(path: Path, kind: str, series: str = "1.2.3", number: int = 1) -> FileDataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, f"{series}.{number}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID, file.SeriesInstanceUID = kind, f"{series}.{number}", series
    file.Modality, file.InstanceNumber, file.Rows, file.Columns = "CT", number, 6, 5
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    return file


def stored(values: np.ndarray, slope: float = 1.0, intercept: float = -1024.0) -> np.ndarray:
    return np.rint((values - intercept) / (slope or 1)).astype(np.uint16)


def slice_file(folder: Path, k: int, **tags) -> Path:
    """Slice k of VALUES as a file; `tags` replace or (None) remove elements."""
    path = folder / f"{9 - k}.dcm"
    file = new(path, CT, number=k + 1)
    file.ImagePositionPatient, file.ImageOrientationPatient = [-4, -6, HEIGHTS[k]], [1, 0, 0, 0, 1, 0]
    file.PixelSpacing, file.SliceThickness = [0.25, 0.5], 3.0
    slope, intercept = tags.get("RescaleSlope", 1.0), tags.get("RescaleIntercept", -1024.0)
    file.RescaleSlope, file.RescaleIntercept = slope, intercept
    file.PixelData = stored(VALUES[k], slope, intercept).tobytes()
    for name, value in tags.items():
        if value is None:
            del file[name]
        else:
            setattr(file, name, value)
    file.save_as(path)
    return path


def enhanced(path: Path, order=range(4), rescale=None, compress=False, **tags) -> Path:
    """The slices of VALUES as frames of one file."""
    file = new(path, ENHANCED_CT)
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.25, 0.5], 3.0
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    frames, pixels = [], []
    for k in order:
        frame, place, scale = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [-4, -6, HEIGHTS[k]]
        scale.RescaleSlope, scale.RescaleIntercept = rescale(k) if rescale else (1.0, -1024.0)
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [scale]
        frames.append(frame)
        pixels.append(stored(VALUES[k], float(scale.RescaleSlope), float(scale.RescaleIntercept)))
    file.NumberOfFrames = len(frames)
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], frames
    file.PixelData = np.stack(pixels).tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    if compress:
        file.compress(RLELossless)
    file.save_as(path)
    return path


def check(path: Path, values: np.ndarray = VALUES, affine: np.ndarray = AFFINE) -> None:
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array, values.transpose(2, 1, 0))
    np.testing.assert_allclose(scan.affine, affine, atol=1e-6)
    shape, stated = read_geometry(path)
    assert shape == scan.array.shape
    np.testing.assert_allclose(stated, affine, atol=1e-6)


def refusal(path: Path, named: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_scan(path)
    assert "\n" not in str(caught.value) and str(named or path) in str(caught.value)
    return str(caught.value)


def scale(k: int) -> tuple[float, float]:
    return (0.5, -1024.0) if k % 2 else (1.0, -2000.0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("rescale", [None, scale])
def test_frames_lie_where_their_headers_say(tmp_path, order, compress, rescale):
    path = enhanced(tmp_path / "in" / "a.dcm", order, rescale, compress)
    check(path)
    check(path.parent)


@pytest.mark.parametrize("order", [(0, 1, 3), (0, 1, 2, 3, 0, 1, 2, 3)])
def test_frames_of_no_single_volume_are_refused(tmp_path, order):
    message = refusal(enhanced(tmp_path / "a.dcm", order))
    assert ("8 slices at 4 places" if len(order) == 8 else "unevenly spaced (2.00 to 4.00 mm)") in message


def test_slices_have_their_own_rescaling(tmp_path):
    for k in range(4):
        slope, intercept = scale(k)
        slice_file(tmp_path / "a", k, RescaleSlope=slope, RescaleIntercept=intercept)
    check(tmp_path / "a")


def test_one_slice_is_as_thick_as_stated(tmp_path):
    affine = AFFINE.copy()
    affine[2, 2] = 3
    check(slice_file(tmp_path, 0), VALUES[:1], affine)
    assert "SliceThickness" in refusal(slice_file(tmp_path, 1, SliceThickness=None))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.25, 0.5]}, "states no PixelSpacing"),
        ({"PixelSpacing": [0.0, 0.5]}, "PixelSpacing (0.0, 0.5)"),
        ({"PixelSpacing": [0.3, 0.5]}, "pixels of 0.3 x 0.5 mm, not 0.25 x 0.5"),
        ({"ImagePositionPatient": None}, "states no position"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}, "another plane"),
        ({"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}, "states orientation"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.3, 0.954, 0]}, "states orientation"),
        ({"BitsStored": 12}, "BitsStored 12, HighBit 15"),
        ({"BitsAllocated": 8}, "BitsAllocated 8, BitsStored 16"),
        ({"SamplesPerPixel": 0}, "0 samples"),
        ({"RescaleSlope": 0.0}, "RescaleSlope 0"),
        ({"PixelData": b"12" * 10}, "pixels cannot be read"),
        ({"Rows": 5}, "has 5 x 5 pixels, not 5 x 6 as"),
    ],
)
def test_the_slice_at_fault_is_named(tmp_path, tags, message):
    for k in range(4):
        slice_file(tmp_path / "a", k, **(tags if k == 0 else {}))
    assert message in refusal(tmp_path / "a", tmp_path / "a" / "9.dcm")


def test_damaged_and_missing_slices(tmp_path):
    folder = tmp_path / "a"
    for k in range(4):
        slice_file(folder, k, ImagesInAcquisition=4)
    (folder / "thumb.jpg").write_bytes(b"a picture")
    check(folder)
    empty = folder / "5.dcm"
    empty.write_bytes(b"")
    assert "damaged" in refusal(folder, empty)
    empty.unlink()
    (folder / "6.dcm").unlink()  # the last slice
    with pytest.warns(UserWarning, match="3 slices, but the header states 4"):
        check(folder, VALUES[:3])
    (folder / "9.dcm").unlink()  # the first
    with pytest.warns(UserWarning, match="numbered from 2"):
        assert read_scan(folder).array.shape == (5, 6, 2)


def test_files_without_preamble_and_of_unknown_class(tmp_path):
    (tmp_path / "b").mkdir()
    for k in range(4):
        file = pydicom.dcmread(slice_file(tmp_path / "a", k, SOPClassUID="1.2.3.999"))
        del file.file_meta
        file.preamble = None
        pydicom.dcmwrite(tmp_path / "b" / f"{k}", file, implicit_vr=True, little_endian=True)
    check(tmp_path / "a")
    assert has_dicom(tmp_path / "b")
    check(tmp_path / "b")


def test_series_of_one_folder_are_cases_of_their_own(tmp_path, caplog):
    folder = tmp_path / "loose"
    for k in range(4):
        slice_file(folder, k)
    for k in range(4):  # another series, with other values
        slice_file(tmp_path / "b", k, SeriesInstanceUID="1.2.4", PixelData=stored(VALUES[k] + 7).tobytes())
        (tmp_path / "b" / f"{9 - k}.dcm").rename(folder / f"b{k}")
    slice_file(tmp_path / "c", 0, SeriesInstanceUID="1.2.5").rename(folder / "localizer.dcm")
    plan = new(folder / "plan.dcm", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.6")
    del plan.Rows, plan.Columns
    plan.save_as(folder / "plan.dcm")
    (folder / "cut.dcm").write_bytes(b"")
    cases = {case["id"]: Path(case["image"]) for case in find_cases(folder)}
    assert set(cases) == {"1.2.3", "1.2.4", "localizer", "cut"}
    assert "not used, beside a DICOM series (1): plan.dcm" in caplog.text
    check(cases["1.2.3"])
    check(cases["1.2.4"], VALUES + 7)
    assert read_scan(cases["localizer"]).array.shape == (5, 6, 1)
    refusal(cases["cut"])
    hashes = {path_sha256(path) for path in cases.values()}
    assert len(hashes) == 4
    listing = tmp_path / "list.csv"  # a list may name one of them
    listing.write_text("image,label\nloose/1.2.4,\n")
    assert [(case["id"], case["image"]) for case in find_cases(listing)] == [("1.2.4", str(folder / "1.2.4"))]
    assert [(case["id"], case["image"]) for case in find_cases(folder / "1.2.4")] == [("1.2.4", str(folder / "1.2.4"))]
    (folder / "cut.dcm").unlink()
    with pytest.warns(UserWarning, match="plan.dcm is no image"):
        assert "3 DICOM series" in refusal(folder) and "/UID" in refusal(folder)
    for k in range(2):
        slice_file(tmp_path / "d", k, SeriesInstanceUID="../../x").rename(folder / f"odd{k}.dcm")
    assert {Path(case["image"]) for case in find_cases(folder)} == {*cases.values(), folder} - {cases["cut"]}
    slice_file(folder, 0, PixelSpacing=[0.3, 0.5])  # what one series lacks, the others do not
    assert "0.3" in refusal(cases["1.2.3"], folder / "9.dcm")
    check(cases["1.2.4"], VALUES + 7)


@pytest.mark.parametrize("modality", ["MR", "DX", "CT"])
@pytest.mark.parametrize("signed", [0, 1])
def test_small_values_that_are_white_are_inverted(tmp_path, modality, signed):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "Modality": modality}
    values = VALUES
    for k in range(4):
        pixels = (VALUES[k] if signed else VALUES[k] + 1024).astype("<i2")
        slice_file(
            tmp_path / "s", k, **tags, PixelRepresentation=signed, PixelData=pixels.tobytes(), RescaleIntercept=-1024
        )
    values = VALUES - 1024 if signed else VALUES
    if modality == "CT":  # Hounsfield units, however they are displayed
        check(tmp_path / "s", values)
        return
    with pytest.warns(UserWarning, match="MONOCHROME1"):  # stored v is shown as 4095 - v, or -1 - v
        check(tmp_path / "s", (-1 if signed else 4095) - 2048 - values)


@pytest.mark.parametrize("modality", ["PT", "NM"])
def test_modalities_without_tasks_are_refused(tmp_path, modality):
    for k in range(4):
        slice_file(tmp_path / "s", k, Modality=modality)
    assert f"modality {modality}" in refusal(tmp_path / "s")


OTHERS = [("MR", "CT"), ("CT", "MR"), ("US", "CT")]


@pytest.mark.parametrize("stated, wanted", [*OTHERS, ("CT", "CT"), ("OT", "CT")])
def test_a_series_of_another_modality_than_the_task_is_refused(tmp_path, stated, wanted):
    for k in range(4):
        slice_file(tmp_path / "s", k, Modality=stated)
    read = build_preprocessing(
        Task(classes=("background", "liver"), modality=wanted, image_size=64, spacing=1.0), labels=False
    )
    if (stated, wanted) not in OTHERS:
        assert read({"image": str(tmp_path / "s")})["image"].shape[0] == 1
        return
    with pytest.raises(InputError) as error:
        read({"image": str(tmp_path / "s")})
    assert f"{tmp_path / 's'} is of modality {stated}" in str(error.value) and f"give {wanted} scans" in str(
        error.value
    )


def test_a_tilted_gantry_shears_the_grid(tmp_path):
    for k in range(4):
        slice_file(tmp_path / "s", k, ImagePositionPatient=[-4, -6 + 0.3 * k, HEIGHTS[k]])
    sheared = AFFINE.copy()
    sheared[1, 2] = -0.3
    check(tmp_path / "s", affine=sheared)


def test_slices_that_drift_from_an_even_grid_are_refused(tmp_path):
    steps = [1.9] * 10 + [2.1] * 10  # each within the tolerance; the middle lies 1 mm off
    heights = np.cumsum([0, *steps])
    for k, z in enumerate(heights):
        slice_file(tmp_path / "s", 0, ImagePositionPatient=[-4, -6, z]).rename(tmp_path / "s" / f"{k:03}.dcm")
    assert "010.dcm lies 1.00 mm off its place" in refusal(tmp_path / "s")
    rounded = np.round(np.arange(21) * 1.953, 1)  # as some scanners write
    for k, z in enumerate(rounded):
        slice_file(tmp_path / "t", 0, ImagePositionPatient=[-4, -6, z]).rename(tmp_path / "t" / f"{k:03}.dcm")
    assert read_scan(tmp_path / "t").affine[2, 2] == pytest.approx(1.953, abs=0.01)


def test_rounded_direction_cosines_are_read(tmp_path):
    for k in range(4):
        turned = [0.71, 0.71, 0, -0.71, 0.71, 0]  # the length is 1.004
        slice_file(tmp_path / "s", k, ImageOrientationPatient=turned)
    assert read_scan(tmp_path / "s").array.shape == (5, 6, 4)


def damaged(path: Path, tag: bytes, place: int, new: bytes) -> None:
    """Replace bytes of an element, counted from its tag."""
    content = path.read_bytes()
    start = content.index(tag, 200) + place  # behind the file meta information
    path.write_bytes(content[:start] + new + content[start + len(new) :])


CLASS_TAG, SERIES_TAG = b"\x08\x00\x16\x00UI", b"\x20\x00\x0e\x00UI"
DAMAGE = [
    *[(CLASS_TAG, 4, vr) for vr in (b"U9", b"UM", b"uI", b"]I")],  # 4 bytes of length follow, or 2
    *[(CLASS_TAG, 8, b"X"), (CLASS_TAG, 6, b"\xff\0"), (SERIES_TAG, 4, b"UM")],
]


@pytest.mark.parametrize(("tag", "place", "new"), DAMAGE)
@pytest.mark.parametrize("k", [0, 3])
def test_a_slice_with_a_damaged_class_or_series_is_not_lost(tmp_path, tag, place, new, k):
    folder = tmp_path / "s"
    for n in range(4):
        slice_file(folder, n, PatientName="Secret^Name")
    damaged(folder / f"{9 - k}.dcm", tag, place, new)
    assert [case["image"] for case in find_cases(folder)] == [str(folder)]
    for path in (folder, folder / "1.2.3", folder / f"{9 - k}.dcm"):
        if path.suffix == ".dcm" and tag == SERIES_TAG:
            continue
        message = refusal(path, folder / f"{9 - k}.dcm")
        assert "damaged" in message and len(message) < len(str(path)) + 350 and "Secret" not in message
