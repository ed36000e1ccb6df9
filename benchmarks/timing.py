# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: candidates run in turn within one process, so that a busy minute hurts all of them alike.

Tables of docs/performance.md are written from the results in `benchmarks/results`, the text around them by hand:

    python -m benchmarks.timing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from samda.io import write_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


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
    processor: str = ""


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names out of `known`, with commas between."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; choose from {', '.join(known)}")
        return names

    return read


def command_line(description: str | None, option: str, parts: Iterable[str], repeats: int) -> argparse.ArgumentParser:
    """The options that benchmarks share; `option` chooses `parts`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(parts)
    parser.add_argument(option, dest="names", type=names_of(parts), default=every, metavar="NAMES", help=every)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    return parser


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


def training_step(model: Any, size: int, batch: int, device: str) -> Callable[[], None]:
    """One step of a segmenter on random slices: forward, cross entropy, backward, AdamW."""
    image = torch.rand(batch, 1, size, size, device=device)
    label = torch.randint(0, model.num_classes, (batch, size, size), device=device)
    optimizer = torch.optim.AdamW([p for p in in_training(model.train()).parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        optimizer.step()

    return step


def processor() -> str:
    """Name, and the widest instructions that PyTorch takes."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "unknown"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def machine(device: str) -> dict[str, Any]:
    facts = {
        "processor": processor(),
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
    lines = []
    for row in rows:
        times = "; ".join(f"{name} {spread(values)}" for name, values in row.seconds.items() if values)
        mark = {True: "", False: " (missed)", None: ""}[row.reached]
        notes = f"{times}. {row.notes}" if row.notes and times else times or row.notes
        lines.append([row.what, row.rival, row.goal, row.result + mark, notes, row.processor])
    return markdown(["what", "rival", "goal", "measured", "times (median, min to max)", "processor"], lines, texts=6)


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


def filled(text: str, results: Path = RESULTS) -> str:
    return fill(text, blocks(results))


def blocks(results: Path) -> dict[str, str]:
    """Every table by its name; one without results says how to measure it."""
    speed, scaling, cuda = (_read(results / f"{name}.json") for name in ("speed_cpu", "scaling_cpu", "speed_cuda"))
    measured = {
        "machine": ("make bench", _machine, speed),
        "speed": ("make bench", _speed, speed),
        "cuda": ("python -m benchmarks.speed --device cuda", _speed, cuda),
        "machine_of_the_rest": ("python -m benchmarks.scaling", _machine, scaling),
        "growth": ("python -m benchmarks.scaling --parts growth", _growth, scaling.get("growth")),
        "profile": ("python -m benchmarks.scaling --parts profile", _profile, scaling.get("profile")),
        "floor": ("python -m benchmarks.scaling --parts profile", _floor, scaling.get("profile")),
        "options": ("python -m benchmarks.scaling --parts options", _options, scaling.get("options")),
    }
    return {
        name: write(found) if found else f"not measured; `{command}`"
        for name, (command, write, found) in measured.items()
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _machine(results: dict[str, Any]) -> str:
    facts = results["machine"]
    return (
        f"Measured last on: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads of PyTorch "
        f"{facts['torch']}, Python {facts['python']}, {facts['system']}; up to {results['repeats']} repeats; load of "
        f"the machine when it ended, this work included: {facts['load']}."
    )


def _speed(results: dict[str, Any]) -> str:
    return table([Row(**row) for rows in results["rows"].values() for row in rows])


def _growth(curves: dict[str, Any]) -> str:
    lines = []
    for name, curve in curves.items():
        points = ", ".join(f"{value}: {duration(took)}" for value, took in curve["seconds"].items())
        lines.append([name, curve["fixed"], points])
    return markdown(["what grows", "measured on", "seconds"], lines, texts=3)


def _profile(jobs: dict[str, Any]) -> str:
    largest: dict[str, float] = {}
    for job in jobs.values():
        for kind, share in job["shares"].items():
            largest[kind] = max(share, largest.get(kind, 0.0))
    lines = []
    for kind in sorted(sorted(largest), key=lambda kind: -largest[kind]):
        lines.append([kind, *(f"{100 * job['shares'].get(kind, 0.0):.0f} %" for job in jobs.values())])
    return markdown(["share of the time", *jobs], lines)


def _floor(jobs: dict[str, Any]) -> str:
    head = ["job", "measured", "GFLOP", "floor of arithmetic", "GB moved", "floor of memory"]
    lines = []
    for name, job in jobs.items():
        floors, peak = job["floor_seconds"], job["peak"]
        compute = f"{duration(floors['compute'])} at {peak['flop_per_s'] / 1e9:.0f} GFLOP/s"
        memory = f"{duration(floors['memory'])} at {peak['bytes_per_s'] / 1e9:.1f} GB/s"
        cells = [name, duration(job["seconds"]), f"{job['gflop']:.1f}", compute, f"{job['gbyte']:.2f}", memory]
        lines.append([*cells, f"{job['of_floor']:.1f}"])
    return markdown([*head, "measured / larger floor"], lines)


def _options(found: dict[str, Any]) -> str:
    lines = []
    for name, row in found.items():
        if "failed" in row:
            lines.append([name, f"failed: {row['failed']}", "", "", ""])
            continue
        first = duration(row["first_call"]) if "first_call" in row else ""
        lines.append([name, row["what"], duration(row["without"]), duration(row["with"]), first])
    return markdown(["option", "measured on", "without", "with", "first call"], lines, texts=2)


def write_page() -> None:
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    write_page()
