# SPDX-License-Identifier: Apache-2.0
"""A folder of scans: what is written, what a rerun does, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from samda.adaptation import folder as run_module
from samda.adaptation.folder import adapt_folder, details_folder
from samda.adaptation.record import validate_record
from samda.data.datalists import find_cases
from samda.errors import InputError, SamdaError, UsageError
from tests.adaptation.conftest import ALWAYS, save, scan

CHANGED = {"method": "class_entropy", "lr": 0.02, "steps": 1, "views": 2, "slices": 2, "keep": "last", "guard": ALWAYS}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Three scans, one of them with a NaN."""
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, name in enumerate(("anna", "bert", "carl")):
        image, _ = scan(seed)
        if name == "bert":
            image[0, 0, 0] = np.nan
        save(folder / f"{name}.nii.gz", image)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_dicom_of_a_series(make_adaptation: Callable, tmp_path: Path) -> None:
    """The map to use as DICOM; a rerun that asks for another format writes it."""
    image, _ = scan(0)
    write_series(tmp_path / "in" / "anna", image)
    cases, out = find_cases(tmp_path / "in"), tmp_path / "out"
    adapt_folder(make_adaptation(**CHANGED), cases, out, formats="dicom-seg")
    labels = np.asarray(nib.load(out / "anna.nii.gz").dataobj)
    seg = pydicom.dcmread(out / "dicom-seg" / "anna.dcm")
    found = np.zeros_like(labels)
    for frame, about in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        plane = round(float(about.PlanePositionSequence[0].ImagePositionPatient[2]) / 2)
        found[:, :, plane][frame.T > 0] = about.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    assert labels.any() and np.array_equal(found, labels)
    assert adapt_folder(make_adaptation(**CHANGED), cases, out, formats="nifti").resumed == ["anna"]
    run = adapt_folder(make_adaptation(**CHANGED), cases, out, formats=["dicom-seg", "rtstruct"])
    assert run.resumed == [] and (out / "rtstruct" / "anna.dcm").exists()
    save(tmp_path / "a.nii.gz", image)
    with pytest.raises(InputError, match=r"a\.nii\.gz"):
        adapt_folder(make_adaptation(**CHANGED), find_cases(tmp_path / "a.nii.gz"), out, formats="rtstruct")


