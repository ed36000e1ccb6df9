# SPDX-License-Identifier: Apache-2.0
"""The cases of a folder, one after another: their files, their outcomes, and the engine of the bundle's configs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset
from monai.networks.utils import eval_mode

from samda.data.datalists import Case, find_cases
from samda.data.folders import join_channels
from samda.errors import InputError, SamdaError, UsageError, is_disk_full, log_failed
from samda.expected_dice import CaseQuality
from samda.inference.dicom_out import NIFTI, check_cases, parse_formats
from samda.inference.postprocessing import warn_empty
from samda.inference.predict import Measured, Predictor, result_files
from samda.inference.volume import VolumeInferer
from samda.inference.writer import QUALITY, SOURCE, TABLE, write_table
from samda.io import files_of, parse_json
from samda.output import open_output
from samda.processes import Shard, exchange, is_main, read_part
from samda.progress import Cases

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class FolderResult:
    """Outcomes of the cases of a folder.

    Attributes:
        done: predicted cases.
        skipped: cases that were already finished.
        empty: predicted cases without foreground.
        failed: case -> reason in one line.
        quality: case -> what Dice is to be expected, of the cases that were predicted, as far as known.
    """

    done: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    empty: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    quality: dict[str, CaseQuality] = dataclasses.field(default_factory=dict)

    def __add__(self, other: FolderResult) -> FolderResult:
        """Outcomes of two parts."""
        return FolderResult(
            self.done + other.done,
            self.skipped + other.skipped,
            self.empty + other.empty,
            self.failed | other.failed,
            self.quality | other.quality,
        )

    @property
    def exit_code(self) -> int:
        """0 if no case failed, else 1."""
        return 1 if self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        quality = {case: one.to_dict() for case, one in self.quality.items()}
        return dataclasses.asdict(self) | {"quality": quality, "exit_code": self.exit_code}


def predict_folder(
    predictor: Predictor,
    cases: str | Path | Sequence[Case],
    output: str | Path,
    save_probabilities: bool = False,
    skip_finished: bool = False,
    part: Shard | None = None,
    on_case: Callable[[str, str], None] | None = None,
    formats: str | Sequence[str] = NIFTI,
    site: Mapping[str, Any] | None = None,
) -> FolderResult:
    """Predict every case and write its label map; cases that fail are listed and the others are still predicted.

    Args:
        predictor: the predictor.
        cases: cases, or their path, see :func:`samda.find_cases`.
        output: folder of the label maps, one per case, named as the case.
        save_probabilities: also write `probabilities/<case>.nii.gz`.
        skip_finished: skip cases whose result exists and is of this model and scan.
        part: share of the cases for this process; None predicts all.
        on_case: called with case and "done", "skipped", "empty" or the reason of its failure.
        formats: of the label maps, see :meth:`Prediction.save`.
        site: report of `samda commission`, which adds flags to `predictions.csv`.

    Raises:
        UsageError: `output` is not writable or in use, results would replace scans or files of others, or DICOM output
            is asked for and no case is a DICOM series.
        SamdaError: the disk is full; finished cases stay.
    """
    cases = join_channels(find_cases(cases) if isinstance(cases, str | Path) else cases, predictor.task.in_channels)

    formats = parse_formats(formats)
    check_cases(cases, formats)

    quality: dict[str, CaseQuality] = {}

    def one(case: Case, folder: Path) -> bool:
        check_cases([case], formats)
        prediction = predictor.predict(case, save_probabilities)
        prediction = dataclasses.replace(prediction, source=predictor.measured.source(case["image"]))
        prediction.save(folder, formats)
        if prediction.quality is not None:
            quality[case["id"]] = prediction.quality
        return prediction.empty

    def finished(case: Case, folder: Path) -> bool:
        try:
            before = parse_json((folder / f"{case['id']}.json").read_bytes()).get(SOURCE)
        except (OSError, ValueError, AttributeError):  # of DICOM output alone
            return True
        if before in (None, predictor.measured.source(case["image"])):  # samda 0.1.0 did not write it
            return True
        logger.info("case %s: model or scan are not those of its label map, so it is predicted again", case["id"])
        return False

    shown = predictor.inferer.progress
    finish = None if predictor.measured.meter is None else lambda folder: write_table(folder, cases, quality, site)
    skip = finished if skip_finished else None
    result = run_cases(cases, output, one, save_probabilities, skip, part, on_case, shown, formats, finish)
    return dataclasses.replace(result, quality=quality)


def run_cases(
    cases: Sequence[Case],
    output: str | Path,
    one: Callable[[Case, Path], bool],
    save_probabilities: bool = False,
    finished: Callable[[Case, Path], bool] | None = None,
    part: Shard | None = None,
    on_case: Callable[[str, str], None] | None = None,
    shown: bool = True,
    formats: Sequence[str] = (NIFTI,),
    finish: Callable[[Path], Any] | None = None,
) -> FolderResult:
    """:func:`predict_folder` with any predictor: `one` writes a case into the folder and tells whether it is empty, a
    case whose results exist is skipped where `finished` says so, and `finish` writes the table of predicted Dice,
    :data:`samda.inference.writer.TABLE`.
    """
    mine = part.of(cases) if part else cases
    skipped = _finished(mine, Path(output), finished, save_probabilities, formats)
    todo = [case for case in mine if case["id"] not in skipped]
    written = written_files(todo, save_probabilities, formats) + ([] if finish is None else [Path(TABLE)])
    refuse_own_folder(cases, Path(output))
    result = FolderResult()
    with open_output(output, written, part) as place, Cases("predicting", len(mine), shown=shown) as progress:
        try:
            for case in mine:
                outcome = "skipped"
                if case["id"] in skipped:
                    result.skipped.append(case["id"])
                else:
                    outcome = _run_case(case, place.path, one, result)
                if on_case:
                    on_case(case["id"], outcome)
                progress.next()
        except BaseException:  # Ctrl-C, say: the table of what was finished is written, too
            if finish is not None:
                with contextlib.suppress(Exception):
                    finish(place.path)
            raise
        if finish is not None:
            finish(place.path)
    return result


def _finished(
    cases: Sequence[Case],
    folder: Path,
    finished: Callable[[Case, Path], bool] | None,
    probabilities: bool,
    formats: Sequence[str],
) -> set[str]:
    """Ids of the cases to skip; those whose id cannot name a file fail later, alone."""
    found: set[str] = set()
    if finished is None or not folder.is_dir():
        return found
    for case in cases:
        with contextlib.suppress(OSError, UsageError):
            files = result_files(case["id"], case["image"], formats, probabilities)
            if all((folder / path).exists() for path in files) and finished(case, folder):
                found.add(case["id"])
    return found


class CaseEvaluator:
    """The engine of the bundle's inference.json and evaluate.json: `samda predict` with the config's own parts.

    Cases that fail are listed and the others go on, as in :func:`predict_folder`; processes of torchrun share them.

    Args:
        dataset: MONAI's Dataset of cases with the preprocessing.
        network, inferer: as in MONAI's SupervisedEvaluator.
        postprocessing: of a dictionary with "pred" (1, X, Y, Z); writes the label map.
        output_dir: folder of the label maps.
        formats: of the label maps, those of the postprocessing.
        record: of the model folder; with its calibration, `predictions.csv` is written.
    """

    def __init__(
        self,
        dataset: Dataset,
        network: torch.nn.Module,
        inferer: VolumeInferer,
        postprocessing: Callable[[dict[str, Any]], Any],
        output_dir: str | Path,
        formats: str | Sequence[str] = NIFTI,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.formats = parse_formats(formats)
        self.dataset, self.network, self.inferer = dataset, network, inferer
        self.measured = Measured(network, inferer.task, record, inferer)
        self.postprocessing, self.output_dir = postprocessing, output_dir
        self.result = FolderResult()

    def run(self) -> None:
        """Predict the cases of this process; the main one learns of all."""
        cases: list[Case] = list(self.dataset.data)
        check_cases(cases, self.formats)
        index = {case["id"]: i for i, case in enumerate(cases)}
        quality: dict[str, CaseQuality] = {}

        def one(case: Case, _folder: Path) -> bool:
            check_cases([case], self.formats)
            data: Any = self.dataset[index[case["id"]]]
            self.measured.begin()
            with eval_mode(self.network), torch.no_grad():
                pred = self.inferer(data["image"][None], self.measured)[0]
            found = self.measured.quality()
            if found is not None:
                quality[case["id"]] = found
            facts = {SOURCE: self.measured.source(case["image"])}
            facts |= {} if found is None else {QUALITY: found.to_dict()}
            self.postprocessing({**data, "pred": pred, **facts})
            return False  # the postprocessing has warned of an empty map

        def finish(folder: Path) -> None:
            write_table(folder, cases, quality)

        table = None if self.measured.meter is None else finish
        result = run_cases(cases, self.output_dir, one, part=read_part(), formats=self.formats, finish=table)
        first, *others = exchange(dataclasses.replace(result, quality=quality))
        self.result = sum(others, first)
        if others and table is not None and is_main():
            write_table(self.output_dir, cases, self.result.quality)

    def check(self) -> None:
        """Say on the main process what was done, and raise InputError if a case failed."""
        if not is_main():
            return
        done, failed = self.result.done, self.result.failed
        logger.info("%d cases predicted; label maps in %s", len(done), self.output_dir)
        if failed:
            total = len(done) + len(failed)
            raise InputError(f"{len(failed)} of {total} cases failed: {', '.join(failed)}")


def refuse_own_folder(cases: Sequence[Case], folder: Path) -> None:
    """Refuse the folder of the scans as output: label maps have the names of scans and would replace them."""
    for image in (path for case in cases for path in files_of(case["image"])):
        if folder.resolve() == (image if image.is_dir() else image.parent).resolve():
            raise UsageError(f"output {folder} is the folder of the scan {image.name}; choose another output folder")


def written_files(cases: Sequence[Case], probabilities: bool = False, formats: Sequence[str] = (NIFTI,)) -> list[Path]:
    """What is written for these cases; those whose id cannot name a file fail later, alone."""
    written = []
    for case in cases:
        with contextlib.suppress(UsageError):
            files = result_files(case["id"], case["image"], formats, probabilities)
            written += [*files, Path(f"{case['id']}.json")]
    return written


def _run_case(case: Case, folder: Path, one: Callable[[Case, Path], bool], result: FolderResult) -> str:
    """Predict one case; returns its outcome and adds it to `result`."""
    name = case["id"]
    try:
        result_files(name, case["image"])  # refuses an id that cannot name a file
        empty = one(case, folder)
    except Exception as error:  # any failure of a scan must not stop the others
        if is_disk_full(error):
            raise SamdaError(
                f"the disk of {folder} is full; finished cases are complete, make room and continue"
            ) from error
        result.failed[name] = log_failed(name, error)
        return result.failed[name]
    result.done.append(name)
    if empty:
        warn_empty(name)
        result.empty.append(name)
        return "empty"
    return "done"
