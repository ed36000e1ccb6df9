# SPDX-License-Identifier: Apache-2.0
"""The protocol behind docs/evidence.md: who sees which slices, and that no run is lost or done twice."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from samda.adapters import build_configs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """A module of benchmarks/evidence by its name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.evidence.{name}")


@pytest.mark.parametrize("task", ["abdomen", "chest"])
def test_no_neighbor_of_a_scored_slice_trains(module, task: str) -> None:
    protocol = module("protocol")
    slices, blocks = protocol.load(task), protocol.TASKS[task]
    for held in (slices.test, slices.choice):
        assert not set(held) & set(slices.training)
        for index in held:
            assert min(abs(index - other) for other in slices.training) > blocks.gap
    assert not set(slices.test) & set(slices.choice)
    shown = slices.labels[list(slices.test)].unique().tolist()
    assert shown == list(range(slices.task.num_classes)), "every class is scored"


def test_fewer_labels_are_part_of_more_and_all_hold_a_class(module) -> None:
    protocol = module("protocol")
    slices = protocol.load("abdomen")
    for seed in range(3):
        drawn = [protocol.choose(slices, n, seed) for n in (1, 2, 4, 8, 16)]
        assert [len(chosen) for chosen in drawn] == [1, 2, 4, 8, 16]
        for fewer, more in itertools.pairwise(drawn):
            assert more[: len(fewer)] == fewer
        assert set(drawn[-1]) <= set(slices.training) and all(slices.labels[i].any() for i in drawn[-1])
    assert protocol.choose(slices, 4, 0) != protocol.choose(slices, 4, 1)
    assert protocol.choose(slices, protocol.ALL, 0) == list(slices.training)


