# SPDX-License-Identifier: Apache-2.0
"""`--report run.json`: versions, options, inputs, times, peak memory and outcome of a run, also on failure.

`samda adapt` writes a record per case instead (run.jsonl); common keys have the same definition. Files are identified
by the hash of their content, because their names may identify patients.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samda.cli.options import check_file, say
from samda.errors import InputError, SamdaError, UsageError, reason_of
from samda.io import Image, files_of
from samda.processes import launched

REPORT_VERSION = 1
PLAIN = (None, "done", "empty", "skipped")  # outcomes without a reason


class RunReport:
    """Collects the facts of a run and writes them at the end of the block, also after an error.

        with RunReport(args, "predict") as report:
            with report.stage("load"):
                ...

    If `args.report` is None, nothing is written or hashed, and `wanted` is False.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.path: Path | None = args.report
        self.wanted = self.path is not None and launched()[0] == 0  # only the main process writes it
        if self.path is not None:
            check_file(self.path, "--report")
            if self.path.exists() and not _is_report(self.path):
                raise UsageError(f"--report {self.path} exists and is no report of samda; give another file")
        self.names: dict[str, str] = {}  # text that may identify a patient -> replacement
        self.seconds: dict[str, float] = {}
        # paths may identify patients; the content is hashed instead
        options = {k: v for k, v in vars(args).items() if not isinstance(v, Path) and k not in ("command", "debug")}
        config = {key: _described(value) if self.wanted else value for key, value in options.items()}
        self.content: dict[str, Any] = {"report_version": REPORT_VERSION, "command": command, "config": config}
        self.inputs: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> RunReport:
        from samda.progress import phase

        self._begin = time.perf_counter()
        with phase("imports"):  # PyTorch and MONAI come with it
            from samda.provenance import now
        self.content["time_start"] = now() if self.wanted else None
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.wanted:
            return
        try:
            self._write(error)
        except Exception as failure:
            if error is None and isinstance(failure, OSError):
                reason = failure.strerror or failure
                raise InputError(f"the job is done, but the report {self.path} cannot be written: {reason}") from None
            if error is None:
                raise
            say(f"the report {self.path} could not be written: {failure}")  # the first error is raised

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a stage, see :func:`samda.progress.phase`."""
        from samda.progress import phase

        return phase(name, self.seconds)

    def add_input(self, case: str, **files: Image | None) -> None:
        """Hash the files of a case: `add_input("a", image=..., label=...)`; a missing file has no hash."""
        if not self.wanted:
            return
        from samda.provenance import path_sha256, pseudonym, sha256_of

        known = {kind: image for kind, image in files.items() if image is not None}
        hashes: dict[str, str | None] = {}
        for kind, image in known.items():
            key = "input_sha256" if kind == "image" else f"{kind}_sha256"
            hashes[key] = None
            with contextlib.suppress(OSError):
                hashes[key] = path_sha256(image)
        case_id = pseudonym(next((value for value in hashes.values() if value), None) or sha256_of(case))
        given = [str(path) for image in known.values() for path in files_of(image)]
        self.names |= {text: case_id for text in (*given, *(Path(path).name for path in given), case)}
        self.inputs[case] = {"case_id": case_id, **hashes}

    def set_outcome(self, case: str, outcome: str, seconds: float | None = None) -> None:
        """Record the outcome of a case: "done", "empty", "skipped" or the reason of its failure."""
        if self.wanted:
            entry = self.inputs.setdefault(case, {"case_id": "unknown"})
            entry["outcome"] = outcome
            if seconds is not None:
                entry["seconds"] = round(seconds, 3)

    def set_outcomes(self, result: Mapping[str, Any]) -> None:
        """Record the outcomes of cases of another process, as `FolderResult.to_dict` gives them."""
        for outcome in ("done", "skipped", "empty"):
            for case in result[outcome]:
                self.set_outcome(case, outcome)
        for case, reason in result["failed"].items():
            self.set_outcome(case, reason)

    def add(self, **values: Any) -> None:
        """Add keys of plain values."""
        self.content |= values

    def add_model(self, folder: str | Path) -> None:
        """Add hashes of a model folder: adapters with class head, and base weights."""
        if not self.wanted:
            return
        from samda.adapters.adapter_file import read_adapters
        from samda.provenance import tensors_sha256

        file = read_adapters(folder)
        self.add(adapter_sha256=tensors_sha256(file.tensors), base_file_sha256=file.base.get("sha256"))

    def add_network(self, network: Any) -> None:
        """Add hashes as in `samda adapt`: base with class head, and adapters with class head."""
        from samda.adapters.adapter_file import state_tensors
        from samda.provenance import tensors_sha256

        base, adapters = network.full_state(), state_tensors(network)
        self.add(model_sha256=tensors_sha256(base), adapter_sha256=tensors_sha256(adapters))

    def _write(self, error: BaseException | None) -> None:
        from samda.io import write_json
        from samda.progress import phases
        from samda.provenance import now, sha256_of, versions

        code, reason, text = outcome_of(error)
        entries = [{"outcome": None} | entry for entry in self.inputs.values()]
        # a pattern of all names for every case would take the square of their number; only reasons hold names
        inputs = [entry if entry["outcome"] in PLAIN else self._conceal(entry) for entry in entries]
        content = self.content | {
            "time_end": now(),
            "seconds": _rounded(self.seconds | {"total": time.perf_counter() - self._begin}),
            **({"profile": _rounded(phases)} if self.content["config"].get("profile") else {}),
            "versions": versions(),
            "config_sha256": sha256_of(self.content["config"]),
            "peak_memory_mb": peak_memory_mb(),
            "exit_code": code,
            "exit_reason": reason,
            "error": text,
        }
        assert self.path is not None
        write_json(self.path, self._conceal(content) | {"inputs": inputs})

    def _conceal(self, value: dict[str, Any]) -> dict[str, Any]:
        """Plain values without names."""
        from samda.provenance import conceal

        text = "\n".join(_texts(value))
        return conceal(value, {name: other for name, other in self.names.items() if name in text})


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, str):
        yield value


def _described(value: Any) -> Any:
    """The value of an option; files (task, adapters) are replaced by name and sha256."""
    if not isinstance(value, str) or not any(Path(part).is_file() for part in value.split(",")):
        return value
    from samda.provenance import path_sha256

    parts = [Path(part) for part in value.split(",")]
    return [{"file": p.name, "sha256": path_sha256(p)} if p.is_file() else str(p) for p in parts]


def outcome_of(error: BaseException | None) -> tuple[int, str, str | None]:
    """Exit code, reason ("done", "usage", "failed", "interrupted", "out of memory", "unexpected") and message."""
    if error is None:
        return 0, "done", None
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted", None
    if isinstance(error, UsageError):
        return 2, "usage", reason_of(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, "out of memory", reason_of(error)
    return 1, "failed" if isinstance(error, SamdaError) else "unexpected", reason_of(error)


def peak_memory_mb() -> dict[str, float | None]:
    """Peak memory of this process: resident and on GPUs (MB = 10^6 bytes); None if unknown."""
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
        resident: float | None = peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
    except ImportError:  # Windows
        resident = None
    import torch

    gpu = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    cuda = sum(gpu) / 1e6 if gpu else None
    return {"rss": None if resident is None else round(resident), "cuda": None if cuda is None else math.ceil(cuda)}


def _is_report(path: Path) -> bool:
    """Does the file begin as reports do? It may be of any size."""
    if not path.is_file():  # a pipe would be waited for
        return False
    with path.open("rb") as file:
        return b'"report_version"' in file.read(200)
