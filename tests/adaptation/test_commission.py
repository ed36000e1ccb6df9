# SPDX-License-Identifier: Apache-2.0
"""Commissioning of a calibrated tiny model on five labeled scans, and what `samda predict` makes of the report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy.special import expit, logit

from samda.adaptation.commission import bootstrap, commission, recalibration
from samda.adaptation.engine import Adaptation
from samda.adaptation.loop import load as load_parameters
from samda.adaptation.loop import restoring
from samda.adaptation.record import schema
from samda.cli.main import main
from samda.errors import InputError
from samda.expected_dice import Calibration
from samda.inference.evaluate import evaluate
from samda.inference.writer import read_site_report
from samda.io import packaged
from samda.model import load
from samda.models.versions import COMMISSION
from samda.quality import FEATURES, QualityMeter
from tests.adaptation.conftest import ALWAYS, save, scan

CALIBRATION = Calibration(
    mean=[2.0] * len(FEATURES),
    std=[1.0] * len(FEATURES),
    weights=[0.3] * len(FEATURES),
    bias=1.5,
    class_bias={},
    heights=[0.5],
    low=[-0.2],
    high=[0.1],
    margin=0.05,
    usual=0.58,
    about={"from": "a test"},
)


@pytest.fixture
def calibrated(model: Path) -> Path:
    """The model folder with a calibration."""
    path = model / "adapter.json"
    values = json.loads(path.read_text("utf-8"))
    values["record"]["calibration"] = CALIBRATION.to_dict()
    path.write_text(json.dumps(values))
    return model


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labeled scans, the last one nearly all noise."""
    folder = tmp_path_factory.mktemp("local")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for seed in range(5):
        image, labels = scan(seed)
        noise = np.random.default_rng(seed).normal(0, 400, image.shape) if seed == 4 else 0
        save(folder / "images" / f"case{seed}.nii.gz", (image + noise).astype(np.float32))
        save(folder / "labels" / f"case{seed}.nii.gz", labels)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_and_flags(calibrated: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report, out = tmp_path / "report", tmp_path / "out"
    assert main(["commission", "-m", str(calibrated), "-d", str(local), "-o", str(report), "--keep-names"]) == 0
    content: dict[str, Any] = json.loads((report / "commission.json").read_text("utf-8"))
    assert main(["predict", "-m", str(calibrated), "-i", str(local / "images"), "-o", str(out)]) == 0
    plain = evaluate(out, local / "labels", load(calibrated).task)
    for k, name in enumerate(plain.classes):
        dice = [scores[k].dice for scores in plain.cases.values()]
        assert content["scores"]["plain"][name]["dice"]["mean"] == pytest.approx(np.nanmean(dice))
        for case, scores in plain.cases.items():
            assert content["cases"][case]["plain"][name]["dice"] == pytest.approx(scores[k].dice)
    page = (report / "commission.html").read_text("utf-8")
    assert "Predicted Dice" in page and "Outlier" in page and "case4" in page

    # the table: the lowest first; its numbers are those of the case's own file
    rows = rows_of(out / "predictions.csv")
    first = rows[0]["case"]  # which one it is may hang on rounding
    assert len(rows) == 10
    stored = json.loads((out / f"{first}.json").read_text("utf-8"))["quality"]["dice"]
    assert {row["class"]: float(row["dice"]) for row in rows[:2]} == pytest.approx(
        {name: one["dice"] for name, one in stored.items()}, abs=1e-3
    )
    means = [np.mean([float(r["dice"]) for r in rows if r["case"] == c and r["flags"] != "not predicted"] or [0.0])
             for c in dict.fromkeys(row["case"] for row in rows)]  # fmt: skip
    assert means == sorted(means)

    # a stricter site flags every class, and the table can be made again of what is finished
    for name in plain.classes:
        content["accepted"]["classes"][name] = 1.1
    content["recalibration"]["shift"] = -1.0
    site = tmp_path / "site.json"
    site.write_text(json.dumps(content))
    again = ["predict", "-m", str(calibrated), "-i", str(local / "images"), "-o", str(out), "--continue"]
    assert main([*again, "--site-report", str(site)]) == 0
    moved = {(row["case"], row["class"]): row for row in rows_of(out / "predictions.csv")}
    for row in rows:
        found = moved[row["case"], row["class"]]
        if row["flags"] != "not predicted":
            assert "below the site's accepted 1.100" in found["flags"]
            assert float(found["dice"]) == pytest.approx(expit(logit(float(row["dice"])) - 1.0), abs=2e-3)
    for change, words in (
        ({"adapter_sha256": "0" * 64}, "the site report is of another model"),
        ({"recalibration": {"shift": float("nan")}}, "nan is no number"),
        ({"recalibration": {"shift": 10**400}}, "is no number"),
        ({"recalibration": {"shift": 9.0}}, "a shift of 9, at most 4"),
        ({"commission_version": 9}, "has version 9"),
    ):
        site.write_text(json.dumps(content | change))
        assert main([*again, "--site-report", str(site)]) == 1
        assert words in capsys.readouterr().err
    site.write_text("{}")
    assert main([*again, "--site-report", str(site)]) == 1
    assert "site.json is no report of samda commission" in capsys.readouterr().err


def test_copies_of_a_scan_count_once(calibrated: Path, local: Path, tmp_path: Path, caplog: Any) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for k in range(5):
            shutil.copy(local / kind / "case0.nii.gz", tmp_path / kind / f"copy{k}.nii.gz")
    with pytest.raises(InputError, match="1 of 5 cases could be scored; at least 5"):
        commission(calibrated, tmp_path, tmp_path / "report")
    assert "case copy1 is the scan of case copy0 again" in caplog.text


def test_the_rise_of_the_predicted_dice_chooses_the_iterate(calibrated: Path, local: Path) -> None:
    model = load(calibrated)
    engine = Adaptation(model.network, model.task, model.record, steps=2, lr=0.02, guard=ALWAYS)
    engine.inferer.amp = "off"  # as below
    case = engine.prepare(local / "images" / "case0.nii.gz")
    run = engine.optimize(case)
    values = []
    for tensors in ({}, run.last):
        with restoring(engine.network, engine.parameters), torch.no_grad():
            load_parameters(engine.parameters, tensors)
            meter = QualityMeter(engine.network, engine.task, model.record["statistics"])
            for image in case.images:  # encoded anew, one by one
                meter(image[None])
            values.append(CALIBRATION.expected(meter.features()).dice)
    shown = [name for name in values[0] if values[0][name].predicted or values[1][name].predicted]
    gain = np.mean([values[1][name].dice - values[0][name].dice for name in shown])
    assert run.merit[0] == 0 and run.merit[-1] == pytest.approx(gain, abs=1e-4)
    assert run.merit[-1] != 0


@pytest.mark.parametrize("usual", [0.5, 0.999])
def test_views_are_encoded_only_where_the_predicted_dice_leaves_room(
    calibrated: Path, local: Path, usual: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`usual` is the predicted Dice from which a scan is left as it is."""
    model = load(calibrated)
    record = model.record | {"calibration": CALIBRATION.to_dict() | {"usual": usual}}
    engine = Adaptation(model.network, model.task, record, views=3, slices=2, steps=1)
    encoded: list[int] = []
    encode = model.network.encode
    monkeypatch.setattr(model.network, "encode", lambda images: encoded.append(len(images)) or encode(images))
    found = engine.adapt(local / "images" / "case0.nii.gz").record
    slices = nib.load(local / "images" / "case0.nii.gz").shape[2]
    good = found["reason"] == "skipped_quality"
    searched = (5, 5 + 2, 5 + 4)  # changes of the gray values of 2 slices: a first round, and a second if one helps
    assert good == (usual == 0.5)
    assert sum(encoded) in ([slices] if good else [slices + 2 * (n + 3) for n in searched])
    assert ("views" in found["seconds"]) != good and (found["quality"]["source"]["agreement"] is None) == good
    assert jsonschema.validate(found, schema()) is None


def test_without_a_calibration_no_dice_is_predicted(model: Path, local: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["predict", "-m", str(model), "-i", str(local / "images" / "case0.nii.gz"), "-o", str(out)]) == 0
    assert not (out / "predictions.csv").exists()
    assert "no calibration" in capsys.readouterr().err
    assert load(model).predict(local / "images" / "case0.nii.gz").expected_dice == {}


def test_a_class_that_a_label_lacks_is_not_scored(model: Path, local: Path, tmp_path: Path) -> None:
    cases = [{part: str(local / f"{part}s" / f"case{i}.nii.gz") for part in ("image", "label")} for i in range(5)]
    data = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "training": cases}
    cases[0]["unlabeled"] = ["liver"]
    (tmp_path / "data.json").write_text(json.dumps(data))
    settings = {"steps": 0, "views": 1, "slices": 1}
    report = commission(model, tmp_path / "data.json", tmp_path / "report", keep_names=True, settings=settings)
    assert [report["scores"]["plain"][name]["dice"]["n"] for name in ("liver", "spleen")] == [4, 5]
    assert np.isnan(report["cases"]["case0"]["plain"]["liver"]["dice"])


def test_the_expected_dice_of_one_scan(calibrated: Path, local: Path) -> None:
    model = load(calibrated)
    prediction = model.predict(local / "images" / "case0.nii.gz")
    assert set(prediction.expected_dice) == {"liver", "spleen"}
    for one in prediction.expected_dice.values():
        assert one.low == pytest.approx(max(0.0, one.dice - 0.2)) and one.high == pytest.approx(
            min(1.0, one.dice + 0.1)
        )
    adapted = model.adapt(local / "images" / "case0.nii.gz", views=3, slices=3, steps=1)
    source = adapted.record["quality"]["source"]["expected"]["dice"]
    assert {name: one["dice"] for name, one in source.items()} == pytest.approx(
        {name: one.dice for name, one in prediction.expected_dice.items()}, abs=2e-3
    )


def test_the_bundle_predicts_the_dice_of_the_command(calibrated: Path, local: Path, tmp_path: Path) -> None:
    assert main(["predict", "-m", str(calibrated), "-i", str(local / "images"), "-o", str(tmp_path / "command")]) == 0
    config = ConfigParser()
    config.read_config(packaged("bundles", "sam_segmentation", "configs", "inference.json"))
    places = {"model_dir": calibrated, "dataset_dir": local / "images", "output_dir": tmp_path / "bundle"}
    config.update({key: str(path) for key, path in places.items()} | {"device": "cpu"})
    config.get_parsed_content("evaluator").run()
    tables = [rows_of(tmp_path / which / "predictions.csv") for which in ("command", "bundle")]
    assert [(row["case"], row["class"]) for row in tables[0]] == [(row["case"], row["class"]) for row in tables[1]]
    for before, after in zip(*tables, strict=True):  # the command merges adapters into the weights
        assert float(before["dice"]) == pytest.approx(float(after["dice"]), abs=2e-3)
    facts = json.loads((tmp_path / "bundle" / "case0.json").read_text("utf-8"))
    (row,) = (row for row in tables[1] if row["case"] == "case0" and row["class"] == "liver")
    assert facts["quality"]["dice"]["liver"]["dice"] == pytest.approx(float(row["dice"]), abs=1e-3)


def test_few_cases_are_refused(calibrated: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["commission", "-m", str(calibrated), "-d", str(scans), "-o", str(tmp_path / "r")]) == 1
    assert "needs at least 5" in capsys.readouterr().err
    assert not (calibrated / COMMISSION).exists()


def test_intervals_and_recalibration() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, 400)
    found = bootstrap([*values, float("nan")])
    error = 1.96 * values.std() / 20
    assert found["n"] == 400 and found["mean"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - error, values.mean() + error), abs=2e-3)
    predicted = np.linspace(0.2, 0.9, 50)
    assert recalibration(predicted, expit(logit(predicted) - 0.7)) == pytest.approx(-0.7, abs=1e-3)
    assert recalibration(predicted, np.zeros(50)) == -4.0


def test_a_foreign_file_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report of samda commission"):
        read_site_report(tmp_path / "missing.json")
