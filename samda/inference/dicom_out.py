# SPDX-License-Identifier: Apache-2.0
"""Write label maps of DICOM series as DICOM: segmentations (SEG, by highdicom) and contours (RTSTRUCT).

Both refer to every image of the series and carry its patient, study and frame of reference. A plane of the label map
lies on the slice that it comes from, also where the slices are oblique or a tilted gantry shears the volume. Names of
patients are written to these files only.
"""

from __future__ import annotations

import copy
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import SpatialImage
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import Code, codes
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from samda.data.dicom import Frame, series_frames
from samda.data.dicom_files import is_dicom, is_series, quiet
from samda.data.labels import count_ids
from samda.errors import InputError, SamdaError, UsageError, nearest, one_line
from samda.inference.codes import ClassCode, class_code
from samda.inference.contours import mask_contours
from samda.inference.writer import PURPOSE, file_name, label_image
from samda.io import Image, files_of, replacing
from samda.report import class_color
from samda.task import Task
from samda.version import __version__

logger = logging.getLogger(__name__)

NIFTI = "nifti"
SEGMENTATIONS = {"dicom-seg": "BINARY", "dicom-seg-labelmap": "LABELMAP"}
DICOM_FORMATS = (*SEGMENTATIONS, "rtstruct")
FORMATS = (NIFTI, *DICOM_FORMATS)  # of label maps
LONG_TEXT = 64  # characters of a text in DICOM (LO)
UTF8 = "ISO_IR 192"
SERIES_NUMBER = 1000  # beyond those of scanners
DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"
NEEDED = ("SOPInstanceUID", "SOPClassUID")
GIVEN = {  # identifiers that are made where pseudonymization has emptied them
    "StudyInstanceUID": "study",
    "SeriesInstanceUID": "series",
    "FrameOfReferenceUID": "frame of reference",
}
COPIED = (  # of patient and study, which must be there, if empty
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
KEPT = ("StudyDescription", "PatientAge", "PatientSize", "PatientWeight")  # the same, if they are there
PATIENT = 0x0010  # group of elements


def parse_formats(text: str | Sequence[str]) -> tuple[str, ...]:
    """Output formats, given as a list or as text with commas; UsageError for unknown ones."""
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text)
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"unknown output format {name!r}; {nearest(str(name), FORMATS)}")
    if not names:
        raise UsageError(f"no output format is given; choose from {', '.join(FORMATS)}")
    if set(names) & SEGMENTATIONS.keys():
        _highdicom()
    return tuple(dict.fromkeys(names))


def dicom_path(folder: str | Path, case: str, kind: str) -> Path:
    """Path of a DICOM object of a case, in a folder of its kind, so that it is not mistaken for a series or a label."""
    return Path(folder) / kind / f"{file_name(case)}.dcm"


def check_series(scan: Image | SpatialImage | None) -> Path:
    """The file or folder of a DICOM scan; InputError for scans of other formats."""
    path = None if scan is None or isinstance(scan, SpatialImage) else files_of(scan)[0]
    if path is None or not (is_series(path) or is_dicom(path)):
        name = "the scan in memory" if path is None else path
        raise InputError(f"{name} is no DICOM series, to which DICOM output must refer; use --output-format nifti")
    return path


def check_cases(cases: Sequence[Mapping[str, Any]], formats: Sequence[str]) -> None:
    """InputError if DICOM output is asked for and no case is a DICOM series; others of a folder fail alone."""
    reasons = []
    for case in cases if set(formats) & {*DICOM_FORMATS} else ():
        try:
            check_series(case["image"])
            return
        except InputError as error:
            reasons.append(error)
    if reasons:
        raise reasons[0]


