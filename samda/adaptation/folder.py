# SPDX-License-Identifier: Apache-2.0
"""Adaptation to a folder of scans, case by case: it can be interrupted and resumed, and a bad scan stops no other.

    OUT/<case>.nii.gz                  the map to use: adapted where accepted, else the source's byte for byte
    OUT/dicom-seg/<case>.dcm           on request the same as DICOM, also rtstruct/<case>.dcm
    OUT/details/<case>/source.nii.gz   the plain prediction
                       difference.nii.gz, uncertainty.nii.gz, record.json, adapter.safetensors (on request)
    OUT/run.jsonl                      the records, one line per case, without names
    OUT/cases.csv                      record of each scan; to be kept with the scans
    OUT/report.html                    see :mod:`samda.adaptation.page`

`details/<case>` is written atomically and before the final map: a case is finished if both exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from samda.adaptation.engine import Adaptation, AdaptedCase
from samda.adaptation.record import failed_record, read_record, validate_record, write_lines
from samda.data.datalists import Case
from samda.errors import InputError, SamdaError, UsageError, disk_trouble, is_disk_full, one_line
from samda.inference.dicom_out import NIFTI, check_cases, parse_formats, write_formats
from samda.inference.folder import refuse_own_folder, written_files
from samda.inference.predict import result_files
from samda.inference.writer import file_name, label_path, write_labels, write_probabilities
from samda.io import copy_file, csv_text, files_of, new_folder, replacing, write_json, write_text
from samda.output import OutputFolder, open_output, remove
from samda.processes import Shard
from samda.progress import Cases, phase
from samda.provenance import conceal, now, path_sha256

logger = logging.getLogger(__name__)

CHANGES = ("unchanged", "removed", "added", "renamed")  # values of the difference map
SAME = {"config_sha256": "settings", "adapter_sha256": "model", "model_sha256": "model"}  # of a rerun; what they tell


@dataclasses.dataclass
class AdaptRun:
    """The results of a folder."""

    output: Path
    records: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by case, in their order
    resumed: list[str] = dataclasses.field(default_factory=list)  # cases that were finished before

    @property
    def failed(self) -> dict[str, str]:
        """Case name -> why it has no result, in one line."""
        return {name: record["error"] for name, record in self.records.items() if record["decision"] == "failed"}

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases by decision."""
        decisions = [record["decision"] for record in self.records.values()]
        return {d: decisions.count(d) for d in ("accepted", "fallback", "skipped", "failed")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cases = {name: {k: r[k] for k in ("case_id", "decision", "reason")} for name, r in self.records.items()}
        return {"output": str(self.output), "counts": self.counts, "cases": cases, "resumed": self.resumed}


def details_folder(output: str | Path, case: str) -> Path:
    """The folder of a case, with everything but its final label map; also of one that fails because of its name."""
    try:
        name = file_name(case)
    except UsageError:
        name = f"unnamed-{hashlib.sha256(case.encode(errors='surrogatepass')).hexdigest()[:16]}"
    return Path(output) / "details" / name


def check_part(part: Shard | None, overwrite: bool) -> None:
    """Refuse a part that overwrites."""
    if part is not None and overwrite:
        raise UsageError(
            f"part {part} cannot overwrite: older results would count as finished; use a new output folder"
        )


def adapt_folder(
    adaptation: Adaptation,
    cases: Sequence[Case],
    output: str | Path,
    report: str | Path | None = None,
    dry_run: bool = False,
    keep_names: bool = False,
    keep_tensors: bool = False,
    overwrite: bool = False,
    part: Shard | None = None,
    on_case: Callable[[str, Mapping[str, Any]], None] | None = None,
    formats: str | Sequence[str] = NIFTI,
) -> AdaptRun:
    """Adapt to every case; finished ones are skipped, so an interrupted run continues where it stopped.

    Args:
        cases: of :func:`samda.data.datalists.find_cases`; labels in them are not read.
        output: folder of the results.
        report: file of the records; None takes `output`/run.jsonl.
        dry_run: decide and record, but write no label map except the source's.
        keep_names: records contain file names instead of pseudonyms.
        keep_tensors: keep the adapted parameters of accepted cases, from which a site version is distilled.
        overwrite: reprocess finished cases, also those of other settings.
        part: the share of this process; None does all. The lists then hold what all parts have finished so far.
        on_case: called with name and record of each case.
        formats: of the map to use, see :meth:`samda.inference.predict.Prediction.save`; NIfTI is always written.

    Raises:
        UsageError: `output` holds results of another model or other settings, or cannot be written to.
        SamdaError: the disk is full; finished cases stay.
    """
    check_part(part, overwrite)
    formats = formats_of_run(formats)
    mine = part.of(cases) if part else cases
    with open_run(cases, output, formats, dry_run, report, part) as place:
        job = _Job(adaptation, place.path, dry_run, keep_names, keep_tensors, formats)
        if not overwrite:
            job.refuse_other_settings(cases)
        run = AdaptRun(job.folder)
        try:
            with Cases("adapting", len(mine)) as progress:
                for case in map(_hashed, mine):
                    name = case["id"]
                    finished = None if overwrite else job.finished(case)
                    if finished is not None:
                        run.resumed.append(name)
                    run.records[name] = finished or job.do(case)
                    if on_case:
                        on_case(name, run.records[name])
                    progress.next()
        finally:  # also after Ctrl-C: finished cases are recorded
            try:
                job.write_lists(Path(report or job.folder / "run.jsonl"), cases, run.records if part is None else None)
            except OSError as error:  # full disk; the next run writes the lists from the records of the cases
                logger.error("the list of records could not be written: %s", error)
    return run


def formats_of_run(formats: str | Sequence[str]) -> tuple[str, ...]:
    """The formats of the map to use, NIfTI among them."""
    return parse_formats([NIFTI, *parse_formats(formats)])


def open_run(
    cases: Sequence[Case],
    output: str | Path,
    formats: Sequence[str],
    dry_run: bool,
    report: str | Path | None,
    part: Shard | None,
) -> OutputFolder:
    """Check the cases and the output folder of a run, and open the folder; within a run it can be opened again."""
    if report is not None and Path(report).is_file():
        with Path(report).open(encoding="utf-8", errors="replace") as file:
            line = file.readline()
        if line and '"record_version"' not in line:
            raise UsageError(f"{report} exists and holds no records of samda; give another file")
    refuse_own_folder(cases, Path(output))
    check_cases(cases, formats)
    mine = part.of(cases) if part else cases
    files = [Path("cases.csv"), Path("report.html"), *([Path("run.jsonl")] if report is None else [])]
    files += [details_folder("", case["id"]) for case in mine]
    return open_output(output, files if dry_run else files + written_files(mine, formats=formats), part)


def collect(
    adaptation: Adaptation, cases: Sequence[Case], output: str | Path, dry_run: bool = False
) -> AdaptRun | None:
    """The results of all cases, whichever process did them; None while any is missing."""
    found = _Job(adaptation, Path(output), dry_run).records(cases)
    return AdaptRun(Path(output), found) if len(found) == len(cases) else None


def _hashed(case: Case) -> dict[str, Any]:
    """The case with the hash of its files; without it where they are unreadable, which the adaptation will report."""
    try:
        return {**case, "input_sha256": path_sha256(case["image"])}
    except (OSError, ValueError):
        return dict(case)


@dataclasses.dataclass
class _Job:
    """The files of an adaptation in its output folder."""

    adaptation: Adaptation
    folder: Path
    dry_run: bool
    keep_names: bool = False
    keep_tensors: bool = False
    formats: Sequence[str] = (NIFTI,)

    def __post_init__(self) -> None:
        self.about = self.adaptation.describe()

    def stored(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record in the folder of a case."""
        path = details_folder(self.folder, case["id"]) / "record.json"
        return read_record(path) if path.exists() else None

    def other(self, record: Mapping[str, Any]) -> list[str]:
        """Differences to the adaptation of a record."""
        return [what for key, what in SAME.items() if record[key] != self.about[key]]

    def refuse_other_settings(self, cases: Sequence[Mapping[str, Any]]) -> None:
        """Refuse to mix results of different configurations in one folder."""
        for case in cases:
            record = self.stored(case)
            if record is not None and record["decision"] != "failed" and (other := self.other(record)):
                raise UsageError(
                    f"{self.folder} contains results of other {other[0]} (case {case['id']!r}); choose another output "
                    "folder, or overwrite them"
                )

    def own(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a case, if it has these settings and its label map is there or the case failed."""
        record = self.stored(case)
        if record is None or record["dry_run"] != self.dry_run or self.other(record):
            return None
        if self.dry_run or record["decision"] == "failed":
            return record
        return record if label_path(self.folder, case["id"], case["image"]).exists() else None

    def records(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The records of these settings by case, whichever process wrote them."""
        found = {}
        for case in cases:
            with contextlib.suppress(InputError):  # another process is replacing it
                if (record := self.own(case)) is not None:
                    found[case["id"]] = record
        return found

    def finished(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a case that is complete and whose scan is the same."""
        record = self.own(case)
        if record is None or record["decision"] == "failed" or record["input_sha256"] != case.get("input_sha256"):
            return None
        files = [details_folder("", case["id"]) / file for file in record["output_files"].values()]
        if not self.dry_run and any(kept for _, kept in record["volumes_ml"].values()):  # no DICOM of an empty map
            files += result_files(case["id"], case["image"], self.formats)
        return record if all((self.folder / file).exists() for file in files) else None

    def do(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Adapt to a case and write its files; for an unusable scan, a record with the reason."""
        started, name, paths = now(), case["id"], files_of(case["image"])

        def failed(error: Exception) -> dict[str, Any]:
            logger.error("case %s: %s", name, one_line(error))
            logger.debug("case %s failed", name, exc_info=error)
            return self._named(failed_record(self.about, case.get("input_sha256"), str(paths[0]), error, started), case)

        result = None
        try:
            file_name(name)
            check_cases([case], self.formats)
            result = self.adaptation.adapt(case)
            record = self._named(result.record, case)
        except Exception as error:
            record = failed(error)
        try:
            self._publish(case, record, result)
        except Exception as error:  # a name that cannot be written must not stop the others
            if is_disk_full(error):
                raise SamdaError(
                    f"the disk of {self.folder} is full; finished cases are complete, free space and run again"
                ) from error
            trouble = disk_trouble(error)
            record = failed(error if trouble is None else InputError(trouble))
            with contextlib.suppress(OSError, SamdaError):
                self._publish(case, record, None)
        return record

    def _named(self, record: dict[str, Any], case: Mapping[str, Any]) -> dict[str, Any]:
        """The record with what this run says of it; messages contain file names, which records must not."""
        record["dry_run"] = self.dry_run
        if self.keep_names:
            record["case_id"] = case["id"]
        else:
            paths = files_of(case["image"])
            names = (*map(str, paths), *(path.name for path in paths), case["id"])
            for key in ("error", "explanation"):
                record[key] = conceal(record[key], dict.fromkeys([*names, *map(one_line, names)], record["case_id"]))
        return record

    def _publish(self, case: Mapping[str, Any], record: dict[str, Any], result: AdaptedCase | None) -> None:
        """Write the folder of a case, then the map to use."""
        place = details_folder(self.folder, case["id"])
        place.parent.mkdir(exist_ok=True)
        with new_folder(place, overwrite=True) as partial:
            record["output_files"] = {} if result is None else self._write_maps(partial, result)
            validate_record(record)
            write_json(partial / "record.json", record)
        if result is not None and not self.dry_run:
            try:
                self._publish_final(case, result)
            except BaseException:  # also Ctrl-C: without its map the case is not finished
                remove(place)
                raise

    @phase("writing")
    def _write_maps(self, place: Path, result: AdaptedCase) -> dict[str, str]:
        task, image, affine = self.adaptation.task, result.scan, result.affine
        files = {"source": label_path(place, "source", image).name}
        write_labels(place / files["source"], result.source, task.classes, image, affine)
        if self.dry_run:
            return files
        files["difference"] = label_path(place, "difference", image).name
        write_labels(place / files["difference"], result.difference, CHANGES, image, affine)
        files["uncertainty"] = "uncertainty.nii.gz"
        write_probabilities(place / files["uncertainty"], result.uncertainty[None], image, affine)
        if self.keep_tensors and result.tensors is not None:
            files["adapter"] = "adapter.safetensors"
            with replacing(place / files["adapter"]) as temporary:
                save_file({k: v.cpu().contiguous() for k, v in result.tensors.items()}, temporary)
        return files

    def _publish_final(self, case: Mapping[str, Any], result: AdaptedCase) -> None:
        """The map to use; without an accepted change a copy of the source map, byte for byte."""
        final = label_path(self.folder, case["id"], case["image"])
        write_formats(self.formats, self.folder, case["id"], result.labels, self.adaptation.task, result.scan)
        if result.record["labels_sha256"]["source"] != result.record["labels_sha256"]["final"]:
            write_labels(final, result.labels, self.adaptation.task.classes, result.scan, result.affine)
            return
        details = details_folder(self.folder, case["id"])
        source = details / result.record["output_files"]["source"]
        for origin, target in ((details / "source.json", final.with_name(f"{case['id']}.json")), (source, final)):
            copy_file(origin, target)

    def write_lists(
        self, report: Path, cases: Sequence[Mapping[str, Any]], found: Mapping[str, dict[str, Any]] | None
    ) -> None:
        """The records and the table of names; of all parts where `found` is None."""
        shared, written = found is None, None
        found = self.records(cases) if found is None else found
        while found != written:  # whoever writes looks again afterwards, so the last lists miss no case
            write_lines(report, list(found.values()))
            rows = [[r["case_id"], name, r["decision"], r["reason"]] for name, r in found.items()]
            write_text(self.folder / "cases.csv", csv_text([["case_id", "case", "decision", "reason"], *rows]))
            written, found = found, self.records(cases) if shared else found
