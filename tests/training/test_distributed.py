# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does: started by torchrun on this machine, connected by gloo.

Equality is shown in double precision. Whole trainings run in single precision, in which other batch sizes round
otherwise and the optimizer amplifies that; there the curves only have to be close.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import double_precision
import pytest
import torch
from monai.losses import DiceCELoss
from safetensors.torch import load_file
from tiny_scans import TASK

from samda.errors import UsageError
from samda.io import packaged
from samda.training import PaddedDataset, RankSampler, SliceSampler, WholeBatchLoss, train

BUNDLE = packaged("bundles", "sam_segmentation")
ROOT = str(Path(__file__).parents[2])
# the class head alone, with slices that do not fill the last batch: of 13 slices, the second process gets 6 and padding
CLOSE = 0.01  # of losses, Dice and parameters in single precision
CHANGES = {"adapters": {}, "epochs": 3, "batch_size": 4, "empty_share": 0.1}


def torchrun(*command: str, folder: Path) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    return subprocess.run(
        start,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
    )


def bundle_run(folder: Path, keys: dict[str, Any]) -> subprocess.CompletedProcess:
    files = [str(BUNDLE / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    return torchrun("-m", "monai.bundle", "run", "--config_file", str(files), *options, folder=folder)


def curve(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "history.json").read_text("utf-8"))["epochs"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "task.yaml").write_text(json.dumps(TASK))
    return folder


@pytest.fixture(scope="module")
def options(datalist: Path, tiny_vit_config: Any, tiny_weights: Path) -> dict[str, Any]:
    """Keys of train.json for MONAI's command."""
    keys = {"bundle_root": BUNDLE, "dataset_dir": datalist, "task": "task.yaml", "device": "cpu", "views": 2}
    return keys | CHANGES | {"backbone": tiny_vit_config.to_json(), "weights": tiny_weights}


@pytest.fixture(scope="module")
def together(place: Path, options: dict[str, Any]) -> subprocess.CompletedProcess:
    """A training of three epochs on two processes, into `place`/two."""
    return bundle_run(place, options | {"output_dir": "two", "patience": 0})


@pytest.fixture(scope="module")
def one_process(place: Path, options: dict[str, Any], datalist: Path) -> Path:
    """The same training by one process."""
    overrides = {key: options[key] for key in ("backbone", "views", *CHANGES)}
    overrides |= {"weights": str(options["weights"]), "patience": 0}
    train(datalist, place / "one", TASK, overrides=overrides, device="cpu")
    return place / "one"


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    done = torchrun(double_precision.__file__, str(tmp_path / "two.pt"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = double_precision.steps(), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() and len(one["losses"]) == 12
    for key, values in one.items():  # sums over 256 pixels and 12 steps round at 2e-16 each
        torch.testing.assert_close(two[key], values, rtol=1e-9, atol=1e-12, msg=key)


def test_no_thread_holds_an_exchanged_value_when_the_interpreter_ends(tmp_path: Path) -> None:
    """A thread of gloo that frees a tensor of Python then would abort the process."""
    code = """
import os, sys, torch
from samda.processes import exchange, join, leave
from samda.training import distribute
join("cpu")
network = distribute(torch.nn.Linear(3, 3))  # holds the default group until the end
network(torch.ones(2, 3)).sum().backward()
exchange(torch.ones(2))
before = len(os.listdir("/proc/self/task"))
leave()
open(sys.argv[1] + os.environ["RANK"], "w").write(str(before - len(os.listdir("/proc/self/task"))))
"""
    (tmp_path / "script.py").write_text(code)
    done = torchrun("script.py", "threads", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert (tmp_path / f"threads{rank}").read_text() == "3"  # two and the loop of its sockets


def test_two_processes_give_the_curve_and_the_model_of_one(
    place: Path, together: subprocess.CompletedProcess, one_process: Path
) -> None:
    assert together.returncode == 0, together.stderr
    one, two = curve(one_process), curve(place / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=CLOSE)
        assert b["mean_dice"] == pytest.approx(a["mean_dice"], abs=CLOSE)  # a few pixels may change their class
        assert b["learning_rate"] == a["learning_rate"]
    a, b = (load_file(place / name / "adapter.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert sum((a[key] - b[key]).abs().sum() for key in a) < CLOSE * sum(a[key].abs().sum() for key in a)


def test_one_process_writes_and_reports(place: Path, together: subprocess.CompletedProcess) -> None:
    assert together.stderr.count("INFO - epoch 2/3") == 1
    assert "destroy_process_group" not in together.stderr  # what torch says of a group that was not ended
    model = place / "two"
    found = {path.name for path in model.iterdir()}
    assert found == {
        ".samda", "LICENSE", "adapter.json", "adapter.safetensors", "configs", "docs", "history.json", "last.pt",
        "models", "tensorboard",
    }  # fmt: skip
    record = json.loads((model / "adapter.json").read_text("utf-8"))["record"]
    assert (record["training"]["epochs"], record["training"]["settings"]["batch_size"]) == (3, 4)
    assert record["training"]["embeddings"]["slices"] == 16


def test_samda_train_goes_on_with_what_the_bundle_began(
    place: Path, together: subprocess.CompletedProcess, one_process: Path, datalist: Path, keys: dict[str, Any]
) -> None:
    settings = keys | {"adapters": {}, "patience": 0}
    sets = [f"--set={key}={json.dumps(settings[key])}" for key in ("backbone", "adapters", "views", "patience")]
    command = ["-m", "samda", "train", "-d", datalist, "-o", "two", "--task", "task.yaml", "--weights", keys["weights"]]
    command += ["--epochs", "4", "--batch-size", "4", "--device", "cpu", "--resume", "--json", *sets]
    done = torchrun(*map(str, command), folder=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epochs"] == 4  # printed once
    assert done.stderr.count("resumed after epoch 3") == 1
    assert done.stderr.count("training on cpu, 2 processes") == 1
    settings |= {"epochs": 4, "batch_size": 4}
    train(datalist, one_process, TASK, overrides=settings, device="cpu", resume=True)
    one, two = curve(one_process), curve(place / "two")
    assert [row["epoch"] for row in two] == [1, 2, 3, 4]
    assert two[3]["loss"] == pytest.approx(one[3]["loss"], rel=CLOSE)


def test_processes_share_the_cases_of_inference(
    model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    for name in "ad":
        shutil.copy(datalist.parent / f"{name}.nii.gz", tmp_path)
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    options = ["--dataset_dir", str(tmp_path), "--output_dir", "out", "--weights", str(keys["weights"])]
    config = str(model / "configs" / "inference.json")
    options += ["--device", "cpu", "--bundle_root", str(model)]
    done = torchrun("-m", "monai.bundle", "run", "--config_file", config, *options, folder=tmp_path)
    assert done.returncode == 1 and done.stderr.count("2 cases predicted") == 1
    assert done.stderr.count("case bad: ") == 1 and "1 of 3 cases failed: bad" in done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "d.nii.gz"}
    locks = sorted(path.name for path in (tmp_path / "out" / ".samda").glob("part-*"))
    assert locks in ([], ["part-1-of-2.lock", "part-2-of-2.lock"])  # each wrote its own share


def test_an_error_ends_all_processes(place: Path, options: dict[str, Any]) -> None:
    done = bundle_run(place, options | {"output_dir": "none", "batch_size": 5})
    assert done.returncode == 1
    assert "batch_size 5 cannot be dealt out to 2 processes; choose a multiple of 2" in done.stderr
    assert "destroy_process_group" not in done.stderr
    assert not (place / "none").exists()


def test_the_loss_of_the_whole_batch_leaves_padding_out() -> None:
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 8, 8, generator=generator, requires_grad=True)
    label = torch.randint(3, (4, 1, 8, 8), generator=generator)
    padded = torch.where(torch.arange(4).view(4, 1, 1, 1) == 3, -1, label)
    value = WholeBatchLoss(loss)(logits, padded)
    torch.testing.assert_close(value, loss(logits[:3], label[:3]))
    value.backward()
    assert logits.grad is not None and not logits.grad[3].any() and logits.grad[:3].abs().min() > 0


def test_padding_has_no_class() -> None:
    class Slices:
        def __len__(self) -> int:
            return 2

        def signature(self) -> list[int]:
            return [1, 2, 3]

        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            return {
                "pyramid": {"embedding": torch.ones(1)},
                "label": torch.full((1, 2, 2), key[1], dtype=torch.uint8),
                "case": 0,
            }

    dataset = PaddedDataset(Slices())
    assert len(dataset) == 2
    assert dataset[3, 1]["label"].tolist() == [[[1, 1], [1, 1]]]
    assert dataset[3, None]["label"].tolist() == [[[-1, -1], [-1, -1]]]
    assert dataset[3, None]["label"].dtype == dataset[3, 1]["label"].dtype


@pytest.mark.parametrize(("slices", "ranks", "batch"), [(13, 2, 4), (13, 4, 4), (16, 2, 8), (9, 3, 6)])
def test_shares_of_the_ranks_put_together_are_the_batches_of_one(slices: int, ranks: int, batch: int) -> None:
    foreground = torch.ones(slices, dtype=torch.bool)
    samplers = [SliceSampler(foreground, 0.0, 5, ranks, rank) for rank in range(ranks)]
    whole = [index for _, index in SliceSampler(foreground, 0.0, 5)]
    shares = [[index for _, index in sampler] for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {-(-slices // ranks)}
    own = batch // ranks
    for start in range(0, -(-slices // batch)):
        parts = [share[start * own : (start + 1) * own] for share in shares]
        drawn = [index for column in zip(*parts, strict=True) for index in column if index is not None]
        assert drawn == whole[start * batch : (start + 1) * batch]


def test_validation_slices_are_dealt_out() -> None:
    seen = [index for rank in range(3) for index in RankSampler(range(8), 3, rank)]
    assert sorted(seen) == list(range(8))
    assert list(RankSampler(range(3))) == [0, 1, 2]
    with pytest.raises(UsageError, match="2 validation slices are too few for 3 processes; start 2 or fewer"):
        RankSampler(range(2), 3, 0)