def write_series(folder: Path, values: np.ndarray) -> None:
    """A DICOM series of axial slices, 2 mm."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(values.shape[2]):
        image = sitk.GetImageFromArray(np.rint(values[::-1, ::-1, k].T[None]).astype(np.int16))
        image.SetSpacing((2.0, 2.0, 2.0))
        tags = {"0008|0060": "CT", "0020|000d": "1.2", "0020|000e": "1.2.3", "0008|0018": f"1.2.3.{k + 1}"}
        tags |= {"0020|0032": f"0\\0\\{2 * k}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)


def test_what_is_written(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out)
    assert run.counts == {"accepted": 2, "fallback": 0, "skipped": 0, "failed": 1} and list(run.failed) == ["bert"]
    found = {p.name for p in details_folder(out, "anna").iterdir()}
    assert found == {
        "source.nii.gz", "source.json", "difference.nii.gz", "difference.json", "uncertainty.nii.gz", "record.json",
    }  # fmt: skip
    scan_image = nib.load(inputs / "anna.nii.gz")
    for path in (out / "anna.nii.gz", *details_folder(out, "anna").glob("*.nii.gz")):
        image = nib.load(path)
        assert np.array_equal(image.affine, scan_image.affine) and image.shape[:3] == scan_image.shape
        assert image.header["qform_code"] == 1 and image.header["sform_code"] == 2
    final, source = (
        np.asarray(nib.load(p).dataobj) for p in (out / "anna.nii.gz", details_folder(out, "anna") / "source.nii.gz")
    )
    difference = np.asarray(nib.load(details_folder(out, "anna") / "difference.nii.gz").dataobj)
    assert np.array_equal(difference > 0, final != source) and difference.any()
    assert not (out / "bert.nii.gz").exists()


def test_records_are_valid_and_without_names(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapt_folder(make_adaptation(steps=1), find_cases(inputs), out, report=tmp_path / "audit" / "run.jsonl")
    records = lines(tmp_path / "audit" / "run.jsonl")
    assert len(records) == 3
    for record in records:
        validate_record(record)
        assert record["case_id"] == f"case-{record['input_sha256'][:12]}"
    text = (tmp_path / "audit" / "run.jsonl").read_text("utf-8")
    assert not any(name in text for name in ("anna", "bert", "carl", str(tmp_path)))
    bad = next(r for r in records if r["decision"] == "failed")
    assert bad["reason"] == "failed_input" and "NaN" in bad["error"]
    key = (out / "cases.csv").read_text("utf-8").splitlines()
    assert key[0] == "case_id,case,decision,reason" and key[1].split(",")[1] == "anna"


def test_a_file_of_others_is_not_replaced_by_records(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    adaptation, cases, out = make_adaptation(steps=0), find_cases(inputs)[:1], tmp_path / "out"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt exists and holds no records"):
        adapt_folder(adaptation, cases, out, report=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text("utf-8") == "mine" and not out.exists()
    for _ in range(2):  # its own are
        adapt_folder(adaptation, cases, out, report=tmp_path / "run.jsonl")
    assert len(lines(tmp_path / "run.jsonl")) == 1


def test_names_are_kept_on_request(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    run = adapt_folder(make_adaptation(steps=0), find_cases(inputs), tmp_path / "out", keep_names=True)
    assert [r["case_id"] for r in run.records.values()] == ["anna", "bert", "carl"]


def test_a_fallback_is_the_source_file_byte_for_byte(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = adapt_folder(make_adaptation(guard={"skip_agreement": 2.0}, lr=1e30, steps=4), find_cases(inputs), out)
    assert run.records["anna"]["reason"] == "fallback_nonfinite"
    assert (out / "anna.nii.gz").read_bytes() == (details_folder(out, "anna") / "source.nii.gz").read_bytes()
    assert json.loads((out / "anna.json").read_text("utf-8"))["labels"] == {"background": 0, "liver": 1, "spleen": 2}


def test_a_rerun_does_only_what_is_missing(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out)
    before = files(out)
    again = adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out)
    assert again.resumed == ["anna", "carl"]  # what failed is tried again
    after = files(out)
    same = {name for name in before if before[name] == after[name]}
    assert set(before) == set(after) and set(before) - same <= {
        "run.jsonl",
        "details/bert/record.json",
        ".samda/manifest.jsonl",
    }
    (out / "carl.nii.gz").unlink()
    assert adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out).resumed == ["anna"]
    assert (out / "carl.nii.gz").read_bytes() == before["carl.nii.gz"]


def test_a_changed_scan_is_done_again(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapt_folder(make_adaptation(steps=0), find_cases(inputs), out)
    save(inputs / "anna.nii.gz", scan(7)[0])
    assert adapt_folder(make_adaptation(steps=0), find_cases(inputs), out).resumed == ["carl"]


def test_other_settings_need_another_folder(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapt_folder(make_adaptation(steps=0), find_cases(inputs), out)
    with pytest.raises(UsageError, match="results of other settings"):
        adapt_folder(make_adaptation(steps=1), find_cases(inputs), out)
    run = adapt_folder(make_adaptation(steps=1), find_cases(inputs), out, overwrite=True)
    assert run.resumed == [] and run.records["anna"]["config"]["steps"] == 1


def test_dry_run_writes_no_map_but_the_source(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out, dry_run=True)
    assert dry.records["anna"]["reason"] == "accepted" and dry.records["anna"]["dry_run"]
    assert [p.name for p in sorted(out.rglob("*.nii.gz"))] == ["source.nii.gz", "source.nii.gz"]
    wet = adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out)  # a dry run does not count as done
    assert wet.resumed == [] and (out / "anna.nii.gz").exists()
    assert wet.records["anna"]["labels_sha256"] == dry.records["anna"]["labels_sha256"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("place", ["write_probabilities", "write_labels"])
def test_half_a_case_leaves_nothing(
    make_adaptation: Callable,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    place: str,
) -> None:
    """The second good case is interrupted: the first stays, the half-done one leaves nothing, a rerun continues."""
    (inputs / "bert.nii.gz").unlink()
    out, real, calls = tmp_path / "out", getattr(run_module, place), []
    wanted = 2 if place == "write_probabilities" else 6  # of carl: the uncertainty, the final map

    def fail(*args: object, **kwargs: object) -> object:
        calls.append(0)
        if len(calls) == wanted:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, place, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SamdaError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "disk of .* is full"):
        adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out)
    assert (out / "anna.nii.gz").exists() and not (out / "carl.nii.gz").exists()
    assert [p.name for p in (out / "details").iterdir()] == ["anna"]
    assert len(lines(out / "run.jsonl")) == 1
    monkeypatch.setattr(run_module, place, real)
    again = adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), out)
    assert again.resumed == ["anna"] and (out / "carl.nii.gz").exists() and len(lines(out / "run.jsonl")) == 2


def test_results_never_go_to_the_scans(make_adaptation: Callable, inputs: Path) -> None:
    with pytest.raises(UsageError, match="is the folder of the scan"):
        adapt_folder(make_adaptation(), find_cases(inputs), inputs)


def test_adapted_parameters_are_kept_on_request(make_adaptation: Callable, inputs: Path, tmp_path: Path) -> None:
    run = adapt_folder(make_adaptation(**CHANGED), find_cases(inputs), tmp_path / "out", keep_tensors=True)
    assert run.records["anna"]["output_files"]["adapter"] == "adapter.safetensors"
    assert (details_folder(tmp_path / "out", "anna") / "adapter.safetensors").stat().st_size > 4 * 395_522


def test_a_scan_named_by_one_letter_does_not_spoil_the_message(
    make_adaptation: Callable, inputs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    (inputs / "bert.nii.gz").rename(folder / "a.nii.gz")
    record = adapt_folder(make_adaptation(steps=0), find_cases(folder), tmp_path / "out").records["a"]
    assert "NaN" in record["error"] and "a.nii.gz" not in record["error"]
    assert record["error"].count(record["case_id"]) == 1
    assert record["explanation"] == "the scan cannot be used"
