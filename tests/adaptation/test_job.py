# SPDX-License-Identifier: Apache-2.0
"""The whole job: a model folder, a folder of scans, the page, the scores, a site version, and the command lines."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from safetensors.torch import load_file

from samda.adaptation.job import run_adaptation
from samda.adaptation.page import look_first, mean_dice
from samda.adaptation.settings import AdaptationSettings
from samda.cli.main import main
from samda.errors import InputError, UsageError, cause_of
from samda.io import packaged
from samda.metrics import ClassScores
from samda.models.versions import active_version, describe_versions, list_versions, load_version
from tests.adaptation.conftest import ALWAYS

SETTINGS = {"method": "class_entropy", "lr": 0.02, "steps": 1, "views": 2, "slices": 2, "keep": "last", "guard": ALWAYS}
ADAPT = str(packaged("bundles", "sam_segmentation", "configs", "adapt.json"))
QUICK = ["--views", "2", "--slices", "2", "--steps", "1"]


@pytest.fixture
def job(model: Path, scans: Path, tmp_path: Path) -> Callable[..., dict]:
    def run(**options: object) -> dict:
        options = {"settings": SETTINGS} | options
        return run_adaptation(model, scans / "images", tmp_path / "out", **options)  # type: ignore[arg-type]

    return run


def links(page: str) -> list[str]:
    """What the page refers to: the value of every src and href."""
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Links().feed(page)
    return found


def test_page_and_scores(job: Callable, scans: Path, tmp_path: Path) -> None:
    result = job(labels=scans / "labels")
    assert result["counts"]["accepted"] == 4 and result["version"] == "source" and result["failed"] == {}
    truth = np.asarray(nib.load(scans / "labels" / "case2.nii.gz").dataobj)
    maps = [tmp_path / "out" / "details" / "case2" / "source.nii.gz", tmp_path / "out" / "case2.nii.gz"]
    for path, found in zip(maps, result["dice"]["case2"], strict=True):
        a = np.asarray(nib.load(path).dataobj)
        expected = np.mean(
            [2 * ((a == k) & (truth == k)).sum() / ((a == k).sum() + (truth == k).sum()) for k in (1, 2)]
        )
        assert found == pytest.approx(expected)
    page = Path(result["page"]).read_text("utf-8")
    assert "case0" not in page and "Dice with the given labels" in page and "Research use only" in page
    means = [np.mean([d[i] for d in result["dice"].values()]) for i in (0, 1)]
    (found,) = re.findall("<td>mean</td><td>(.*?)</td><td>(.*?)</td>", page)
    assert [float(text) for text in found] == pytest.approx(means, rel=1e-3)  # four digits
    worse = sum(b - a > 0.01 for b, a in result["dice"].values())
    assert f"{worse} of 4 cases lost more than 0.01" in page
    pictures = links(page)
    assert len(pictures) >= 3 * 4 and all(link.startswith("data:") for link in pictures)  # nothing outside the page


def test_a_label_that_does_not_fit_costs_only_its_score(job: Callable, scans: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "case0.nii.gz").write_bytes((scans / "labels" / "case0.nii.gz").read_bytes())
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), labels / "case1.nii.gz")
    result = job(labels=labels, settings={"steps": 0, "views": 1})
    assert list(result["dice"]) == ["case0"] and Path(result["page"]).exists()


def test_a_class_that_a_label_lacks_is_not_scored(job: Callable, scans: Path, tmp_path: Path) -> None:
    case = {part: str(scans / f"{part}s" / "case0.nii.gz") for part in ("image", "label")}
    data = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "training": [case]}
    found = []
    for lacking in ([], ["liver"], ["liver", "spleen"]):
        case["unlabeled"] = lacking
        (tmp_path / "data.json").write_text(json.dumps(data))
        found.append(job(labels=tmp_path / "data.json", settings={"steps": 0, "views": 1})["dice"]["case0"][0])
    assert found[0] != found[1] and math.isnan(found[2])


def test_page_without_labels_and_with_names(job: Callable) -> None:
    result = job(keep_names=True, dry_run=True)
    page = Path(result["page"]).read_text("utf-8")
    assert "case0" in page and "given labels" not in page and result["dice"] is None


def test_mean_dice_leaves_out_what_is_absent() -> None:
    def scores(*dice: float) -> list[ClassScores]:
        return [ClassScores("both", value, 0.0, 0.0, 0.0, 0.0, 0.0) for value in dice]

    nan = float("nan")
    assert mean_dice(scores(0.5, nan, 1.0)) == 0.75 and mean_dice(scores(0.7, nan, nan)) == 0.7
    assert math.isnan(mean_dice(scores(nan)))


def test_cases_to_look_at_first() -> None:
    def record(decision: str, reason: str, dice: float | None = None) -> dict:
        return {"decision": decision, "reason": reason, "dice_source_adapted": {} if dice is None else {"x": dice}}

    records = {
        "fine": record("skipped", "skipped_quality"),
        "small": record("accepted", "accepted", 0.95),
        "large": record("accepted", "accepted", 0.2),
        "back": record("fallback", "fallback_volume", 0.1),
        "blank": record("skipped", "skipped_empty"),
        "bad": record("failed", "failed_input"),
        "same": record("accepted", "accepted_unchanged"),
    }
    assert look_first(records) == ["bad", "blank", "large", "small", "back", "fine", "same"]


# ---------------------------------------------------------------------------------------------------------- site mode


def test_a_site_version_is_a_candidate_until_a_person_activates_it(
    job: Callable, model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(model / ".samda")  # as `cp -r model/* copy` leaves it out
    source = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()}
    about = job(site="clinic-a")["site"]
    assert job(site="clinic-a")["site"] == load_version(model, "clinic-a")[2]["version"], "as after a kill at the end"
    assert list_versions(model) == ["source", "clinic-a"] and active_version(model) == "source"
    assert {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()} == source
    details = tmp_path / "out" / "details"
    tensors = [load_file(details / f"case{i}" / "adapter.safetensors") for i in range(4)]
    version = load_file(model / "versions" / "clinic-a" / "adapter.safetensors")
    for name in tensors[0]:
        torch.testing.assert_close(version[name], torch.stack([t[name] for t in tensors]).mean(0))
    unmoved = set(version) - set(tensors[0])
    start = load_file(model / "adapter.safetensors")
    assert unmoved and all(torch.equal(version[name], start[name]) for name in unmoved)
    assert len(about["cases"]) == 4 and about["from_version"] == "source"
    assert load_version(model, "clinic-a")[2]["version"]["cases"] == about["cases"]

    predict = ["predict", "-m", str(model), "-i", str(scans / "images" / "case0.nii.gz"), "-o"]
    assert main([*predict, str(tmp_path / "p0")]) == 0
    assert "model version source" in capsys.readouterr().err
    assert main(["site", "activate", "clinic-a", "-m", str(model)]) == 2  # without a report of samda commission
    assert main(["site", "activate", "clinic-a", "-m", str(model), "--force"]) == 0
    assert main([*predict, str(tmp_path / "p1")]) == 0
    assert "model version clinic-a" in capsys.readouterr().err
    maps = [np.asarray(nib.load(tmp_path / p / "case0.nii.gz").dataobj) for p in ("p0", "p1")]
    assert not np.array_equal(*maps)
    assert main(["site", "list", "-m", str(model), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["versions"]
    assert [(r["name"], r["active"], r["cases"]) for r in rows] == [("source", False, None), ("clinic-a", True, 4)]
    assert main(["site", "rollback", "-m", str(model)]) == 0 and active_version(model) == "source"
    assert describe_versions(model, "source")[1]["created"] == about["created"]


def test_too_few_cases_do_not_speak_for_a_site(job: Callable, model: Path, scans: Path) -> None:
    with pytest.raises(InputError, match="0 of 4 cases were accepted with a change"):
        job(site="clinic-a", settings={"steps": 0})
    assert list_versions(model) == ["source"]


@pytest.mark.parametrize(("name", "words"), [("source", "cannot name a version"), ("../up", "cannot name a version")])
def test_bad_version_names_are_refused_before_any_work(job: Callable, tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        job(site=name)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- command lines


def test_command_line(model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["adapt", "-m", str(model), "-i", str(scans / "images"), "-o", str(tmp_path / "out"), *QUICK]
    assert main([*args, "--records", str(tmp_path / "run.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["counts"].values()) == 4 and len((tmp_path / "run.jsonl").read_text("utf-8").splitlines()) == 4
    assert main(args) == 0
    assert "report in" in capsys.readouterr().out


def test_command_line_refusals(model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["adapt", "-m", str(model), "-i", str(scans / "images"), "-o", str(tmp_path / "out")]
    for more, words in (
        (["--method", "tentt"], "did you mean 'tent'"),
        (["--scope", "norm"], "it has: gate, decoder"),
        (["--set", "gaurd=1"], "did you mean 'guard'"),
        (["--site", "x", "--dry-run"], "leave out --dry-run"),
    ):
        assert main([*args, *more]) in (1, 2)
        assert words in capsys.readouterr().err
    assert main(["site", "activate", "-m", str(model)]) == 2
    assert main(["site", "activate", "nowhere", "-m", str(model)]) == 2
    assert main(["site", "rollback", "-m", str(model)]) == 2


def test_failed_cases_give_exit_code_one(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.full((8, 8, 4), np.nan, np.float32), np.eye(4)), folder / "bad.nii.gz")
    assert main(["adapt", "-m", str(model), "-i", str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 1
    assert "1 of 1 cases failed: bad" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()


def test_bundle_config(model: Path, scans: Path, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        ADAPT,
        workflow_type=None,
        logging_file=False,
        model_dir=str(model),
        dataset_dir=str(scans / "images"),
        output_dir=str(tmp_path / "out"),
        steps=1,
        views=2,
        slices=2,
        device="cpu",
    )
    workflow.initialize()
    workflow.run()
    assert len((tmp_path / "out" / "run.jsonl").read_text("utf-8").splitlines()) == 4


def test_bundle_config_refuses_unknown_keys(model: Path) -> None:
    workflow = ConfigWorkflow(ADAPT, workflow_type=None, logging_file=False, stepz=3)
    with pytest.raises(Exception) as error:
        workflow.initialize()
    assert "'stepz' is unknown; did you mean 'steps'" in str(cause_of(error.value))


def test_bundle_config_has_every_setting() -> None:
    config = ConfigParser.load_config_file(ADAPT)
    assert config["settings"] == {key: f"@{key}" for key in config["settings"]}
    defaults = {field.name: field.default for field in dataclasses.fields(AdaptationSettings)}
    assert {key: config[key] for key in config["settings"]} == defaults | {"families": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "tnet"}, "'tnet'.*'tent'"),
        ({"scope": "decoder+x"}, "'x'.*decoder, encoder, gate, intensity, norm, ssf"),
        ({"steps": -1}, "steps.*-1"),
        ({"steps": "$2 * 3", "lr": "x"}, r"\(lr\).*'x'"),
        ({"families": ["gama"]}, "'gama'.*'gamma'"),
        ({"guard": {"tolerance": "x"}}, "guard.*tolerance.*'x'"),
        ({"settings::keep": "first"}, "keep.*'first'"),
        ({"seed": -1}, "'seed'.*-1"),
    ],
)
def test_bundle_config_refuses_wrong_settings_before_the_run(change: dict, words: str) -> None:
    workflow = ConfigWorkflow(ADAPT, workflow_type=None, logging_file=False, **change)
    with pytest.raises(Exception) as error:
        workflow.initialize()
    cause = cause_of(error.value)
    assert isinstance(cause, UsageError) and re.search(words, str(cause))
