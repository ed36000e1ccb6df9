# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: candidates run in turn within one process, so that a busy minute hurts all of them alike."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Options", "Row", "interleave", "machine", "median", "relative_error", "spread", "table"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What rows are measured with."""

    device: str = "cpu"
    repeats: int = 5
    model: Path | None = None  # a trained vit_t; None trains one
    memory_size: int = 1024  # pixels, of the step whose memory is measured


@dataclasses.dataclass
class Row:
    """One line of a benchmark: what, against whom, and what came out."""

    what: str
    rival: str
    goal: str
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # candidate -> one figure a repeat
    result: str = "not measured"
    reached: bool | None = None  # None: no goal, or not measured
    notes: str = ""


def interleave(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each candidate, `repeats` times, taken in turns (a b c a b c ...) after `warm_up` untimed turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + repeats):
        for name, run in candidates.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    with torch.no_grad():
        return ((value.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def median(values: list[float]) -> float:
    """The middle figure."""
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """`median (min to max)` in milliseconds or seconds, whichever reads better."""
    scale, unit = (1e3, "ms") if median(values) < 1 else (1, "s")
    low, middle, high = (f"{value * scale:.3g}" for value in (min(values), median(values), max(values)))
    return f"{middle} {unit} ({low} to {high})"


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 1),  # when the measurement ended, itself included
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | rival | goal | measured | times (median, min to max) |", "|---|---|---|---|---|"]
    for row in rows:
        times = "; ".join(f"{name} {spread(values)}" for name, values in row.seconds.items() if values)
        mark = {True: "", False: " (missed)", None: ""}[row.reached]
        notes = f"{times}. {row.notes}" if row.notes and times else times or row.notes
        lines.append(f"| {row.what} | {row.rival} | {row.goal} | {row.result}{mark} | {notes} |")
    return "\n".join(lines)
