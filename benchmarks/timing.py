# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: candidates run in turn within one process, so that a busy minute hurts all of them alike; and
pages whose tables are written by a script.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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


def in_training(network: torch.nn.Module, scale: float = 1e-3) -> torch.nn.Module:
    """The network with noise on what it trains: as in the midst of training, nothing is zero any more."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return network


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = {
        "processor": names[0] if names else platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 1),  # when the measurement ended, itself included
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def duration(value: float) -> str:
    """In milliseconds or seconds, whichever reads better."""
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def spread(values: list[float]) -> str:
    """`median (min to max)`."""
    scale = 1e3 if median(values) < 1 else 1
    return f"{duration(median(values))} ({min(values) * scale:.3g} to {max(values) * scale:.3g})"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; columns after the first `texts` ones hold numbers."""
    rules = ["---"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join([f"| {' | '.join(head)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(c)} |" for c in lines)])


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        times = "; ".join(f"{name} {spread(values)}" for name, values in row.seconds.items() if values)
        mark = {True: "", False: " (missed)", None: ""}[row.reached]
        notes = f"{times}. {row.notes}" if row.notes and times else times or row.notes
        lines.append([row.what, row.rival, row.goal, row.result + mark, notes])
    return markdown(["what", "rival", "goal", "measured", "times (median, min to max)"], lines, texts=5)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables: everything between `<!-- NAME -->` and `<!-- end -->` is made anew.

    Raises:
        ValueError: a marker names no table, or a table has no marker.
    """
    named = re.findall(r"<!-- (\w+) -->\n", text)
    if sorted(named) != sorted([*tables, *["end"] * len(tables)]):
        raise ValueError(f"the page has the markers {named}, tables are {', '.join(tables)}")
    for name, content in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->\n)"
        text = re.sub(pattern, lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    return text
