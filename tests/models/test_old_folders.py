# SPDX-License-Identifier: Apache-2.0
"""Model folders that samda 0.1.0 wrote go on loading, predicting, and running as MONAI bundles.

`written_by_0_1_0/README.md` says how they were made. Each has its answers beside it, NAME.safetensors: what
:func:`logits` gave in double precision, and the label map that `samda predict` wrote for the scan "b" of
:func:`write_scan`.
"""

from __future__ import annotations

import ast
import inspect
import json
import pydoc
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ComponentLocator, ConfigWorkflow
from safetensors.torch import load_file, save_file

import samda
from samda.cli import main as cli
from samda.networks.segmenter import BASE_RESPONSE

HERE = Path(__file__).parent / "written_by_0_1_0"
BACKBONES = {"plain": "tiny_vit", "flagship": "vit", "adapted": "tiny_vit"}  # folder -> encoder of its base
VERSIONS = [("plain", "source"), ("flagship", "source"), ("adapted", "source"), ("adapted", "clinic-a")]
CONFIGS = sorted(HERE.glob("*/configs/*.json"))
DIFFERENCE = 1e-4  # of the largest logit; single precision was 5e-7 from double where the folders were written
SHAPE = (40, 36, 8)  # voxels of the scans
NEAR_TIES = 0.001  # share of the voxels that another order of summation may decide differently


def load(folder: Path, weights: Path | None, version: str | None = None) -> torch.nn.Module:
    """The network of a version, None for the active one. Only this function names what loads a model."""
    if version == "source":
        return samda.load_model(folder, weights)[0]
    from samda.models.versions import load_version

    return load_version(folder, version, weights)[0]


