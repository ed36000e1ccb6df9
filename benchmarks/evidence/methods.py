# SPDX-License-Identifier: Apache-2.0
"""The methods of the evidence: samda as its user has it, by its commands, and networks from scratch.

Everybody gets the same cases, one thread and the same CPU seconds; samda pays the encoding from them. A method trains
on the training section of a data list and leaves one label map for each test case of every list in a folder.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samda.io import write_json

from .apart import run_there


@dataclasses.dataclass(frozen=True)
class Method:
    """samda with a class head and adapters.

    Attributes:
        adapters: names of overlays, as `samda train --adapter` takes them; or an overlay's content, with "adapters".
        settings: further keys of train.json.
    """

    adapters: str | Mapping[str, Any]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# head `pyramid` with scale and shift of its levels is the default; `sam` reads SAM's own mask tokens, as in the papers
METHODS: dict[str, Method] = {
    "pyramid": Method("ssf"),
    "pyramid, head alone": Method("head"),
    "pyramid + SAM-DA": Method("sam_da"),
    "pyramid + SALT": Method("salt"),
    "pyramid + LoRA": Method("lora"),
    "pyramid + DKA": Method("dka"),
    "pyramid + SALT + DKA + SAM-DA": Method("flagship"),
    "pyramid, full fine-tuning": Method("full"),
    "sam + SAM-DA": Method("sam_da", {"head": "sam"}),
}
# `samda`, whose minutes are then those of the process and not of a busy machine
CPU_CLOCK = (
    "import time; from samda.training import pace; pace.clock = time.process_time; "
    "from samda.cli.main import main; raise SystemExit(main())"
)
ENCODER = tuple(name for name in METHODS if any(word in name for word in ("SALT", "LoRA", "DKA", "full")))
ABLATIONS: dict[str, Method] = {  # beside "pyramid + SALT": r = k - 8 in attention, d = 4
    "SALT, r = k (S-SAM)": Method({"adapters": {"salt": {"r": 1.0}}}),
    "SALT, r = 0, d = 4": Method({"adapters": {"salt": {"r": 0}}}),
    "SALT, r = 0, d = 16": Method({"adapters": {"salt": {"r": 0, "rank": 16}}}),
    "SALT, no ReLU": Method({"adapters": {"salt": {"activation": None}}}),
    "DKA, large kernel alone": Method(
        {"adapters": {"dka_51": {"type": "lka", "kernel_size": 51, "width": 16, "bias": False, "act": "post"}}}
    ),
    "bottleneck of DKA's width": Method({"adapters": {"bottleneck": {"width": 16, "bias": False}}}),
    "LKA": Method("lka"),
}
RIVALS = ("DynUNet 2-D", "DynUNet 3-D", "nnU-Net 2d", "nnU-Net 3d_fullres")


def rivals_of(dimensions: int) -> tuple[str, ...]:
    """The networks from scratch that can read the data."""
    return tuple(name for name in RIVALS if dimensions == 3 or "2" in name)


def train_and_predict(
    name: str, lists: Sequence[Path], folder: Path, budget: int, seed: int, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Train for `budget` CPU seconds, then predict.

    Args:
        name: of `METHODS`, `ABLATIONS` or `RIVALS`.
        lists: data lists; the training section of the first trains, the test section of each is predicted into
            `folder`/predictions/ and the list's name.
        folder: work folder, empty.
        budget: CPU seconds of the training; planning and preprocessing of nnU-Net and all predictions do not count.
        seed: of everything random.
        classes: background first.

    Returns:
        {"cpu_seconds": of the training, "parameters": trained ones, ...}

    Raises:
        NotRun: a program failed; the message ends with its last line.
    """
    if name.startswith("DynUNet"):
        from .unet import train_unet

        return train_unet(lists, folder / "predictions", classes, budget, seed, dimensions=3 if "3" in name else 2)
    if name.startswith("nnU-Net"):
        from .nnunet import train_nnunet

        return train_nnunet(lists, folder, classes, budget, seed, configuration=name.split()[-1])
    row = train_samda((METHODS | ABLATIONS)[name], lists[0], folder, budget, seed)
    for file in lists:
        samda_predict(folder / "model", file, folder / "predictions" / file.stem)
    return row


def train_samda(method: Method, data: Path, folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`samda train` with the task that `samda check` suggests; the model goes to `folder`/model."""
    adapters = method.adapters
    if not isinstance(adapters, str):
        write_json(folder / "overlay.yaml", adapters)  # JSON is YAML
        adapters = str(folder / "overlay.yaml")
    words = ["-d", data, "-o", folder / "model", "--adapter", adapters, "--seed", seed, "--minutes", budget / 60]
    for key, value in method.settings.items():
        words += ["--set", f"{key}={value}"]
    before = _cpu_seconds_of_children()
    result = json.loads(samda_train(*words))
    spent = _cpu_seconds_of_children() - before
    counts = result["parameters"]
    return {
        "cpu_seconds": round(spent, 1),
        "parameters": counts["trainable"],
        "without_head": counts["trainable"] - counts["head"],
    }


def samda_train(*words: Any) -> str:
    """`samda train`, whose minutes are of CPU time; returns its JSON."""
    further = ("--device", "cpu", "--tracking", "none", "--quiet", "--json")
    return run_there([sys.executable, "-c", CPU_CLOCK, "train", *words, *further], timeout=None)


def samda_predict(model: Path, data: Path, output: Path) -> None:
    """`samda predict` of the test cases of a data list."""
    words = ["-m", model, "-i", data, "-o", output, "--quiet", "--device", "cpu"]
    run_there([sys.executable, "-m", "samda", "predict", *words], timeout=None)


def _cpu_seconds_of_children() -> float:
    """Of the programs that have ended; a process measures one run at a time."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
