# SPDX-License-Identifier: Apache-2.0
"""Label maps go out as DICOM and come back voxel by voxel, whatever the slices' orientation."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import highdicom
import numpy as np
import PIL.Image
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from scipy import ndimage
from skimage.draw import polygon2mask

from samda.data.dicom_labels import referenced_series
from samda.data.readers import read_scan
from samda.errors import InputError, UsageError
from samda.inference.codes import class_code
from samda.inference.contours import mask_contours
from samda.inference.dicom_out import write_dicom
from samda.inference.folder import predict_folder
from samda.inference.predict import Prediction, Predictor
from samda.report import class_color
from samda.task import Task

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
CLASSES = ("background", "liver", "kidney_left", "gadget", "spleen")
TASK = Task(name="organs", classes=CLASSES, codes={"gadget": ["X-1", "99SITE", "Gadget"]})
SPACING = (1.5, 2.0)  # between rows, between columns
SHAPE = (24, 20, 7)  # columns, rows, slices
PLANES = {
    "axial": ([1, 0, 0, 0, 1, 0], (0, 0, 3)),
    "sagittal": ([0, 1, 0, 0, 0, -1], (3, 0, 0)),
    "coronal": ([1, 0, 0, 0, 0, -1], (0, 3, 0)),
    "oblique": ([0.8, 0.6, 0, -0.36, 0.48, 0.8], (0.48 * 3, -0.64 * 3, 0.6 * 3)),
    "tilted": ([1, 0, 0, 0, 0.96, -0.28], (0, 0, 3)),  # gantry tilt: the step is not normal to the slices
}


def new(path: Path, kind: str, number: int) -> FileDataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, f"1.2.3.{number}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID, file.SeriesInstanceUID = kind, f"1.2.3.{number}", "1.2.3"
    file.StudyInstanceUID, file.FrameOfReferenceUID, file.Modality = "1.2", "1.2.9", "CT"
    file.SpecificCharacterSet, file.PatientName, file.PatientID = "ISO_IR 100", "Müller^Jane", "P7"
    file.Columns, file.Rows = SHAPE[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 1
    file.BitsAllocated, file.BitsStored, file.HighBit, file.InstanceNumber = 16, 16, 15, number
    file.RescaleSlope, file.RescaleIntercept = 1, 0
    return file


def positions(plane: str) -> np.ndarray:
    return np.array([-30.0, -20.5, 100.25]) + np.arange(SHAPE[2])[:, None] * np.array(PLANES[plane][1])


def write_series(folder: Path, plane: str = "axial", values: np.ndarray | None = None, **tags: object) -> Path:
    """A series with file names in another order than that of the slices; None removes a tag."""
    values = np.zeros(SHAPE, np.int16) if values is None else values
    for k, place in enumerate(positions(plane)):
        file = new(folder / f"{(3 * k) % SHAPE[2]}.dcm", CT, k + 1)
        file.ImagePositionPatient, file.ImageOrientationPatient = [*map(float, place)], PLANES[plane][0]
        file.PixelSpacing, file.SliceThickness = [*SPACING], 3.0
        file.PixelData = values[:, :, k].T.astype("<i2").tobytes()
        for name, value in tags.items():
            if value is None:
                del file[name]
            else:
                setattr(file, name, value)
        file.save_as(folder / f"{(3 * k) % SHAPE[2]}.dcm")
    return folder


def write_enhanced(path: Path, plane: str) -> Path:
    """The same as frames of one file, in another order than that of the slices."""
    file = new(path, ENHANCED_CT, 1)
    measures, plane_of, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [*SPACING], 3.0
    plane_of.ImageOrientationPatient = PLANES[plane][0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane_of]
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], []
    for k in np.random.default_rng(1).permutation(SHAPE[2]):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [*map(float, positions(plane)[k])]
        frame.PlanePositionSequence = [place]
        file.PerFrameFunctionalGroupsSequence.append(frame)
    file.NumberOfFrames, file.PixelData = SHAPE[2], b"\0" * (2 * int(np.prod(SHAPE)))
    file.save_as(path)
    return path


def series_order(plane: str) -> list[int]:
    """Slices as samda stacks them: along the normal of the rows and columns."""
    cosines = np.array(PLANES[plane][0], float)
    along = positions(plane) @ np.cross(cosines[:3], cosines[3:])
    return [int(k) for k in np.argsort(along)]


def blobs() -> np.ndarray:
    """Classes 1 to 3 with holes, islands and corners, none of class 4; in the order of `positions`."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:15, 2:14, 1:6] = 1
    labels[6:11, 5:10, 2:5] = 0  # a hole
    labels[8, 7, 2:5] = 2  # an island in it
    labels[12, 11, 3] = 3  # in the first one
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random(SHAPE), 0.8) > 0.52
    labels[15:] = np.where(noise[15:], 2, 0)
    return labels


