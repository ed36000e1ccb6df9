# SPDX-License-Identifier: Apache-2.0
"""The MONAI bundle: its configs as MONAI checks and runs them."""

from __future__ import annotations

import json
import pydoc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from tiny_scans import AFFINE, TASK

from samda.errors import UsageError, cause_of
from samda.inference.postprocessing import keep_largest
from samda.io import packaged
from samda.training import train
from samda.version import __version__

BUNDLE = packaged("bundles", "sam_segmentation")
CONFIGS = sorted((BUNDLE / "configs").glob("*.json"))
JOBS = ("train", "inference", "evaluate")


def workflow(job: str, root: Path, **keys: Any) -> ConfigWorkflow:
    kind = "train" if job == "train" else "infer"
    config = root / "configs" / f"{job}.json"
    return ConfigWorkflow(str(config), workflow_type=kind, logging_file=False, bundle_root=str(root), **keys)


def run(job: str, root: Path, **keys: Any) -> ConfigWorkflow:
    job_ = workflow(job, root, **keys)
    job_.initialize()
    job_.run()
    job_.finalize()
    return job_


def test_the_model_folder_is_a_bundle(model: Path) -> None:
    for name in ("adapter.json", "adapter.safetensors", "LICENSE", "docs/README.md", "models/model.pt", "last.pt"):
        assert (model / name).is_file(), name
    assert sorted(path.name for path in (model / "configs").iterdir()) == sorted(
        path.name for path in (BUNDLE / "configs").iterdir()
    )
    metadata = json.loads((model / "configs" / "metadata.json").read_text("utf-8"))
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert (pred["num_channels"], pred["channel_def"]["2"]) == (3, "spleen")


@pytest.mark.parametrize("job", JOBS)
def test_monai_finds_all_properties(
    job: str, model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = keys | {"task": TASK} if job == "train" else {"weights": keys["weights"]}
    job_ = workflow(job, model, dataset_dir=str(datalist), output_dir="out", **extra)
    job_.initialize()
    assert job_.check_properties() == []
    assert isinstance(job_.network_def, torch.nn.Module)


def test_inference_from_elsewhere_writes_label_maps_on_the_scans_grid(
    model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("inference", model, dataset_dir=str(datalist.parent / "d.nii.gz"), output_dir="labels", weights=keys["weights"])
    image, labels = nib.load(datalist.parent / "d.nii.gz"), nib.load("labels/d.nii.gz")
    assert labels.shape == image.shape and labels.get_data_dtype() == np.uint8
    assert np.array_equal(labels.affine, image.affine) and np.allclose(labels.affine, AFFINE)
    assert set(np.unique(labels.get_fdata())) <= {0, 1, 2}


@pytest.mark.parametrize("kept", [True, ["liver"]])
def test_inference_keeps_the_largest_piece_where_asked(
    model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any], kept: Any
) -> None:
    settings = {"dataset_dir": str(datalist.parent / "d.nii.gz"), "weights": keys["weights"]}
    run("inference", model, output_dir=str(tmp_path / "plain"), **settings)
    run("inference", model, output_dir=str(tmp_path / "kept"), keep_largest=kept, **settings)
    plain, found = (np.asarray(nib.load(tmp_path / name / "d.nii.gz").dataobj) for name in ("plain", "kept"))
    assert plain.any(), "there is something to look at"
    assert np.array_equal(found, keep_largest(plain, [1, 2] if kept is True else [1]))


def test_evaluation_from_elsewhere_scores_the_section(
    model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = run("evaluate", model, dataset_dir=str(datalist), output_dir="scores", weights=keys["weights"])
    metrics = json.loads(Path("scores/metrics.json").read_text("utf-8"))
    assert list(metrics["cases"]) == ["d"] and metrics["failed"] == {}
    predicted = nib.load("scores/d.nii.gz").get_fdata()
    true = nib.load(datalist.parent / "d_label.nii.gz").get_fdata()
    for k, name in enumerate(("liver", "spleen"), start=1):
        overlap = ((predicted == k) & (true == k)).sum()
        dice = 2 * overlap / ((predicted == k).sum() + (true == k).sum())
        assert metrics["cases"]["d"][name]["dice"] == pytest.approx(dice)
    assert job.parser.get_parsed_content("task_def").classes == ("background", "liver", "spleen")


@pytest.mark.parametrize("job", ["inference", "evaluate"])
def test_a_bad_case_does_not_stop_the_good_ones(
    job: str, model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    cases = json.loads(datalist.read_text("utf-8"))["test"]
    cases = [{key: str(datalist.parent / value) for key, value in case.items() if key != "id"} for case in cases]
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    bad = cases[0] | {"id": "bad", "image": str(tmp_path / "bad.nii.gz")}
    (tmp_path / "list.json").write_text(json.dumps({"test": [bad, cases[0] | {"id": "good_0000"}]}))
    job_ = workflow(
        job,
        model,
        dataset_dir=str(tmp_path / "list.json"),
        output_dir=str(tmp_path / "out"),
        **{"weights": keys["weights"]},
    )
    job_.initialize()
    job_.run()
    with pytest.raises(Exception) as error:
        job_.finalize()
    assert str(cause_of(error.value)) == "1 of 2 cases failed: bad"
    assert nib.load(tmp_path / "out" / "good_0000.nii.gz").shape == nib.load(cases[0]["image"]).shape
    if job == "evaluate":
        assert list(json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))["cases"]) == ["good_0000"]
        assert "not scored: bad: " in capsys.readouterr().out


def test_a_section_without_labels_is_one_line(
    model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    scan = str(datalist.parent / "d.nii.gz")
    settings = {"output_dir": str(tmp_path / "out"), "weights": keys["weights"]}
    with pytest.raises(Exception) as error:
        run("evaluate", model, dataset_dir=scan, **settings)
    assert "the data set has no label in section 'test'" in str(cause_of(error.value))


@pytest.mark.parametrize("job", JOBS)
def test_unknown_overrides_are_refused_at_the_start(job: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as error:
        workflow(job, BUNDLE, dataset_dirr="x").initialize()
    known = cause_of(error.value)
    assert isinstance(known, UsageError)
    assert str(known) == "config key 'dataset_dirr' is unknown; did you mean 'dataset_dir'?"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"backbone": "vit_x"}, "unknown backbone 'vit_x'"),
        ({"fold": -1}, "'fold' must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "'learning_rate' must be above 0, got 0.0"),
        ({"weights": "no.pth"}, "there is no weights file no.pth"),
        ({"task": "nosuch"}, "there is no task file 'nosuch'"),
    ],
)
def test_wrong_settings_are_refused_at_the_start(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception) as error:  # the data set, which does not exist, is not asked for
        workflow("train", BUNDLE, dataset_dir="nowhere", **setting).initialize()
    assert words in str(cause_of(error.value))


