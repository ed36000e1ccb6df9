# SPDX-License-Identifier: Apache-2.0
"""What MONAI's model zoo asks of a bundle, checked as its own tests do, without a network.

`metadata.schema.json` beside this file stands in for the zoo's schema, which is published by address only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from safetensors.torch import load_file
from tiny_scans import TASK

from samda.io import packaged
from samda.models.folder import load_model
from samda.processes import leave
from samda.training import train

BUNDLE = packaged("bundles", "sam_segmentation")
ROOT = Path(__file__).parents[2]
SCHEMA = Path(__file__).with_name("metadata.schema.json")


def metadata(root: Path = BUNDLE) -> dict[str, Any]:
    return json.loads((root / "configs" / "metadata.json").read_text("utf-8"))


# ---------------------------------------------------------------------------------------------------------- metadata


def test_metadata_fit_the_schema(model: Path) -> None:
    for root in (BUNDLE, model):
        verify_metadata(str(root / "configs" / "metadata.json"), str(SCHEMA))


@pytest.mark.parametrize(
    "change",
    [
        {"changelog": None},
        {"numpy_version": ">=2"},
        {"required_packages_version": {"samda": "0.1.0", "timm": "latest"}},
        {"network_data_format": {"inputs": {}, "outputs": {}}},
        {"wrong": 1},
    ],
)
def test_the_schema_refuses_what_the_zoo_would(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(metadata() | change))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(str(tmp_path / "metadata.json"), str(SCHEMA))


def test_versions_are_those_that_are_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and line[0] != "#")
    found = metadata()
    stated = found["required_packages_version"] | {
        name: found[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"), ("numpy", "numpy"))
    }
    assert stated.pop("samda") == found["version"] == next(iter(found["changelog"]))
    assert {name: pins[name.lower()] for name in stated} == stated


def test_required_files_are_there(model: Path) -> None:
    for root in (BUNDLE, model):
        assert (root / "LICENSE").read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")
        assert (root / "configs" / "inference.json").is_file()
    assert (model / "models" / "model.pt").is_file()
    assert all(path.stat().st_size < 25e6 for path in BUNDLE.rglob("*") if path.is_file())
    assert not re.search(r"/(home|root|Users|mnt|work)/", "".join(p.read_text("utf-8") for p in BUNDLE.rglob("*.json")))


def test_the_readme_follows_the_template_of_the_zoo() -> None:
    text = (BUNDLE / "docs" / "README.md").read_text("utf-8")
    found = [line.strip("# *") for line in text.splitlines() if re.match(r"#+ \*\*", line)]
    assert found == [
        "Authors", "Tags", "Model Description", "Data", "Preprocessing", "Input", "Output", "Performance",
        "MONAI Bundle Commands", "System Configuration", "Limitations", "References", "License",
    ]  # fmt: skip
    for file in (BUNDLE / "configs").glob("*.json"):
        assert file.stem == "metadata" or f"configs/{file.name}" in text, file


def test_the_table_of_the_readme_states_the_defaults() -> None:
    config = json.loads((BUNDLE / "configs" / "train.json").read_text("utf-8"))
    text = (BUNDLE / "docs" / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.+?) \|", text, re.MULTILINE))
    for key in ("learning_rate", "batch_size", "seed", "augmentation", "memory_mb", "views", "crop"):
        assert float(rows[f"`{key}`"]) == float(config[key])


# ----------------------------------------------------------------------------------------------------------- network


def test_the_network_takes_and_gives_what_the_metadata_say(model: Path, keys: dict[str, Any]) -> None:
    """As the zoo calls it, but for the base weights, which it would fetch: three spatial entries, a stack of slices."""
    arguments = {"meta_file": str(model / "configs" / "metadata.json"), "bundle_root": str(model), "device": "cpu"}
    arguments |= {"config_file": str(model / "configs" / "inference.json"), "weights": keys["weights"]}
    verify_net_in_out("network_def", **arguments)
    verify_net_in_out("network_def", n=3, any=2, **arguments)
    channels = "_meta_::network_data_format::outputs::pred::num_channels"
    with pytest.raises(ValueError, match="output channel number `3` doesn't match: `4`"):
        verify_net_in_out("network_def", **arguments, **{channels: 4})


def test_monai_loads_the_trained_network_from_elsewhere(
    model: Path, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = monai.bundle.load(
        "model", bundle_dir=model.parent, net_override={"weights": keys["weights"]}, device="cpu"
    ).eval()
    network, _, _ = load_model(model, weights=keys["weights"])
    image = torch.rand(1, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(image), network(image))


# ----------------------------------------------------------------------------------------------------------- configs


def test_monai_finds_the_properties_of_an_adaptation(model: Path) -> None:
    """It has no engine of MONAI's, so the properties are those of the metadata."""
    job = ConfigWorkflow(
        str(model / "configs" / "adapt.json"), workflow_type=None, logging_file=False, bundle_root=str(model)
    )
    job.initialize()
    assert job.check_properties() == []
    assert job.version == metadata()["version"]


@pytest.fixture
def one_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells the only process of a group."""
    values = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    yield
    leave()


def test_the_overlay_for_several_gpus_is_complete_and_changes_nothing_for_one(
    one_of_one: None, datalist: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    files = [str(BUNDLE / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    job = ConfigWorkflow(
        files,
        workflow_type="train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(datalist),
        output_dir=str(tmp_path / "a"),
        task=TASK,
        device="cpu",
        **keys,
    )
    job.initialize()
    assert job.check_properties() == []
    job.run()
    job.finalize()
    assert not torch.distributed.is_initialized()
    train(datalist, tmp_path / "b", TASK, overrides=keys, device="cpu")
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
