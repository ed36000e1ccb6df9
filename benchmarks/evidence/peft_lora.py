# SPDX-License-Identifier: Apache-2.0
"""samda's LoRA against Hugging Face's peft: the same linear layers, the same values at the start, the same steps.

Both adapt the same `vit_t` and train the same class head, in one process and in turns. peft lives in an environment of
its own, which is made on the first call (`peft.txt`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from .apart import HERE, Exam, NotRun, interpreter, run_there

__all__ = ["compare"]


def compare(
    exam: Exam,
    steps: int,
    seed: int = 0,
    rank: int = 4,
    alpha: float | None = None,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Train with both for some steps and compare the numbers.

    Args:
        exam: the slices; no augmentation.
        steps: of the training.
        seed: of A and of the batches.
        rank: of the adapters.
        alpha: the deltas are scaled by alpha / rank; None is the rank.
        batch_size: slices of a step.

    Returns:
        {"status": "run", "layers", "parameters": of the adapters, the largest absolute differences "outputs" (of the
        logits before the first step, with random A and B), "losses", "weights" (A and B after training), "logits"
        (after training), "changed": by how much training moved A and B, "samda" and "peft": {"dice", "mean",
        "step_seconds": median, "losses"}}, or {"status": "not run", "reason": why}.
    """
    settings = {"num_classes": exam.num_classes, "steps": steps, "seed": seed, "rank": rank, "batch_size": batch_size}
    settings["alpha"] = rank if alpha is None else alpha
    try:
        python = interpreter("peft")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = {"images": exam.images[exam.train], "labels": exam.labels[exam.train]}
            torch.save(data | {"scored": exam.images[exam.test]}, folder / "data.pt")
            (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
            wait = 600 + 60 * steps
            run_there([python, HERE / "peft_worker.py", folder], wait, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
            predicted = torch.load(folder / "predicted.pt", weights_only=True)
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except NotRun as error:
        return {"status": "not run", "reason": str(error)}
    for name in ("samda", "peft"):
        result[name] |= exam.scores(predicted[name])
    return {"status": "run", **settings, **result}