def logits(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the network answers for a fixed slice (1, 1, 32, 48) in [0, 1], every other pixel."""
    y = torch.linspace(0, 1, 32, dtype=torch.float64)[:, None]
    x = torch.linspace(0, 1, 48, dtype=torch.float64)
    image = 0.5 + 0.3 * torch.sin(9 * y + 5 * x) + 0.2 * torch.cos(17 * x * y)
    with torch.no_grad():
        return network.to(dtype)(image.to(dtype)[None, None])[..., ::2, ::2]


def check_logits(found: torch.Tensor, name: str, version: str) -> None:
    answer, _ = expected(name, version)
    assert found.shape == answer.shape == (1, 3, 16, 24)
    assert (found - answer).abs().max() <= DIFFERENCE * answer.abs().max()


def write_scan(folder: Path, name: str, shift: int) -> dict[str, str]:
    """A body with two blocks, in whole numbers; the entry of a datalist."""
    x, y, z = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    labels[6 + shift : 18 + shift, 10 : 24 - shift, 1:-1] = 1
    labels[24 + shift : 34, 8 + shift : 22, 2:-1] = 2
    inside = (x >= 3) & (x < 37) & (y >= 3) & (y < 33)
    values = np.where(inside, -50, -900) + 120 * (labels == 1) + 260 * (labels == 2) + (7 * x + 13 * y + 29 * z) % 11
    affine = np.diag([4.2, 3.9, 5.0, 1.0])
    nib.Nifti1Image(values.astype(np.int16), affine).to_filename(folder / f"{name}.nii.gz")
    nib.Nifti1Image(labels, affine).to_filename(folder / f"{name}_label.nii.gz")
    return {"id": name, "image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz"}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datalist of the four scans; the expected label maps are of "b", its test case."""
    folder = tmp_path_factory.mktemp("scans")
    cases = [write_scan(folder, name, shift) for shift, name in enumerate("abcd")]
    sections = {"training": [cases[0], cases[3]], "validation": cases[2:3], "test": cases[1:2]}
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder -> file with its base weights, put together from the encoder and what both have in common."""
    folder = tmp_path_factory.mktemp("bases")
    common = load_file(HERE / "base" / "decoder.safetensors")
    for encoder in set(BACKBONES.values()):
        whole = common | load_file(HERE / "base" / f"{encoder}.safetensors")
        save_file(whole, folder / f"old_{encoder}.safetensors")
    return {name: folder / f"old_{encoder}.safetensors" for name, encoder in BACKBONES.items()}


def expected(name: str, version: str) -> tuple[torch.Tensor, np.ndarray]:
    """Logits and label map."""
    answers = load_file(HERE / f"{name}.safetensors")
    return answers[f"logits.{version}"], answers[f"labels.{version}"].numpy()


def check_labels(path: Path, name: str, version: str) -> None:
    _, labels = expected(name, version)
    found = np.asarray(nib.load(path).dataobj)
    assert found.shape == labels.shape == SHAPE and np.any(labels)
    assert np.mean(found != labels) <= NEAR_TIES


def run_bundle(name: str, job: str, **keys: Any) -> ConfigWorkflow:
    """What `python -m monai.bundle run --config_file MODEL/configs/JOB.json --bundle_root MODEL ...` does."""
    workflow = bundle(name, job, **keys)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def bundle(name: str, job: str, **keys: Any) -> ConfigWorkflow:
    kind = {"train": "train", "adapt": None}.get(job, "infer")
    config = str(HERE / name / "configs" / f"{job}.json")
    keys |= {"bundle_root": str(HERE / name), "device": "cpu"}
    return ConfigWorkflow(config, workflow_type=kind, logging_file=False, **keys)


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_logits(name: str, version: str, dtype: torch.dtype, bases: dict[str, Path]) -> None:
    check_logits(logits(load(HERE / name, bases[name], version), dtype), name, version)


def test_the_active_version_answers_with_a_base_in_the_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(HERE / "adapted", model)
    shutil.copyfile(bases["adapted"], model / "base.safetensors")
    found = logits(load(model, None))
    check_logits(found, "adapted", "clinic-a")
    source, _ = expected("adapted", "source")
    assert (found - source).abs().max() > 100 * DIFFERENCE * source.abs().max()


@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_predict(name: str, version: str, bases: dict[str, Path], scans: Path, tmp_path: Path) -> None:
    args = ["predict", "-m", HERE / name, "-i", scans / "b.nii.gz", "-o", tmp_path, "--weights", bases[name]]
    chosen = ["--version", version] if version == "source" else []  # the other one is active
    assert cli.main([*map(str, args), *chosen, "--device", "cpu", "--amp", "off", "--quiet"]) == 0
    check_labels(tmp_path / "b.nii.gz", name, version)


def test_info_and_versions(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["site", "list", "-m", str(HERE / "adapted"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["versions"]
    assert [(row["name"], row["active"], row["cases"]) for row in rows] == [
        ("source", False, None),
        ("clinic-a", True, 3),
    ]
    assert cli.main(["info", "-m", str(HERE / "flagship"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["adapters"]) == ["salt", "dka", "sam_da"]
    assert facts["task"]["classes"] == ["background", "liver", "spleen"]


# ------------------------------------------------------------------------------------------------------------ bundles


def parts(config: Any) -> Iterator[Any]:
    """Every mapping and every plain value in a config."""
    if isinstance(config, list):
        for entry in config:
            yield from parts(entry)
        return
    yield config
    if isinstance(config, dict):
        yield from parts(list(config.values()))


def names_in(expression: str) -> Iterator[str]:
    """The dotted names in a `$` expression of MONAI that begin with a module, and what it imports."""
    tree = ast.parse(re.sub(r"@[\w:]+", "reference", expression))
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            if re.fullmatch(r"(samda|monai|torch)(\.\w+)+", name):
                yield name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "-".join(path.relative_to(HERE).with_suffix("").parts[::2]))
def test_every_name_in_a_config_is_found(path: Path) -> None:
    found = 0
    for part in parts(json.loads(path.read_text("utf-8"))):
        if isinstance(part, dict) and "_target_" in part:
            found += 1
            target = part["_target_"]
            if "." not in target:  # MONAI looks for its own components by their bare names
                assert ComponentLocator().get_component_module_name(target), target
                continue
            component: Any = pydoc.locate(target)
            assert callable(component), target
            inspect.signature(component).bind_partial(**{key: 0 for key in part if not key.startswith("_")})
        elif isinstance(part, str) and part.startswith("$"):
            for name in names_in(part[1:]):
                assert pydoc.locate(name) is not None, name
    assert found or path.stem == "metadata"


@pytest.mark.parametrize("name", BACKBONES)
def test_inference_by_monai(name: str, bases: dict[str, Path], scans: Path, tmp_path: Path) -> None:
    keys = {"dataset_dir": str(scans / "b.nii.gz"), "output_dir": str(tmp_path), "weights": str(bases[name])}
    run_bundle(name, "inference", **keys)
    check_labels(tmp_path / "b.nii.gz", name, "source")


@pytest.mark.parametrize("name", BACKBONES)
def test_configs_of_training_and_adaptation_build(name: str, bases: dict[str, Path], scans: Path) -> None:
    keys = {"dataset_dir": str(scans / "datalist.json"), "weights": str(bases[name])}
    adapt = bundle(name, "adapt", **keys)
    adapt.initialize()
    assert adapt.check_properties() == []
    train = bundle(name, "train", **keys)
    network = train.parser.get_parsed_content("network_def")
    assert set(network.state_dict()) - {BASE_RESPONSE} == set(load_file(HERE / name / "adapter.safetensors"))


def test_training_evaluation_and_adaptation_by_monai(bases: dict[str, Path], scans: Path, tmp_path: Path) -> None:
    """Each job runs, so what the configs ask of the objects they build is there, too."""
    keys = {"dataset_dir": str(scans / "datalist.json"), "weights": str(bases["plain"])}
    run_bundle("plain", "evaluate", output_dir=str(tmp_path / "scores"), **keys)
    assert list(json.loads((tmp_path / "scores" / "metrics.json").read_text("utf-8"))["cases"]) == ["b"]
    check_labels(tmp_path / "scores" / "b.nii.gz", "plain", "source")
    small = {"views": 2, "slices": 2, "steps": 1}
    run_bundle("plain", "adapt", output_dir=str(tmp_path / "adapted"), **keys, **small)
    assert nib.load(tmp_path / "adapted" / "b.nii.gz").shape == SHAPE
    run_bundle("plain", "train", output_dir=str(tmp_path / "again"), epochs=1, views=1, tensorboard=False, **keys)
    old, new = (
        json.loads((folder / "adapter.json").read_text("utf-8")) for folder in (HERE / "plain", tmp_path / "again")
    )
    for key in ("adapters", "network", "task"):
        assert new[key] == old[key]


def test_monai_loads_the_trained_network(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)
    override = {"weights": str(bases["plain"])}
    network = monai.bundle.load("plain", bundle_dir=HERE, net_override=override, device="cpu").eval()
    check_logits(logits(network), "plain", "source")