def read_by_hand(path: Path, plane: str) -> np.ndarray:
    """The label map from pydicom's own pixel array: each frame is placed by its position."""
    seg = pydicom.dcmread(path)
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    found = np.zeros(SHAPE, np.uint8)
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        apart = np.linalg.norm(positions(plane) - group.PlanePositionSequence[0].ImagePositionPatient, axis=1)
        assert apart.min() < 1e-3
        if seg.SegmentationType == "LABELMAP":
            found[:, :, apart.argmin()] = frame.T
        else:
            number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            found[:, :, apart.argmin()][frame.T > 0] = number
    orientation = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    np.testing.assert_allclose(orientation, PLANES[plane][0], atol=1e-6)
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert tuple(measures.PixelSpacing) == SPACING
    return found


def read_by_highdicom(path: Path) -> np.ndarray:
    seg = highdicom.seg.segread(path)
    images = [f"1.2.3.{k + 1}" for k in range(SHAPE[2])]
    stack = seg.get_pixels_by_source_instance(
        images, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    return stack.transpose(2, 1, 0).astype(np.uint8)


@pytest.mark.parametrize("kind", ["dicom-seg", "dicom-seg-labelmap"])
@pytest.mark.parametrize("plane", list(PLANES))
def test_segmentation_comes_back_voxel_by_voxel(tmp_path, plane, kind):
    labels = blobs()
    folder = write_series(tmp_path / "series", plane)
    path = write_dicom(kind, tmp_path / "a.dcm", labels[:, :, series_order(plane)], TASK, folder)
    np.testing.assert_array_equal(read_by_hand(path, plane), labels)
    np.testing.assert_array_equal(read_by_highdicom(path), labels)


@pytest.mark.parametrize("plane", ["axial", "oblique", "tilted"])
def test_frames_of_one_file_are_referred_to(tmp_path, plane):
    labels, source = blobs(), write_enhanced(tmp_path / "in" / "e.dcm", plane)
    path = write_dicom("dicom-seg", tmp_path / "a.dcm", labels[:, :, series_order(plane)], TASK, source)
    np.testing.assert_array_equal(read_by_hand(path, plane), labels)
    contours = write_dicom("rtstruct", tmp_path / "r.dcm", labels[:, :, series_order(plane)], TASK, source)
    np.testing.assert_array_equal(from_contours(contours, plane), labels)
    places = pydicom.dcmread(source).PerFrameFunctionalGroupsSequence
    for contour in all_contours(pydicom.dcmread(contours)):
        number = contour.ContourImageSequence[0].ReferencedFrameNumber
        corner = np.array(places[number - 1].PlanePositionSequence[0].ImagePositionPatient, float)
        normal = np.cross(PLANES[plane][0][:3], PLANES[plane][0][3:])
        assert np.abs((np.reshape(contour.ContourData, (-1, 3)).astype(float) - corner) @ normal).max() < 1e-3


def compress(path: Path, syntax: UID) -> None:
    """Compress a file of unsigned pixels without loss."""
    file = pydicom.dcmread(path)
    if syntax != JPEG2000Lossless:
        file.compress(syntax, generate_instance_uid=False)
    else:  # by Pillow, as pydicom needs a further package
        code = io.BytesIO()
        image = PIL.Image.fromarray(file.pixel_array.astype(np.uint16))
        image.save(code, "JPEG2000", irreversible=False, no_jp2=True)
        file.PixelData, file.file_meta.TransferSyntaxUID = encapsulate([code.getvalue()]), syntax
        file["PixelData"].VR = "OB"
    file.save_as(path)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_series(tmp_path, phantom, predictor, syntax):
    labels = phantom.truth(SHAPE)
    stored = np.asarray((1024, 1184, 904), np.int16)[labels]
    folder = write_series(tmp_path / "in", "axial", stored, PixelRepresentation=0, RescaleIntercept=-1024)
    for path in folder.iterdir():
        compress(path, syntax)
    np.testing.assert_array_equal(read_scan(folder).array, stored - 1024)
    prediction = predictor.predict(folder)
    np.testing.assert_array_equal(read_by_hand(prediction.to_dicom_seg(tmp_path / "seg.dcm"), "axial"), labels)
    np.testing.assert_array_equal(from_contours(prediction.to_rtstruct(tmp_path / "rt.dcm"), "axial"), labels)


def all_contours(structures: Dataset) -> list[Dataset]:
    return [contour for roi in structures.ROIContourSequence for contour in roi.ContourSequence]


def from_contours(path: Path, plane: str, combine=np.logical_or) -> np.ndarray:
    """The label map of an RTSTRUCT, filled by scikit-image; every contour must lie on a slice."""
    structures = pydicom.dcmread(path)
    cosines = np.array(PLANES[plane][0], float)
    found = np.zeros(SHAPE, np.uint8)
    for roi in structures.ROIContourSequence:
        masks = np.zeros(SHAPE, bool)
        for contour in roi.ContourSequence:
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            points = np.reshape(contour.ContourData, (-1, 3)).astype(float)
            assert len(points) == contour.NumberOfContourPoints
            offsets = points[:, None] - positions(plane)
            heights = np.abs(offsets @ np.cross(cosines[:3], cosines[3:]))
            k = int(heights.max(0).argmin())
            assert heights[:, k].max() < 1e-3
            line = np.stack([offsets[:, k] @ cosines[3:] / SPACING[0], offsets[:, k] @ cosines[:3] / SPACING[1]], 1)
            masks[:, :, k] = combine(masks[:, :, k], polygon2mask(SHAPE[1::-1], line).T)
        found[masks] = roi.ReferencedROINumber
    return found


@pytest.mark.parametrize("combine", [np.logical_or, np.logical_xor])
@pytest.mark.parametrize("plane", list(PLANES))
def test_contours_come_back_voxel_by_voxel(tmp_path, plane, combine):
    labels = blobs()
    folder = write_series(tmp_path / "series", plane)
    path = write_dicom("rtstruct", tmp_path / "a.dcm", labels[:, :, series_order(plane)], TASK, folder)
    np.testing.assert_array_equal(from_contours(path, plane, combine), labels)
    images = {f"1.2.3.{k + 1}": place for k, place in enumerate(positions(plane))}
    normal = np.cross(PLANES[plane][0][:3], PLANES[plane][0][3:])
    for contour in all_contours(pydicom.dcmread(path)):
        (image,) = contour.ContourImageSequence
        points = np.reshape(contour.ContourData, (-1, 3)).astype(float)
        assert np.abs((points - images[image.ReferencedSOPInstanceUID]) @ normal).max() < 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_every_pixel_center_is_inside_or_outside(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 40, 2))
    mask = ndimage.gaussian_filter(rng.random(shape), seed % 4 / 2) > 0.5
    for combine in (np.logical_or, np.logical_xor):
        filled = np.zeros(shape, bool)
        for line in mask_contours(mask):
            filled = combine(filled, polygon2mask(shape, line))
        np.testing.assert_array_equal(filled, mask)


