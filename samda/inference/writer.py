# SPDX-License-Identifier: Apache-2.0
"""Write label maps and probabilities on the grid of the scan, and the table of predicted Dice."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.spatialimages import SpatialImage

from samda.data.folders import Case
from samda.data.formats import NIFTI_SUFFIXES, PICTURE_SUFFIXES, copy_of, stem
from samda.data.readers import load_nifti, qform_of
from samda.errors import InputError, UsageError
from samda.expected_dice import TRUSTED, CaseQuality
from samda.io import Image, csv_text, files_of, parse_json, regular_file, replacing, write_json, write_text
from samda.version import __version__

LONGEST_NAME = 200  # bytes of a case id: file systems allow 255, suffixes and the prefix of hidden files included
PURPOSE = "research use only, not for clinical decisions"
EMPTIED = {  # texts of a header, and numbers that NIfTI does not use and that may be anything, or are those of the scan
    **dict.fromkeys(("aux_file", "db_name", "data_type", "unused_str"), b""),
    **dict.fromkeys(("extents", "session_error", "glmax", "glmin", "cal_min", "cal_max"), 0),
}
TABLE = "predictions.csv"
HEAD = ("case", "class", "dice", "low", "high", "flags")
COMMISSION_VERSION = 1  # of the reports of `samda commission`
MOST_SHIFT = 4.0  # of the logit, see samda.adaptation.commission.recalibration
MOST_NUMBER = 1e9
QUALITY, SOURCE = "quality", "source"  # keys of `<case>.json`


def file_name(case: str) -> str:
    """The id of a case, refused if it cannot name a file."""
    if Path(case).name != case or case.startswith(".") or not case.isprintable():
        raise UsageError(f"case id {case!r} cannot name a file; give it another id")
    if len(case.encode(errors="surrogatepass")) > LONGEST_NAME:
        raise UsageError(
            f"case id {case[:20]!r}... has {len(case)} characters, too many for a file; give it another id"
        )
    return case


def label_path(folder: str | Path, case: str, image: Image | SpatialImage | None = None) -> Path:
    """Path of the label map of a case: `case.nii.gz`, for a 2-D image `case.png`."""
    name = "" if image is None or isinstance(image, SpatialImage) else str(files_of(image)[0])
    picture = name.lower().endswith(PICTURE_SUFFIXES)
    return Path(folder) / f"{file_name(case)}{'.png' if picture else '.nii.gz'}"


def probability_path(folder: str | Path, case: str) -> Path:
    """Path of the probabilities of a case, in a separate folder, so that they are not mistaken for label maps."""
    return Path(folder) / "probabilities" / f"{file_name(case)}.nii.gz"


def write_labels(
    path: str | Path,
    labels: np.ndarray,
    classes: Sequence[str],
    image: str | Path | SpatialImage | None = None,
    affine: np.ndarray | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a label map, and `<case>.json` with the names of its values; returns the path.

    A NIfTI has the header of the scan, if that is NIfTI: affine, shape and form codes are bitwise the same. The label
    map is moved into place last: if it exists, the case is finished.

    Args:
        path: `.nii.gz` or `.nii`, or `.png` for a map of one slice.
        labels: (X, Y, Z) class indices in the axis order of the file.
        classes: names of the classes, background first.
        image: file or DICOM folder of the scan, or a nibabel image.
        affine: (4, 4) voxel index to RAS mm; required if `image` is not NIfTI.
        facts: further plain values for `<case>.json`.
    """
    path = Path(path)
    labels = labels.astype(np.uint8 if len(classes) <= 255 else np.uint16, copy=False)
    about = {
        "labels": {name: k for k, name in enumerate(classes)},
        "created_by": f"samda {__version__}",
        "note": PURPOSE,
        **(facts or {}),
    }
    names = path.with_name(_case(path) + ".json")
    try:
        with replacing(path) as temporary:  # after the names: it marks the case as finished
            if path.suffix.lower() == ".png":
                if labels.ndim != 3 or labels.shape[2] != 1:
                    raise UsageError(f"a PNG holds one slice, got a map of {labels.shape}; write a .nii.gz")
                sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(labels[:, :, 0].T)), str(temporary))
            else:
                label_image(labels, image, affine).to_filename(temporary)
            write_json(names, about)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}); make room or choose another folder"
        ) from error
    return path


def write_probabilities(
    path: str | Path,
    probabilities: np.ndarray,
    image: str | Path | SpatialImage | None = None,
    affine: np.ndarray | None = None,
) -> Path:
    """Write class probabilities as one NIfTI (X, Y, Z, K), float32.

    NIfTI has no half precision. `probabilities` are (K, X, Y, Z) in the axis order of the file; for `image` and
    `affine` see :func:`write_labels`.
    """
    path = Path(path)
    maps = np.moveaxis(probabilities.astype(np.float32, copy=False), 0, -1)
    with replacing(path) as temporary:
        label_image(maps, image, affine).to_filename(temporary)
    return path