def test_every_slice_trains_as_often_as_another_and_one_in_ten_is_empty(module) -> None:
    protocol, trial = module("protocol"), module("trial")
    slices = protocol.load("abdomen")
    filled = [i for i in slices.training if slices.labels[i].any()]
    decks = 8 * (len(filled) + len(filled) // 9)
    drawn = [i for batch in itertools.islice(trial.order(slices, 0, 0, 1), decks // trial.BATCH) for i in batch]
    counts = [drawn.count(i) for i in filled]
    assert max(counts) - min(counts) <= 1
    assert 0.05 < 1 - sum(counts) / len(drawn) <= 0.1
    assert set(drawn) <= set(slices.training)
    again = itertools.islice(trial.order(slices, 0, 0, 1), decks // trial.BATCH)
    assert [i for batch in again for i in batch] == drawn, "every method of a seed gets these"


def test_dice_is_pooled_over_the_slices(module) -> None:
    protocol = module("protocol")
    task = protocol.load("chest").task
    labels, predicted = torch.zeros(2, 1, 4, 4, dtype=torch.long), torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, 0, :2] = 1  # 8 pixels, 4 of them found, 2 too many on the other slice
    predicted[0, 0], predicted[1, 0, :2] = 1, 1
    logits = torch.nn.functional.one_hot(predicted, task.num_classes).movedim(-1, 1).float()
    assert protocol.score(logits, labels, task)["lung_right"] == pytest.approx(2 * 4 / (8 + 6), abs=1e-4)


def test_every_method_can_be_built_and_the_encoder_stays_where_it_says_so(module) -> None:
    methods = module("methods")
    every = dict(methods.METHODS)
    for name, rows in methods.ABLATIONS.items():
        every |= {f"{name}: {row}": method for row, method in rows.items()}
    decoder_only = {"head", "decoder", "sam_da"}
    for name, method in every.items():
        kinds = {config.name for config in build_configs(method.adapters).values()}
        assert method.encoder == (bool(kinds - decoder_only) or name in methods.FRESH), name


def test_a_run_is_stored_when_it_ends_and_never_done_again(module, tmp_path: Path, monkeypatch) -> None:
    main, parts, results = module("__main__"), module("parts"), module("results")
    runs = [{"task": "abdomen", "seed": seed} for seed in range(3)]
    file = tmp_path / "part.json"
    file.write_text(json.dumps([runs[1] | {"dice": 0.5}]))
    monkeypatch.setattr(parts, "planned", lambda part: runs)
    monkeypatch.setattr(results, "results_file", lambda part: file)
    assert main.complete("part", minutes=0, processes=1, measure=root_of_seed) == 0
    assert len(json.loads(file.read_text())) == 1, "no time, no run"
    assert main.complete("part", minutes=1, processes=1, measure=root_of_seed) == 1
    rows = json.loads(file.read_text())
    assert [row["seed"] for row in rows] == [1, 2], "one failed, and takes nothing with it"
    assert rows[0]["dice"] == 0.5 and rows[1]["dice"] == pytest.approx(1.0)


SCRIPT = """
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if words["--seeds"] == "7":
    sys.exit("no such seed")
common = {"seed": int(words["--seeds"]), "epochs": int(words["--epochs"])}
open(words["--results"], "w").write(json.dumps([common | {"context": c, "dice": c} for c in (0, 1)]))
"""


def test_scripts_of_their_own_give_the_row_that_was_asked_for(module, tmp_path: Path, monkeypatch) -> None:
    elsewhere = module("elsewhere")
    (tmp_path / "context.py").write_text(SCRIPT)
    monkeypatch.setattr(elsewhere, "SCRIPTS", tmp_path)
    monkeypatch.setenv("SAMDA_CACHE", str(tmp_path / "cache"))
    run = {"context": 1, "seed": 3, "epochs": 2}
    assert elsewhere.measure_by_script(run) == run | {"dice": 1}
    with pytest.raises(RuntimeError, match=r"context.py failed \(1\): no such seed"):
        elsewhere.measure_by_script(run | {"seed": 7})


def test_another_protocol_and_a_rival_that_could_not_run_are_measured_again(
    module, tmp_path: Path, monkeypatch
) -> None:
    parts, results, trial = module("parts"), module("results"), module("trial")
    monkeypatch.setattr(results, "results_file", lambda part: tmp_path / f"{part}.json")
    monkeypatch.setenv("SAMDA_CACHE", str(tmp_path))
    first = parts.planned("rates")[0]
    results.store("rates", first | {"dice": 0.5})
    assert first not in results.missing("rates") and results.read("rates") == [first | {"dice": 0.5}]
    monkeypatch.setattr(trial, "STEPS", trial.STEPS + 1)
    assert results.read("rates") == [] and len(results.missing("rates")) == len(parts.planned("rates"))
    run = parts.planned("rivals")[1]
    results.store("rivals", run | {"status": "not run", "reason": "no network"})
    assert run in results.missing("rivals")
    results.store("rivals", run | {"dice": 0.1})
    assert run not in results.missing("rivals") and results.stored("rivals") == [run | {"dice": 0.1}]


def root_of_seed(run: dict) -> dict:
    """A run that fails for seed 0; at the top of the module, as another process has to find it."""
    return run | {"dice": 1 / math.sqrt(run["seed"] - 1) if run["seed"] else math.sqrt(-1)}


def test_standard_deviation_and_pairs(module) -> None:
    tables: ModuleType = module("tables")
    assert tables.spread([0.5, 0.7]) == "0.600 ± 0.141 (2)" and tables.spread([0.5, 0.6, 0.7]) == "0.600 ± 0.100"
    assert tables.spread([0.5], "+") == "+0.500 (1)" and tables.spread([]) == "-"
    common = {"task": "abdomen", "labels": 2}
    rows = [
        common | {"method": m, "seed": s, "dice": d} for m, s, d in (("head", 0, 0.3), ("lora", 0, 0.5), ("lora", 1, 1))
    ]
    head, lora = (tables.pick(rows, method=name) for name in ("head", "lora"))
    assert tables.gains(lora, head) == pytest.approx([0.2])
    # n = 3: t = 4.303, so the interval is the mean ± 2.484 s
    assert [tables.told_apart(d) for d in ([0.2, 0.2], [0.1, 0.11, 0.3], [-0.1, -0.11, -0.12])] == [False, False, True]
    assert tables.difference([-0.1, -0.11, -0.12]) == "**-0.110 ± 0.010**"