def test_contours_have_the_area_of_the_mask():
    rows, columns = np.indices((80, 80))
    ring = np.abs(np.hypot(rows - 40, columns - 38) - 25) < 8
    (line,) = mask_contours(ring)  # a keyhole, not two contours
    following = np.roll(line, -1, axis=0)
    area = abs((line[:, 0] * following[:, 1] - line[:, 1] * following[:, 0]).sum()) / 2
    assert area == pytest.approx(np.pi * (33**2 - 17**2), rel=0.01)


def test_segments_say_what_they_are(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        path = write_dicom("dicom-seg", tmp_path / "a.dcm", blobs(), TASK, write_series(tmp_path / "series"))
    assert "spleen" in caplog.text  # empty, so left out
    assert "Jane" not in caplog.text and "P7" not in caplog.text
    seg = pydicom.dcmread(path)
    labels = [segment.SegmentLabel for segment in seg.SegmentSequence]
    types = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in seg.SegmentSequence]
    assert labels == ["liver", "kidney_left", "gadget"]
    codes = [(code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning) for code in types]
    assert codes == [("10200004", "SCT", "Liver"), ("64033007", "SCT", "Kidney"), ("X-1", "99SITE", "Gadget")]
    assert types[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    for k, segment in enumerate(seg.SegmentSequence, 1):
        assert segment.SegmentAlgorithmType == "AUTOMATIC" and segment.SegmentAlgorithmName.startswith("samda 0.")
        color = highdicom.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue)
        assert np.abs(np.subtract(color.to_rgb(clip=True), class_color(k))).max() <= 1
    assert (seg.SegmentationType, seg.Modality, seg.SeriesDescription) == ("BINARY", "SEG", "samda organs")
    assert "research use only" in seg.ContentDescription
    assert (seg.PatientName, seg.PatientID, seg.StudyInstanceUID) == ("Müller^Jane", "P7", "1.2")
    assert seg.FrameOfReferenceUID == "1.2.9" and seg.SeriesInstanceUID != "1.2.3"
    (series,) = seg.ReferencedSeriesSequence
    images = {image.ReferencedSOPInstanceUID for image in series.ReferencedInstanceSequence}
    assert series.SeriesInstanceUID == "1.2.3" and images == {f"1.2.3.{k + 1}" for k in range(SHAPE[2])}