def test_a_key_that_a_user_adds_to_an_own_copy_is_known(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "configs" / "train.json").read_text("utf-8"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text(json.dumps(config | {"mine": 3}))
    files = str(tmp_path / "configs" / "train.json"), str(BUNDLE / "configs" / "metadata.json")
    own = ConfigWorkflow(*files, logging_file=False, mine=4, weights=None)  # nobody published those of the test's own
    own.initialize()


def test_an_overlay_replaces_the_adapters_and_plus_adds_to_them(tmp_path: Path) -> None:
    config = str(BUNDLE / "configs" / "train.json")
    salt = str(packaged("configs", "adapters", "salt.yaml"))
    (tmp_path / "more.yaml").write_text("+adapters:\n  lora: {rank: 2}\n")
    assert list(ConfigParser.load_config_files([config, salt])["adapters"]) == ["salt"]
    assert list(ConfigParser.load_config_files([config, str(tmp_path / "more.yaml")])["adapters"]) == ["ssf", "lora"]


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"]
        for entry in value.values():
            yield from _targets(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _targets(entry)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_component_exists_under_its_full_path(path: Path) -> None:
    for target in _targets(json.loads(path.read_text("utf-8"))):
        if "." in target:
            assert target.startswith(("samda.", "monai.")) and pydoc.locate(target) is not None, target
        else:  # MONAI finds its own components by their bare names, and looks for one of these handlers by it
            assert target in ("SupervisedTrainer", "SupervisedEvaluator", "ValidationHandler", "LrScheduleHandler")


def test_there_are_six_json_files() -> None:
    expected = ["adapt", "evaluate", "inference", "metadata", "multi_gpu_train", "train"]
    assert [path.stem for path in CONFIGS] == expected


def test_the_metadata_has_what_monai_asks_for() -> None:
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text("utf-8"))
    mandatory = "version monai_version pytorch_version numpy_version required_packages_version task description authors"
    for key in (*mandatory.split(), "copyright", "network_data_format", "schema", "changelog", "name"):
        assert metadata[key], key
    assert metadata["required_packages_version"]["samda"] == metadata["version"] == __version__
    assert metadata["version"] in metadata["changelog"]
    assert [int(n) for n in metadata["monai_version"].split(".")] <= [
        int(n) for n in monai.__version__.split("+")[0].split(".")
    ]
    versions = [metadata[key] for key in ("monai_version", "pytorch_version", "numpy_version")]
    for version in (*versions, *metadata["required_packages_version"].values()):
        assert all(part.isdigit() for part in version.split(".")), f"{version} is no exact pin"
    for side, name in (("inputs", "image"), ("outputs", "pred")):
        tensor = metadata["network_data_format"][side][name]
        assert len(tensor["spatial_shape"]) == 3 and isinstance(tensor["num_channels"], int)
        assert {"type", "format", "dtype", "value_range"} <= set(tensor)  # the schema's own list
    assert "research use only" in metadata["intended_use"].lower()


def test_training_from_a_model_folder_works(model: Path, datalist: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    """The copied bundle trains as the packaged one does."""
    task = TASK | {"name": "again"}
    a = run("train", model, dataset_dir=str(datalist), output_dir=str(tmp_path / "a"), task=task, **keys)
    result = train(datalist, tmp_path / "b", task, "sam_da", overrides=keys)
    assert a.parser.get_parsed_content("record").best_score == result["mean_dice"]
    metadata = json.loads((tmp_path / "a" / "configs" / "metadata.json").read_text("utf-8"))
    assert metadata["name"].startswith("again")
