# SPDX-License-Identifier: Apache-2.0
"""What a training wrote to MLflow, read back through MLflow's own client."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from environments import environment, surroundings

from samda.io import packaged
from samda.training.handlers import scalars

READ = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri="sqlite:///" + sys.argv[1])
found = []
for experiment in client.search_experiments():
    for run in client.search_runs(experiment.experiment_id):
        curves = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        history = {name: [(metric.step, metric.value) for metric in curve] for name, curve in curves.items()}
        found.append({"experiment": experiment.name, "run": run.info.run_name, "status": run.info.status,
                      "params": run.data.params, "metrics": history})
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with MLflow."""
    return environment("mlflow")


def call(python: Path, *args: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [*map(str, (python, *args))], env=surroundings(), cwd=cwd, capture_output=True, encoding="utf-8", timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read(python: Path, database: Path) -> list[dict[str, Any]]:
    lines = call(python, "-c", READ, database).splitlines()
    return json.loads(next(line for line in lines if line.startswith("FOUND ")).removeprefix("FOUND "))


def test_the_run_holds_the_curve_and_the_settings(python: Path, dataset: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    train = ["-m", "samda", "train", "-d", dataset, "-o", model, "--task", "abdomen_ct", "--device", "cpu", "--quiet"]
    train += ["--set", "views=1", "--tracking", "mlflow"]
    call(python, *train, "--epochs", "2", "--seed", "3")
    (run,) = read(python, model / "mlruns.db")
    assert (run["experiment"], run["run"], run["status"]) == ("samda", str(model.resolve()), "FINISHED")
    assert run["params"]["seed"] == "3" and "liver" in run["params"]["task"]
    rows = json.loads((model / "history.json").read_text("utf-8"))["epochs"]
    assert {name: dict(steps) for name, steps in run["metrics"].items()} == {
        name: {row["epoch"]: pytest.approx(scalars(row)[name]) for row in rows if name in scalars(row)}
        for name in scalars(rows[-1])
    }
    assert not (model / "tensorboard").exists()

    call(python, *train, "--epochs", "3", "--seed", "3", "--resume")
    runs = read(python, model / "mlruns.db")
    assert sorted([step for step, _ in run["metrics"]["loss"]] for run in runs) == [[1, 2], [3]]


def test_monais_own_tracking_works_too(python: Path, dataset: Path, tmp_path: Path) -> None:
    config = packaged("bundles", "sam_segmentation", "configs", "train.json")
    task = packaged("configs", "tasks", "abdomen_ct.yaml")
    keys = ["--dataset_dir", dataset, "--output_dir", "model", "--task", task, "--epochs", "1", "--views", "1"]
    call(python, "-m", "monai.bundle", "run", "--config_file", config, *keys, "--tracking", "mlflow", cwd=tmp_path)
    runs = read(python, tmp_path / "model" / "mlruns.db")
    metrics = {name: steps for run in runs for name, steps in run["metrics"].items()}
    row = json.loads((tmp_path / "model" / "history.json").read_text("utf-8"))["epochs"][0]
    assert metrics["val_mean_dice"] == [[1, pytest.approx(row["mean_dice"])]]
    assert "train_loss" in metrics