def write_dicom(
    kind: str, path: str | Path, labels: np.ndarray, task: Task | None, scan: Image | SpatialImage | None
) -> Path:
    """Write a label map as a DICOM object; returns its path. Classes without voxels are left out, with a warning.

    Args:
        kind: "dicom-seg" (BINARY, which every viewer reads), "dicom-seg-labelmap" (one label map, for few) or
            "rtstruct" (contours).
        path: of the file.
        labels: (X, Y, Z) class indices in the axis order of the scan.
        task: classes, and their codes if it has them.
        scan: DICOM file or folder of a series.

    Raises:
        InputError: the scan is no DICOM series or lacks an identifier, or no class has voxels.
        UsageError: no task, as of a result that was made without.
    """
    if task is None:
        raise UsageError("a result without task has no names of classes; use samda.Predictor or samda.load")
    source = check_series(scan)
    found = [k for k in count_ids(labels, str(source)) if k]
    missing = [name for k, name in enumerate(task.classes) if k and k not in found]
    if not found:
        raise InputError(f"{source}: no class was found, and a {kind} of nothing cannot be written; use nifti")
    if missing:
        logger.warning("%s: no voxel of %s, left out of the %s", source, ", ".join(missing), kind)
    known = {k: class_code(task, task.classes[k]) for k in found}
    with _writing(source, kind):
        series = _Series(source, labels)
        build = _structure_set if kind == "rtstruct" else _segmentation
        result = build(kind, series, labels, task, known)
        for tag, element in series.patient.items():
            result[tag] = element
        with replacing(path) as temporary:
            result.save_as(temporary, enforce_file_format=True)
    return Path(path)


def write_formats(
    formats: Sequence[str],
    folder: str | Path,
    case: str,
    labels: np.ndarray,
    task: Task | None,
    scan: Image | SpatialImage | None,
) -> None:
    """Write the DICOM objects of a case among `formats`; none of an empty label map, of which an older one is removed.

    For the other arguments see :func:`write_dicom`.
    """
    for kind in formats:
        if kind == NIFTI:
            continue
        path = dicom_path(folder, case, kind)
        if labels.any():
            write_dicom(kind, path, labels, task, scan)
        else:
            path.unlink(missing_ok=True)
            logger.warning("case %s: no foreground, so no %s is written", case, kind)


class DicomOutput:
    """A label map `labels` (X, Y, Z) of a `scan` as a nibabel image or as DICOM, with the classes of `task`."""

    labels: np.ndarray
    affine: np.ndarray
    task: Task | None
    scan: Path | SpatialImage | None

    @property
    def image(self) -> SpatialImage:
        """The label map as a nibabel image with affine and form codes of the scan."""
        return label_image(self.labels, self.scan, self.affine)

    def to_dicom_seg(self, path: str | Path, labelmap: bool = False) -> Path:
        """Write the label map as a DICOM SEG: BINARY, or with `labelmap` a LABELMAP; see `write_dicom`."""
        return self._to(list(SEGMENTATIONS)[labelmap], path)

    def to_rtstruct(self, path: str | Path) -> Path:
        """Write the contours of the label map as a DICOM RTSTRUCT; see `write_dicom`."""
        return self._to("rtstruct", path)

    def _to(self, kind: str, path: str | Path) -> Path:
        parse_formats([kind])
        return write_dicom(kind, path, self.labels, self.task, self.scan)


# -------------------------------------------------------------------------------------------------------------- series


class _Series:
    """The images of a scan, in the order of the planes of its label map, with what DICOM objects must refer to."""

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        frames, headers, affine = series_frames(path)
        rows, columns = frames[0].shape
        if labels.shape != (columns, rows, len(frames)):
            raise InputError(
                f"{path} has {columns} x {rows} x {len(frames)} voxels, its label map {labels.shape}; predict it again"
            )
        self.path, self.frames = path, frames
        self.headers = {file: _completed(header, file) for file, header in headers.items()}
        first = next(iter(self.headers.values()))
        for header in self.headers.values():
            if not header.get("SliceThickness"):  # highdicom reads it
                header.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.6g}"
        for tag, what in GIVEN.items():
            empty = [header for header in self.headers.values() if not header.get(tag)]
            if empty:
                logger.warning("%s states no %s (%s); a new one is written", path, what, tag)
            uid = generate_uid(entropy_srcs=[str(first.get("SeriesInstanceUID") or first.SOPInstanceUID), what])
            for header in empty:
                setattr(header, tag, uid)
        self.first = first
        self.patient = {tag: copy.deepcopy(first[tag]) for tag in (*COPIED, *KEPT) if tag in first}
        for header in self.headers.values():  # highdicom refuses odd values, which must stay as they are
            for element in [*header.group_dataset(PATIENT), *(header[tag] for tag in KEPT if tag in header)]:
                if element.tag in header:
                    del header[element.tag]
            for tag in COPIED:
                setattr(header, tag, "")

    @property
    def images(self) -> list[Dataset]:
        """The headers of the files in the order of their first planes."""
        return [self.headers[path] for path in dict.fromkeys(frame.path for frame in self.frames)]

    def reference(self, frame: Frame) -> Dataset:
        """The reference to the image of a plane."""
        header, item = self.headers[frame.path], Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        if int(header.get("NumberOfFrames") or 1) > 1:
            item.ReferencedFrameNumber = frame.number + 1
        return item