def label_image(
    array: np.ndarray, image: str | Path | SpatialImage | None = None, affine: np.ndarray | None = None
) -> Any:
    """A NIfTI image of `array` (X, Y, Z, ...) on the grid of a scan, see :func:`write_labels`."""
    source: Any = _nifti_of(image)
    if source is None:
        if affine is None:
            raise UsageError("an affine is needed to write a NIfTI for a scan of another format")
        result = nib.Nifti1Image(array, affine)
        for set_form in (result.set_sform, result.set_qform):
            set_form(affine, code="scanner")
        result.header.set_xyzt_units("mm")
        return result
    header = source.header.copy()
    shape = source.shape
    if (*shape, 1, 1)[:3] != array.shape[:3]:
        name = image if isinstance(image, str | Path) else "the scan"
        raise InputError(f"{name} has {shape} voxels, its result {array.shape}; the scan was changed, predict it again")
    if array.ndim == 3 and array.size == int(np.prod(shape)):  # the scan may be (X, Y), or (X, Y, Z, 1)
        array = array.reshape(shape)
    header.extensions.clear()  # extensions and the texts below may contain patient data
    for key, empty in EMPTIED.items():
        if key in header:  # NIfTI-1 and 2 differ
            header[key] = empty
    header["descrip"] = PURPOSE.encode()
    header.set_intent("none")  # clears its name, too
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    if qform_of(source)[0] is None and header["qform_code"]:  # an impossible quaternion, which other readers refuse
        header.set_qform(header.get_best_affine(), code=0)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(array, header.get_best_affine(), header)  # own affine: keeps forms and codes


def _nifti_of(image: str | Path | SpatialImage | None) -> Any:
    """The scan as a NIfTI image, for its header; None for other formats."""
    if isinstance(image, nib.Nifti1Pair):  # NIfTI-1 and 2, as one file or two
        return copy_of(image)
    if isinstance(image, str | Path) and str(image).lower().endswith(NIFTI_SUFFIXES):
        return load_nifti(image)
    return None


def _case(path: Path) -> str:
    if not path.name.lower().endswith((*NIFTI_SUFFIXES, ".png")):
        raise UsageError(f"{path}: label maps are written as .nii.gz, .nii or .png; rename the output")
    return stem(path)


# ------------------------------------------------------------------------------------------------------ predicted Dice


def write_table(
    folder: str | Path, cases: Sequence[Case], quality: Mapping[str, CaseQuality], site: Mapping[str, Any] | None = None
) -> dict[str, CaseQuality]:
    """Write `predictions.csv`; returns what it holds, in its order.

    Cases of an earlier run, or of another process, are read from their `<case>.json`. `site` is a report of
    `samda commission`: its recalibration is applied.
    """
    found = dict(quality)
    for case in cases:
        if case["id"] not in found:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UsageError):
                facts = parse_json((Path(folder) / f"{file_name(case['id'])}.json").read_bytes())
                found[case["id"]] = CaseQuality.from_dict(facts[QUALITY])
    shift = 0.0 if site is None else site["recalibration"]["shift"]
    found = {case: one.shifted(shift) for case, one in found.items()} if shift else found
    rows = []
    order = look_first(found)
    for name in order:
        for label, one in sorted(found[name].dice.items(), key=lambda item: item[1].dice):
            numbers = [round(value, 3) for value in (one.dice, one.low, one.high)]
            rows.append([name, label, *numbers, "; ".join(flags(found[name], label, site))])
    write_text(Path(folder) / TABLE, csv_text([HEAD, *rows]))
    return {name: found[name] for name in order}


def look_first(quality: Mapping[str, CaseQuality]) -> list[str]:
    """The cases, the lowest mean predicted Dice first."""
    return sorted(quality, key=lambda case: (quality[case].mean, case))


def flags(quality: CaseQuality, name: str, site: Mapping[str, Any] | None = None) -> list[str]:
    """What to say of a class of a case in a few words; `site` is a report of `samda commission`."""
    one, found = quality.dice[name], []
    if not one.predicted:
        found.append("not predicted")
    elif one.dice < TRUSTED:
        found.append(f"below {TRUSTED:g}")
    if site is not None:
        accepted = site["accepted"]["classes"].get(name)
        if one.predicted and accepted is not None and one.dice < accepted:
            found.append(f"below the site's accepted {accepted:.3f}")
        farthest = site["accepted"]["distance"]
        if farthest is not None and quality.distance is not None and quality.distance > farthest:
            found.append("unlike the site's scans")
    return found


def read_site_report(path: str | Path) -> dict[str, Any]:
    """The JSON report of `samda commission`; InputError if the file is none."""
    try:
        report = parse_json(regular_file(path).read_bytes())
        version, accepted, shift = report["commission_version"], report["accepted"], report["recalibration"]["shift"]
        numbers = [*accepted["classes"].values(), accepted["distance"], shift]
        odd = [n for n in numbers if n is not None and (type(n) not in (int, float) or not abs(n) < MOST_NUMBER)]
        if odd or not all(isinstance(report[key], str) for key in ("adapter_sha256", "model_version")):
            raise ValueError(f"{str(odd[0])[:20]} is no number" if odd else "the model's hash is missing")
        if abs(shift or 0.0) > MOST_SHIFT:
            raise ValueError(f"a shift of {shift:g}, at most {MOST_SHIFT:g}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no report of samda commission ({error}); give its JSON file") from error
    if version != COMMISSION_VERSION:
        raise InputError(f"{path} has version {version!r}, this samda reads {COMMISSION_VERSION}; commission again")
    return report


def check_site_report(report: Mapping[str, Any], adapter_sha256: str, version: str, calibrated: bool) -> None:
    """Refuse a report of another model or version, or of a model that predicts no Dice.

    Args:
        report: of :func:`read_site_report`.
        adapter_sha256: hash of the model's adapters and class head.
        version: of the model.
        calibrated: has the model a calibration?
    """
    if report["adapter_sha256"] != adapter_sha256:
        raise InputError(
            f"the site report is of another model (version {report['model_version']!r}), not of this one "
            f"({version!r}); give its own report, or run samda commission"
        )
    if not calibrated:
        raise InputError("the model has no calibration, so a site report has no effect; leave it out")
