# SPDX-License-Identifier: Apache-2.0
"""Parts that are measured by a script of their own: test-time adaptation, and neighboring slices.

The scripts go on from what they kept in the cache folder, so a run that was stopped costs little.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from samda.io import cache_dir

from .apart import run_there

__all__ = ["SCRIPTS", "measure_by_script"]

SCRIPTS = Path(__file__).parents[1]

Row = dict[str, Any]


def measure_by_script(run: Row) -> Row:
    """The row of a run: {"case", "family", "method", "seed"} of one script, {"context", "seed", "epochs"} of the other.

    Raises:
        NotRun: the script failed; the message ends with its last line.
    """
    folder = cache_dir() / "evidence" / "adaptation"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        results = Path(place) / "results.json"
        words = ["--seeds", str(run["seed"]), "--results", str(results)]
        if "case" in run:
            words = ["adaptation.py", "-o", str(folder), "--cases", run["case"], "--methods", run["method"], *words]
        else:
            words = ["context.py", "--contexts", str(run["context"]), "--epochs", str(run["epochs"]), *words]
        with FileLock(folder / f"seed{run['seed']}.lock"):  # one training of a source model at a time
            run_there([sys.executable, SCRIPTS / words[0], *words[1:]], timeout=None)
        rows = json.loads(results.read_text(encoding="utf-8"))
    rows = rows["runs"] if "case" in run else rows
    return next(row for row in rows if run.items() <= row.items())