def _completed(header: Dataset, path: Path) -> Dataset:
    """A header with empty values for what may be missing; without an identifier it is refused."""
    meta = getattr(header, "file_meta", {})
    for tag in NEEDED:
        if not header.get(tag) and meta.get(f"MediaStorage{tag}"):
            setattr(header, tag, meta[f"MediaStorage{tag}"].value)
        if not header.get(tag):
            raise InputError(f"{path} states no {tag}, to which DICOM output must refer; repair it or use nifti")
    for tag in COPIED:
        if tag not in header:
            setattr(header, tag, "")
    return header


@contextmanager
def _writing(path: Path, kind: str) -> Iterator[None]:
    """Values of the source are taken over as they are; what cannot be written is an InputError without them."""
    try:
        with quiet(), disable_value_validation():
            yield
    except (SamdaError, OSError, MemoryError):
        raise
    except Exception as error:  # highdicom and pydicom raise of any kind; their texts may contain patient data
        logger.debug("%s cannot be written as %s", path, kind, exc_info=error)
        reason = one_line(error) if isinstance(error, AttributeError) else type(error).__name__
        raise InputError(f"{path} cannot be written as {kind} ({reason}; see --debug); use nifti") from error


def _text(text: str, length: int = LONG_TEXT) -> str:
    """A text as DICOM allows it: of one value, and not too long."""
    return text.replace("\\", "/")[:length].strip()


def _code_item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


# ---------------------------------------------------------------------------------------------------------------- SEG


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise UsageError("dicom-seg needs the package highdicom; pip install 'samda[dicom]'") from error
    return highdicom


def _segmentation(
    kind: str, series: _Series, labels: np.ndarray, task: Task, known: Mapping[int, ClassCode]
) -> Dataset:
    hd = _highdicom()
    algorithm = hd.AlgorithmIdentificationSequence(
        name=_text(f"samda {__version__} {task.name}"),
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        source="samda",
        parameters={"model": task.name},
    )
    segments, numbers = [], np.zeros(task.num_classes, labels.dtype)
    for number, (k, code) in enumerate(known.items(), 1):
        numbers[k] = number
        segment = hd.seg.SegmentDescription(
            number,
            _text(task.classes[k]),
            code.category,
            code.type,
            "AUTOMATIC",
            algorithm,
            anatomic_regions=[code.region] if code.region else None,
            display_color=hd.color.CIELabColor.from_rgb(*class_color(k)),
        )
        if code.side:
            kind_of = segment.SegmentedPropertyTypeCodeSequence[0]
            kind_of.SegmentedPropertyTypeModifierCodeSequence = [_code_item(code.side)]
        segments.append(segment)
    order = list(range(len(series.frames)))
    if len(series.headers) == 1:  # frames of a file in the order of the file
        order.sort(key=lambda k: series.frames[k].number)
    return hd.seg.Segmentation(
        series.images,
        numbers[labels.transpose(2, 1, 0)[order]],
        SEGMENTATIONS[kind],
        segments,
        series_instance_uid=generate_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="samda",
        manufacturer_model_name="samda",
        software_versions=__version__,
        device_serial_number=__version__,
        content_description=PURPOSE,
        content_label="SEGMENTATION",
        series_description=_text(f"samda {task.name}"),
        specific_character_set=UTF8,
    )


