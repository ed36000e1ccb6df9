# SPDX-License-Identifier: Apache-2.0
"""The harness behind docs/evidence.md: who sees which patients, how runs are kept, and how they are compared."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from samda.adapters import build_configs


def test_nobody_trains_and_is_held_out_and_fewer_are_part_of_more() -> None:
    from benchmarks.evidence.datasets import ALL, DATASETS, SPLITS, training_patients

    assert {name for name, entry in DATASETS.items() if entry.counts} == set(SPLITS)
    for name, split in SPLITS.items():
        train, test = split["train"], split["test"]
        assert len(set(train)) == len(train) and len(set(test)) == len(test) and not set(train) & set(test)
        assert training_patients(name, ALL, 0) == train
        for seed in range(3):
            counts = [n for n in DATASETS[name].counts if n != ALL]
            drawn = [training_patients(name, n, seed) for n in counts]
            assert [len(set(chosen)) for chosen in drawn] == counts
            assert all(more[: len(fewer)] == fewer for fewer, more in itertools.pairwise(drawn))
            assert set(drawn[-1]) <= set(train)
        with pytest.raises(ValueError, match="31"):
            training_patients(name, 31, 0)
    hippocampus = SPLITS["hippocampus"]
    assert (len(hippocampus["train"]), len(hippocampus["test"])) == (160, 40)
    assert SPLITS["vessels_chase"]["test"] == [f"Image_{n}" for n in (11, 12, 13, 14)]  # children, both eyes


def test_cases_go_to_their_patients(nuclei: Path) -> None:
    from benchmarks.evidence import datasets

    training, test = datasets.split("nuclei_stain", nuclei, 1, 0)
    assert [case["id"] for case in training] == ["stain_b"] and [case["id"] for case in test] == ["stain_c", "stain_d"]
    assert Path(training[0]["label"]) == (nuclei / "nuclei_stain" / "masks" / "stain_b.png").resolve()
    (nuclei / "nuclei_stain" / "images" / "stain_c.png").unlink()
    with pytest.raises(FileNotFoundError, match="stain_c"):
        datasets.split("nuclei_stain", nuclei, 1, 0)
    (nuclei / "nuclei_stain" / "masks" / "stain_a.png").unlink()
    with pytest.raises(FileNotFoundError, match="stain_a"):
        datasets.cases_of("nuclei_stain", nuclei)
    with pytest.raises(FileNotFoundError, match="docs"):
        datasets.cases_of("heart_sunnybrook", nuclei)


@pytest.mark.parametrize(
    ("name", "file", "patient"),
    [
        ("heart_sunnybrook", "SC-HF-NI-03-IM-0001-0020", "SC-HF-NI-03"),
        ("vessels_chase", "Image_01L", "Image_01"),
        ("lungs_montgomery", "MCUCXR_0001_0", "MCUCXR_0001"),
    ],
)
def test_patient_of_a_file(name: str, file: str, patient: str) -> None:
    import re

    from benchmarks.evidence.datasets import DATASETS

    found = re.match(DATASETS[name].patient, file)
    assert found is not None and found.group() == patient


def test_samda_is_called_as_its_user_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evidence import methods

    commands = []

    def record(words, timeout):
        commands.append([str(word) for word in words[3:]])
        return json.dumps({"parameters": {"trainable": 7, "head": 4}})

    monkeypatch.setattr(methods, "run_there", record)
    lists = [tmp_path / "a.json", tmp_path / "b.json"]
    row = methods.train_and_predict("sam + SAM-DA", lists, tmp_path, 300, 5, ("background", "x"))
    train, *predicted = commands
    assert row["parameters"] == 7 and row["without_head"] == 3 and row["cpu_seconds"] >= 0
    options = dict(zip(train[1::2], train[2::2], strict=False))
    assert train[0] == "train" and options["-d"] == str(lists[0]) and options["--adapter"] == "sam_da"
    assert options["--seed"] == "5" and options["--set"] == "head=sam"
    assert [words[words.index("-i") + 1] for words in predicted] == [str(file) for file in lists]


def test_every_adapter_can_be_built() -> None:
    from benchmarks.evidence.fields import NETWORKS
    from benchmarks.evidence.methods import ABLATIONS, METHODS
    from samda.io import load_yaml, packaged

    for method in (METHODS | ABLATIONS).values():
        content = method.adapters
        if isinstance(content, str):
            content = load_yaml(packaged("configs", "adapters", f"{content}.yaml").read_text(encoding="utf-8"))
        assert build_configs(content["adapters"])
    assert all(build_configs(adapters) for adapters in NETWORKS.values())


def test_a_run_from_files_to_a_row(nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evidence import runs

    def copy_labels(name, lists, folder, budget, seed, classes):
        output = folder / "predictions" / lists[0].stem
        output.mkdir(parents=True)
        for case in json.loads(lists[0].read_text("utf-8"))["test"]:
            label = Path(case["label"]) if case["id"] == "stain_c" else nuclei / "nuclei_stain" / "masks" / "empty.png"
            shutil.copy(label, output / f"{case['id']}.png")
        return {"cpu_seconds": 1.0, "parameters": 2}

    from PIL import Image

    Image.new("L", (48, 40)).save(nuclei / "nuclei_stain" / "masks" / "empty.png")
    monkeypatch.setattr(runs, "train_and_predict", copy_labels)
    run = {"data": "nuclei_stain", "patients": 2, "method": "pyramid", "seed": 0, "budget": 9}
    row = runs.measure(run, nuclei)
    assert run.items() <= row.items()
    assert row["test"]["nuclei_stain"]["stain_c"]["nucleus"] == [1.0, 1.0, 0.0]
    missed = row["test"]["nuclei_stain"]["stain_d"]["nucleus"]
    assert missed[:2] == [0.0, 0.0] and missed[2] == pytest.approx(math.hypot(48, 40, 1), abs=1e-3)
    with pytest.raises(FileNotFoundError, match="--data"):
        runs.measure(run, None)


def test_cases_of_a_patient_are_averaged() -> None:
    from benchmarks.evidence.runs import by_patient

    one, two, none = (SimpleNamespace(dice=d, nsd=d, hd95_mm=1.0) for d in (0.5, 0.9, math.nan))
    none.nsd = none.hd95_mm = math.nan
    cases = {"a1": [one, none], "a2": [two, none], "b": [none, one]}
    rows = by_patient(cases, {"a1": "a", "a2": "a", "b": "b"}, ("x", "y"))
    assert rows["a"] == {"x": [0.7, 0.7, 1.0], "y": [None, None, None]}
    assert rows["b"] == {"x": [None, None, None], "y": [0.5, 0.5, 1.0]}


def test_a_run_is_stored_when_it_ends_and_never_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evidence import __main__ as main
    from benchmarks.evidence import runs

    wanted = [{"data": "x", "seed": seed, "setup": "1"} for seed in range(3)]
    monkeypatch.setattr(runs, "planned", lambda part: wanted)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setenv("SAMDA_CACHE", str(tmp_path))
    runs.store("part", wanted[1] | {"dice": 0.5})
    assert main.complete("part", minutes=0, processes=1, measure=root_of_seed) == 0
    assert len(runs.stored("part")) == 1, "no time, no run"
    assert main.complete("part", minutes=1, processes=1, measure=root_of_seed) == 1
    rows = runs.stored("part")
    assert [row["seed"] for row in rows] == [1, 2], "one failed, and takes nothing with it"
    assert rows[0]["dice"] == 0.5 and rows[1]["dice"] == pytest.approx(1.0)
    runs.store("part", wanted[0] | {"not_run": "no network"})
    assert runs.missing("part") == [wanted[0]]
    runs.store("part", wanted[0] | {"dice": 0.1})
    assert runs.missing("part") == [] and len(runs.stored("part")) == 3
    monkeypatch.setattr(runs, "planned", lambda part: [wanted[0] | {"setup": "2"}])
    assert runs.read("part") == [] and len(runs.missing("part")) == 1, "another protocol"


def root_of_seed(run: dict) -> dict:
    """A run that fails for seed 0; at the top of the module, as another process has to find it."""
    return run | {"dice": 1 / math.sqrt(run["seed"] - 1) if run["seed"] else math.sqrt(-1)}


def test_settings_change_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evidence import methods, runs

    plan = {run["method"]: run["setup"] for run in runs.planned("ablations")}
    monkeypatch.setitem(methods.ABLATIONS, "LKA", methods.Method("lka", {"epochs": 1}))
    changed = {
        name
        for name, setup in plan.items()
        if {r["method"]: r["setup"] for r in runs.planned("ablations")}[name] != setup
    }
    assert changed == {"LKA"}
    for part in runs.PARTS:
        planned = [json.dumps(run, sort_keys=True) for run in runs.planned(part)]
        assert len(set(planned)) == len(planned) > 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (["no_such_program"], "no_such_program cannot be started"),
        (["python3", "-c", "print('fine'); raise ValueError('too small')"], r"failed \(1\): ValueError: too small"),
        (["python3", "-c", "import time; time.sleep(60)"], "took longer than 1 s"),
    ],
)
def test_a_program_that_does_not_run_says_why(program: list[str], reason: str) -> None:
    from benchmarks.evidence.apart import NotRun, run_there

    with pytest.raises(NotRun, match=reason):
        run_there(program, timeout=1 if "sleep" in program[-1] else 60)


def _row(method: str, seed: int, dice: dict[str, float], **more) -> dict:
    test = {"hippocampus": {patient: {"x": [value, value, 1.0]} for patient, value in dice.items()}}
    run = {"data": "hippocampus", "method": method, "seed": seed, "patients": 10, "budget": 300}
    return run | {"test": test, "parameters": 5, "cpu_seconds": 300.4} | more


def test_methods_are_compared_patient_by_patient() -> None:
    from benchmarks.evidence import tables

    mine = [_row("pyramid", 0, {"a": 0.5, "b": 0.7}), _row("pyramid", 1, {"a": 0.7, "b": 0.9})]
    others = [_row("DynUNet 3-D", 0, {"a": 0.4, "b": 0.5}), _row("DynUNet 3-D", 1, {"a": 0.4, "b": 0.7})]
    assert tables.paired(mine, others) == pytest.approx([0.2, 0.2])  # (0.1 + 0.3) / 2 and (0.2 + 0.2) / 2
    assert tables.paired(mine[:1], others[1:]) == []
    low, high = tables.interval([0.1, 0.2, 0.3])  # t = 4.303, s = 0.1
    assert (low, high) == pytest.approx((0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5), abs=1e-4)
    assert tables.interval([0.1]) == (-math.inf, math.inf)
    assert tables.difference([0.1, 0.1, 0.1]) == "**+0.100 (+0.100 to +0.100)**"
    assert tables.difference([0.1, 0.2, 0.3]) == "+0.200 (-0.048 to +0.448)" and tables.difference([0.1]) == "-"
    lines = tables.scores(mine + others, "hippocampus").splitlines()
    assert "| pyramid | 0.700 ± 0.141 (2) | 0.700 | 1.0 |" in lines
    lines = tables.compared(mine + others, "hippocampus").splitlines()
    assert "| DynUNet 3-D - pyramid | **-0.200 (-0.200 to -0.200)** |" in lines
    assert "| pyramid | 5 | - | 300 |" in tables.cost(mine).splitlines()
    refused = {
        "data": "hippocampus",
        "method": "nnU-Net 2d",
        "seed": 0,
        "patients": 10,
        "budget": 300,
        "not_run": "pip",
    }
    assert "| nnU-Net 2d, not run: pip | - | - | - |" in tables.scores([*mine, refused], "hippocampus").splitlines()


def test_spread() -> None:
    from benchmarks.evidence.tables import spread

    assert spread([0.5, 0.7]) == "0.600 ± 0.141 (2)" and spread([0.5, 0.6, 0.7]) == "0.600 ± 0.100"
    assert spread([0.5], "+") == "+0.500 (1)" and spread([]) == "-"