def test_structures_say_what_they_are(tmp_path):
    path = write_dicom("rtstruct", tmp_path / "a.dcm", blobs(), TASK, write_series(tmp_path / "series"))
    file = pydicom.dcmread(path)
    assert [roi.ROIName for roi in file.StructureSetROISequence] == ["liver", "kidney_left", "gadget"]
    assert {roi.ROIGenerationAlgorithm for roi in file.StructureSetROISequence} == {"AUTOMATIC"}
    assert {roi.ReferencedFrameOfReferenceUID for roi in file.StructureSetROISequence} == {"1.2.9"}
    assert [list(roi.ROIDisplayColor) for roi in file.ROIContourSequence] == [list(class_color(k)) for k in (1, 2, 3)]
    assert file.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeValue == "10200004"
    assert (file.PatientName, file.PatientID, file.StudyInstanceUID) == ("Müller^Jane", "P7", "1.2")
    assert file.Modality == "RTSTRUCT" and file.SOPClassUID == file.file_meta.MediaStorageSOPClassUID
    (place,) = file.ReferencedFrameOfReferenceSequence
    (series,) = place.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    images = {image.ReferencedSOPInstanceUID for image in series.ContourImageSequence}
    assert series.SeriesInstanceUID == "1.2.3" and images == {f"1.2.3.{k + 1}" for k in range(SHAPE[2])}


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
@pytest.mark.parametrize(
    "tags",
    [
        {"PatientName": None, "PatientID": None, "SpecificCharacterSet": None, "Modality": None},
        {"FrameOfReferenceUID": None, "SliceThickness": None, "InstanceNumber": None},
        {"StudyDate": "", "StudyTime": "", "StudyID": "longer than sixteen characters", "PatientBirthDate": "unknown"},
        {"AccessionNumber": "12345678901234567890", "PatientSex": "?", "PatientAge": "40"},
        {"StudyDescription": "x" * 99, "PatientName": "a" * 80},
        {"StudyInstanceUID": "", "SeriesInstanceUID": "", "SOPInstanceUID": ""},
    ],
)
def test_a_missing_or_odd_tag_does_not_stop_the_export(tmp_path, kind, tags):
    labels, folder = blobs(), write_series(tmp_path / "series", **tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_dicom(kind, tmp_path / "a.dcm", labels, TASK, folder)
        found = from_contours(path, "axial") if kind == "rtstruct" else read_by_hand(path, "axial")
    np.testing.assert_array_equal(found, labels)
    assert pydicom.dcmread(path).get("FrameOfReferenceUID", "1.2.9") or kind == "rtstruct"
    assert pydicom.dcmread(path).StudyInstanceUID and referenced_series(path)


@pytest.mark.parametrize("tag", ["SOPInstanceUID", "SOPClassUID"])
def test_images_without_identity_are_refused(tmp_path, tag):
    folder = write_series(tmp_path / "series", **{tag: None})
    for path in folder.iterdir():
        file = pydicom.dcmread(path)
        del file.file_meta, file.preamble
        pydicom.dcmwrite(path, file, implicit_vr=True, little_endian=True)
    with pytest.raises(InputError, match=tag) as caught:
        write_dicom("dicom-seg", tmp_path / "a.dcm", blobs(), TASK, folder)
    assert str(folder) in str(caught.value) and not (tmp_path / "a.dcm").exists()


def test_nothing_cannot_be_written(tmp_path):
    folder = write_series(tmp_path / "series")
    for kind in ("dicom-seg", "rtstruct"):
        with pytest.raises(InputError, match="no class"):
            write_dicom(kind, tmp_path / "a.dcm", np.zeros(SHAPE, np.uint8), TASK, folder)
    result = Prediction("a", np.zeros(SHAPE, np.uint8), np.eye(4), CLASSES, folder, task=TASK)
    result.save(tmp_path / "out", ["nifti", "dicom-seg"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == ["a.json", "a.nii.gz"]


@pytest.fixture
def predictor(band_network: torch.nn.Module, band_task: Task) -> Predictor:
    return Predictor(band_network, band_task)


def test_folders_hold_dicom_beside_nifti(tmp_path, phantom, predictor):
    labels = phantom.truth(SHAPE)
    write_series(tmp_path / "in" / "s1", "axial", np.asarray((0, 160, -120), np.int16)[labels])
    phantom.write(tmp_path / "in" / "scan.nii.gz", labels, np.diag([1.0, 1.0, 3.0, 1.0]))
    formats = ["nifti", "dicom-seg", "rtstruct"]
    result = predict_folder(predictor, tmp_path / "in", tmp_path / "out", formats=formats)
    assert result.done == ["s1"] and list(result.failed) == ["scan"] and "scan.nii.gz" in result.failed["scan"]
    expected = {"s1.nii.gz", "s1.json", "dicom-seg/s1.dcm", "rtstruct/s1.dcm"}
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*") if p.is_file()}
    assert {name for name in files if not name.startswith(".")} == expected
    np.testing.assert_array_equal(read_by_hand(tmp_path / "out" / "dicom-seg" / "s1.dcm", "axial"), labels)
    again = predict_folder(predictor, tmp_path / "in" / "s1", tmp_path / "out", formats=formats, skip_finished=True)
    assert again.skipped == ["s1"]
    (tmp_path / "out" / "rtstruct" / "s1.dcm").unlink()
    again = predict_folder(predictor, tmp_path / "in" / "s1", tmp_path / "out", formats=formats, skip_finished=True)
    assert again.done == ["s1"]


def test_other_scans_and_formats_are_refused(tmp_path, phantom, predictor):
    scan = phantom.write(tmp_path / "scan.nii.gz", phantom.truth((8, 8, 4)), np.eye(4))
    with pytest.raises(InputError, match=r"scan\.nii\.gz"):
        predict_folder(predictor, scan, tmp_path / "out", formats=["dicom-seg"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="dicom-seg"):
        predict_folder(predictor, scan, tmp_path / "out", formats=["dicomseg"])
    with pytest.raises(InputError, match=r"scan\.nii\.gz"):
        predictor.predict(scan).to_rtstruct(tmp_path / "a.dcm")


def test_a_code_of_our_own_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    task = Task(name="odd", classes=("background", "zonula quarta"))
    first, again = (class_code(task, "zonula quarta") for _ in range(2))
    assert first == again and tuple(first.type[:3]) == ("zonulaquarta", "99SAMDA", "zonula quarta")
    assert [record.name for record in caplog.records] == ["samda.inference.codes"]