# ----------------------------------------------------------------------------------------------------------- RTSTRUCT


def _structure_set(
    kind: str, series: _Series, labels: np.ndarray, task: Task, known: Mapping[int, ClassCode]
) -> Dataset:
    now = datetime.datetime.now()
    result = Dataset()
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit texts end at 64 KiB, contours do not
    result.SpecificCharacterSet = UTF8
    result.StudyInstanceUID = series.first.StudyInstanceUID
    result.SOPClassUID, result.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    result.Modality, result.SeriesInstanceUID, result.SeriesNumber = "RTSTRUCT", generate_uid(), SERIES_NUMBER + 1
    result.InstanceNumber, result.SeriesDescription = 1, _text(f"samda {task.name}")
    result.Manufacturer = result.ManufacturerModelName = "samda"
    result.SoftwareVersions, result.OperatorsName = __version__, ""
    result.StructureSetLabel, result.StructureSetName = "samda", _text(task.name)
    result.StructureSetDescription, result.ApprovalStatus = PURPOSE, "UNAPPROVED"
    for event in ("InstanceCreation", "StructureSet", "Series"):
        setattr(result, f"{event}Date", now.strftime("%Y%m%d"))
        setattr(result, f"{event}Time", now.strftime("%H%M%S"))
    result.FrameOfReferenceUID, result.PositionReferenceIndicator = series.first.FrameOfReferenceUID, ""
    result.ReferencedFrameOfReferenceSequence = [_referenced(series)]
    lines = _contours(series, labels)
    result.StructureSetROISequence, result.ROIContourSequence, result.RTROIObservationsSequence = [], [], []
    for number, (k, code) in enumerate(known.items(), 1):
        roi, contours, about = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = number, _text(task.classes[k]), "AUTOMATIC"
        roi.ReferencedFrameOfReferenceUID = series.first.FrameOfReferenceUID
        roi.ROIGenerationDescription = _text(f"samda {__version__} {task.name}, {PURPOSE}")
        contours.ReferencedROINumber, contours.ROIDisplayColor = number, list(class_color(k))
        contours.ContourSequence = lines[k]
        about.ObservationNumber, about.ReferencedROINumber = number, number
        about.RTROIIdentificationCodeSequence = [_code_item(code.type)]
        about.RTROIInterpretedType, about.ROIInterpreter = "", ""
        result.StructureSetROISequence.append(roi)
        result.ROIContourSequence.append(contours)
        result.RTROIObservationsSequence.append(about)
    return result


def _referenced(series: _Series) -> Dataset:
    """Frame of reference, study, series and all images of a series."""
    place, study, images = Dataset(), Dataset(), Dataset()
    place.FrameOfReferenceUID = series.first.FrameOfReferenceUID
    place.RTReferencedStudySequence = [study]
    study.ReferencedSOPClassUID = DETACHED_STUDY
    study.ReferencedSOPInstanceUID = series.first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [images]
    images.SeriesInstanceUID = series.first.SeriesInstanceUID
    images.ContourImageSequence = [series.reference(frame) for frame in series.frames]
    return place


def _contours(series: _Series, labels: np.ndarray) -> dict[int, list[Dataset]]:
    """The contours of each class, slice by slice."""
    found: dict[int, list[Dataset]] = {}
    for frame, plane in zip(series.frames, np.moveaxis(labels, 2, 0), strict=True):
        steps = np.stack([frame.columns * frame.spacing_mm[0], frame.rows * frame.spacing_mm[1]])
        plane = np.ascontiguousarray(plane.T)
        for k in np.unique(plane[plane > 0]):
            for line in mask_contours(plane == k):
                points = line @ steps + frame.position
                contour = Dataset()
                contour.ContourImageSequence = [series.reference(frame)]
                contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
                contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
                found.setdefault(int(k), []).append(contour)
    return found
