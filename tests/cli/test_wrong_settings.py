# SPDX-License-Identifier: Apache-2.0
"""What can be known as wrong without a scan or a model is refused before either is read, and before a word is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from samda.cli import main as cli


@pytest.mark.parametrize(
    ("command", "options", "code", "words"),
    [
        ("train", ["--task", "abdomen"], 2, "did you mean 'abdomen_"),
        ("train", ["--task", ""], 2, "task '' is neither a YAML or JSON file"),
        ("train", ["--task", "TASK", "--adapter", "salr"], 2, "no adapter overlay 'salr'; did you mean 'salt'?"),
        ("train", ["--task", "TASK", "--backbone", "vit_x"], 2, "unknown backbone 'vit_x'; did you mean 'vit_t'?"),
        ("train", ["--task", "TASK", "--fold", "-1"], 2, "'fold' must be at least 0, got -1"),
        ("train", ["--task", "TASK", "--learning-rate", "-1"], 2, "'learning_rate' must be above 0, got -1.0"),
        ("train", ["--task", "TASK", "--weights", "no.pth"], 1, "there is no weights file no.pth"),
        ("train", ["--task", "TASK", "--set", "epoch=3"], 2, "did you mean 'epochs'?"),
        ("train", ["--task", "TASK", "--set", "batch_size=0"], 2, "at least 1, got 0"),
        ("train", ["--set", "image_size=17"], 2, "image_size must be a multiple of 16 from 16 to 4096, got 17"),
        ("train", ["--set", "task=abdomen_tc"], 2, "there is no task file 'abdomen_tc'; did you mean 'abdomen_ct'?"),
        ("train", ["--task", "TASK", "--set", "task::spacing=3"], 2, "'task::spacing' has no place in the config"),
        ("train", ["--task", "TASK", "--set", "epochs::x=3"], 2, "'epochs::x' has no place in the config"),
        ("train", ["--task", "TASK", "--set", "tensorboard=false"], 2, "give tracking='none' (--tracking none)"),
        ("train", ["--task", "TASK", "--tracking", "none,mlflow"], 2, "'none' stands alone, got 'none,mlflow'"),
        ("train", ["--task", "TASK", "--adapter", "full,salt"], 1, "'full' trains the base weights that 'salt' builds"),
        ("train", ["--task", "TASK", "--set", "adapters={my: {type: [lka]}}"], 2, "there is no adapter ['lka']"),
        ("train", ["--task", "TASK", "--set", "train::loss=5"], 2, "'train::loss' must be a mapping with _target_"),
        ("train", ["--task", "TASK", "--set", "record=5"], 2, "'record' must be a mapping with _target_, got 5"),
        ("train", ["--task", "TASK", "--set", "warmup=1"], 2, "'warmup' must be at least 0 and below 1, got 1"),
        ("train", ["--task", "TASK", "--report", "out"], 2, "--report out"),
        ("adapt", ["--method", "tnet"], 2, "unknown method 'tnet'; did you mean 'tent'?"),
        ("adapt", ["--scope", "decodr"], 2, "there is no scope 'decodr'; did you mean 'decoder'?"),
        (
            "adapt",
            ["--scope", "gate+encoder+x"],
            2,
            "there is no scope 'x'; choose from decoder, encoder, gate, intensity, norm, ssf",
        ),
        ("adapt", ["--steps", "-1"], 2, "steps must be at least 0 and whole, got -1"),
        ("adapt", ["--learning-rate", "0"], 2, "the learning rate (lr) must be positive, got 0.0"),
        ("adapt", ["--set", "guard={tolerence: 1}"], 2, "guard: unknown key 'tolerence'; did you mean 'tolerance'?"),
        ("adapt", ["--set", "guard=5"], 2, "guard: settings must be a mapping"),
        ("adapt", ["--set", "objective=x"], 2, "must be a mapping, got 'x'"),
        ("adapt", ["--set", "families=[gama]"], 2, "unknown view family 'gama'; did you mean 'gamma'?"),
        ("adapt", ["--set", "families=g"], 2, "unknown view family 'g'; choose from bias, blur, gamma, noise, window"),
        ("adapt", ["--set", "families=5"], 2, "families must be a list of window, gamma, noise, blur, bias, got 5"),
        ("adapt", ["--set", "families=[5]"], 2, "families must be a list of window, gamma, noise, blur, bias, got [5]"),
        ("adapt", ["--set", "families={gamma: 1}"], 2, "families must be a list of window, gamma, noise, blur, bias"),
        ("adapt", ["--set", "strength=-1"], 2, "strength must be a number from 0 to 10, got -1"),
        ("adapt", ["--set", "strength=.nan"], 2, "strength must be a number from 0 to 10, got nan"),
        ("adapt", ["--set", "strength=.inf"], 2, "strength must be a number from 0 to 10, got inf"),
        ("adapt", ["--set", "strength=high"], 2, "strength must be a number from 0 to 10, got 'high'"),
        ("adapt", ["--set", "strength=true"], 2, "strength must be a number from 0 to 10, got True"),
        ("adapt", ["--set", "memory_mb=-1"], 2, "memory_mb must be a number at least 0, got -1"),
        ("adapt", ["--set", "memory_mb=much"], 2, "memory_mb must be a number at least 0, got 'much'"),
        ("adapt", ["--set", "memory_mb=.inf"], 2, "memory_mb must be a number at least 0, got inf"),
        ("adapt", ["--set", "flips=1"], 2, "flips must be true or false, got 1"),
        ("adapt", ["--set", "batch_size=true"], 2, "batch_size must be at least 1 and whole, got True"),
        ("adapt", ["--set", "time_limit_s=true"], 2, "time_limit_s must be positive, got True"),
        ("adapt", ["--seed", "-1"], 2, "seed must be at least 0 and whole, got -1"),
        ("adapt", ["--set", "guard=0"], 2, "guard: settings must be a mapping, got 0"),
        ("adapt", ["--set", "guard={tolerance: .nan}"], 2, "guard: tolerance must be a finite number, got nan"),
        ("adapt", ["--set", "guard={volume_factor: x}"], 2, "guard: volume_factor must be a finite number, got 'x'"),
        ("adapt", ["--set", "objective={align: x}"], 2, "'default': align must be a finite number, got 'x'"),
        ("adapt", ["--set", "objective={align: null}"], 2, "align must be a finite number, got None; the default is 1"),
        ("adapt", ["--set", "objective={align: .nan}"], 2, "align must be a finite number, got nan"),
        ("adapt", ["--set", "objective={align: -1}"], 2, "method 'default': align must not be negative, got -1"),
        ("adapt", ["--set", "objective={steps: 1.5}"], 2, "steps must be at least 0 and whole, got 1.5"),
        ("adapt", ["--method", "anchored"], 2, "method 'anchored' was removed after samda 0.1; choose from none, tent"),
        ("adapt", ["--set", "objective={align: -1}"], 2, "align must not be negative, got -1"),
        ("adapt", ["--method", "sam_da", "--set", "objective={keep: 2}"], 2, "above 0 and at most 1, got 2"),
        ("adapt", ["--method", "sam_da", "--set", "objective={keep: x}"], 2, "keep must be a finite number, got 'x'"),
        ("adapt", ["--method", "sam_da", "--set", "objective={keep: 0}"], 2, "'sam_da': keep must be above 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(
    command: str,
    options: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TASK.yaml").write_text(yaml.safe_dump({"classes": ["background", "ball"]}))
    (tmp_path / "empty").mkdir()  # neither a data set nor a model: whoever reads it says so
    args = {"train": ["-d", "empty", "-o", "out"], "adapt": ["-m", "empty", "-i", "empty", "-o", "out"]}[command]
    found = cli.main([command, *args, *(option.replace("TASK", "TASK.yaml") for option in options)])
    out, err = capsys.readouterr()
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert err.startswith(f"samda {command}: ") and words in err
    assert not (tmp_path / "out").exists()
