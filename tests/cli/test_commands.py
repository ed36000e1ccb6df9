# SPDX-License-Identifier: Apache-2.0
"""train, predict, evaluate, info and weights on small synthetic scans and the real vit_t."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from samda.cli import main as cli

AFFINE = np.array([[0, -2.0, 0, 30], [2.5, 0, 0, -40], [0, 0, 5.0, 7], [0, 0, 0, 1]])  # turned, three spacings
TASK = {
    "name": "balls",
    "classes": ["background", "ball"],
    "labels": {"ball": [7]},
    "window": [-100, 200],
    "spacing": 2.0,
    "image_size": 64,
}


def write_scan(folder: Path, name: str, seed: int) -> tuple[Path, Path]:
    """A bright ball in a body of water, (34, 44, 7) voxels, and its label file with id 7."""
    shape = (34, 44, 7)
    x, y, z = np.indices(shape)
    ball = ((x - 15 - seed) * 2.5) ** 2 + ((y - 22) * 2.0) ** 2 + ((z - 3) * 5.0) ** 2 < 15**2
    noise = np.random.default_rng(seed).normal(0, 5, shape)
    image = np.where(ball, 150, 0) + noise
    paths = folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz"
    nib.Nifti1Image(image.astype(np.int16), AFFINE).to_filename(paths[0])
    nib.Nifti1Image((7 * ball).astype(np.uint8), AFFINE).to_filename(paths[1])
    return paths


def samda(capsys: pytest.CaptureFixture, *args: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a task file, unlabeled scans and a model trained for one epoch."""
    place = tmp_path_factory.mktemp("balls")
    (place / "data").mkdir()
    (place / "scans").mkdir()
    cases = []
    for seed, name in enumerate("abc"):
        image, label = write_scan(place / "data", name, seed)
        cases.append({"id": name, "image": image.name, "label": label.name})
    (place / "data" / "dataset.json").write_text(json.dumps({"training": cases[:2], "test": cases[2:]}))
    shutil.copy(place / "data" / "c.nii.gz", place / "scans")
    (place / "balls.yaml").write_text(yaml.safe_dump(TASK))
    train = ["train", "-d", place / "data", "-o", place / "model", "--task", place / "balls.yaml"]
    assert cli.main([*map(str, train), "--epochs", "1", "--set", "views=1", "--head", "sam"]) == 0
    return place


def test_train_says_what_it_did(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = ["train", "-d", place / "data", "-o", tmp_path / "m", "--task", place / "balls.yaml", "--json"]
    train += ["--head", "sam", "--epochs", "2", "--set", "views=1", "--batch-size", "3", "--seed", "5"]
    code, out, err = samda(capsys, *train)
    assert err.startswith("training on ") and "tensors loaded" not in err
    result = json.loads(out)
    assert (code, result["epochs"], result["parameters"]["sam_da"]) == (0, 2, 395_522)
    assert result["parameters"]["head"] == 2 * 140_064
    settings = json.loads((tmp_path / "m" / "adapter.json").read_text("utf-8"))["record"]["training"]["settings"]
    assert (settings["batch_size"], settings["seed"]) == (3, 5)


def test_train_by_time_with_the_default_head(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = ["train", "-d", place / "data", "-o", tmp_path / "m", "--task", place / "balls.yaml", "--json"]
    code, out, _ = samda(capsys, *train, "--minutes", "0.1", "--tracking", "none")
    assert code == 0 and json.loads(out)["parameters"]["ssf"] == 896
    adapt = ["adapt", "-m", tmp_path / "m", "-i", place / "scans", "-o", tmp_path / "out", "--json"]
    code, _, _ = samda(capsys, *adapt, "--views", "2", "--slices", "2", "--steps", "1", "--quiet")
    (line,) = (tmp_path / "out" / "run.jsonl").read_text("utf-8").splitlines()
    assert code == 0 and json.loads(line)["scope"] in ("ssf", "intensity+ssf") and json.loads(line)["error"] is None
    record = json.loads((tmp_path / "m" / "adapter.json").read_text("utf-8"))["record"]
    assert record["training"]["settings"]["head"] == "pyramid"
    code, _, err = samda(capsys, *train, "--minutes", "1", "--steps", "5", "--overwrite")
    assert code == 2 and "steps=5, minutes=1.0" in err


def test_train_with_several_adapters(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("adapters: {lka: {width: 4, kernel_size: 3}}")
    train = ["train", "-d", place / "data", "-o", tmp_path / "m", "--task", place / "balls.yaml", "--json"]
    code, out, _ = samda(capsys, *train, "--epochs", "1", "--adapter", f"sam_da,{own}")
    blocks = [(2, 128), (6, 160), (2, 320)]
    lka = sum(n * 2 * (2 * d * 4 + 4 * 3 * 3 + 2 * 4 + d) for n, d in blocks)
    assert code == 0
    assert json.loads(out)["parameters"]["lka"] == lka
    assert json.loads(out)["parameters"]["sam_da"] == 395_522


def test_predict_needs_no_label_and_keeps_the_grid(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    predict = ["predict", "-m", place / "model", "-i", place / "scans", "-o", tmp_path / "out"]
    code, out, _ = samda(capsys, *predict, "--save-probabilities", "--memory", "1", "--batch-size", "2")
    assert code == 0
    assert out.startswith("1 predicted, 0 ")
    found, scan = nib.load(tmp_path / "out" / "c.nii.gz"), nib.load(place / "scans" / "c.nii.gz")
    assert found.shape == scan.shape == (34, 44, 7)
    assert np.array_equal(found.affine, scan.affine)
    chances = np.asarray(nib.load(tmp_path / "out" / "probabilities" / "c.nii.gz").dataobj)
    assert np.array_equal(chances.argmax(-1), np.asarray(found.dataobj))
    code, out, _ = samda(capsys, *predict, "--continue", "--json")
    assert (code, json.loads(out)["skipped"]) == (0, ["c"])


def test_another_modality_maps_intensities_its_own_way(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scan = nib.load(place / "data" / "c.nii.gz")
    nib.Nifti1Image(np.asarray(scan.dataobj) + 5000, scan.affine).to_filename(tmp_path / "c.nii.gz")
    predict = ["predict", "-m", place / "model", "-i", tmp_path / "c.nii.gz"]
    code, _, err = samda(capsys, *predict, "-o", tmp_path / "ct")
    assert code == 1 and "window -100 to 200 HU" in err
    code, out, _ = samda(capsys, *predict, "-o", tmp_path / "mr", "--modality", "MR")
    assert code == 0 and out.startswith("1 predicted")


def test_a_class_to_keep_the_largest_piece_of_must_exist(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for command in ("predict", "adapt"):
        args = [command, "-m", place / "model", "-i", place / "scans", "-o", tmp_path / "x", "--keep-largest", "bal"]
        code, _, err = samda(capsys, *args)
        assert code == 2 and not (tmp_path / "x").exists()
        assert "'bal'" in err.splitlines()[-1] and "did you mean 'ball'?" in err.splitlines()[-1]


def test_reduced_precision_predicts_nearly_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "model"  # hardly trained: probabilities near one half, where rounding shows
    train = ["train", "-d", place / "data", "-o", model, "--task", place / "balls.yaml", "--epochs", "1"]
    rates = ["--set", "views=1", "--set", "learning_rate=1e-5", "--set", "head_learning_rate=1e-5"]
    assert samda(capsys, *train, *rates)[0] == 0
    predict = ["predict", "-m", model, "-i", place / "scans", "--save-probabilities"]
    found = {}
    for name, amp in {"full": ("--amp", "off"), "half": ("--amp", "bf16")}.items():
        assert samda(capsys, *predict, "-o", tmp_path / name, *amp)[0] == 0
        found[name] = nib.load(tmp_path / name / "probabilities" / "c.nii.gz").get_fdata()
    assert 0 < np.abs(found["full"] - found["half"]).max() < 0.15
    code, _, err = samda(capsys, *predict, "-o", tmp_path / "none", "--amp", "fp16", "--device", "cpu")
    assert code == 2 and "amp 'fp16' needs a GPU; on a CPU use bf16 or off" in err
    assert not (tmp_path / "none").exists()


def test_a_process_that_predicts_imports_less_and_finds_the_same(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = """if True:
        import sys
        from samda.cli.main import OPTIONAL, main
        print(main(), [name for name in OPTIONAL if name in sys.modules])
        import ignite.engine, segment_anything, torchvision  # later they are found as ever
        print(segment_anything.sam_model_registry["vit_b"].__name__)
    """
    predict = ["predict", "-m", place / "model", "-i", place / "scans"]
    command = [sys.executable, "-c", code, *map(str, predict), "-o", str(tmp_path / "process")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[1:] == ["0 []", "build_sam_vit_b"]
    assert samda(capsys, *predict, "-o", tmp_path / "here")[0] == 0
    maps = [nib.load(tmp_path / name / "c.nii.gz").get_fdata() for name in ("process", "here")]
    assert np.array_equal(*maps)


def test_one_bad_scan_does_not_stop_the_others(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(place / "scans", tmp_path / "scans")
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"no scan")
    code, out, err = samda(capsys, "predict", "-m", place / "model", "-i", tmp_path / "scans", "-o", tmp_path / "out")
    assert code == 1
    assert out.startswith("1 predicted")
    assert (tmp_path / "out" / "c.nii.gz").is_file()
    assert err.splitlines()[-1] == "samda predict: 1 of 2 cases failed: broken"


def test_evaluate(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    label = nib.load(place / "data" / "c_label.nii.gz")
    true = np.asarray(label.dataobj) == 7
    predicted = np.roll(true, 2, axis=1)
    (tmp_path / "p").mkdir()
    nib.Nifti1Image(predicted.astype(np.uint8), label.affine).to_filename(tmp_path / "p" / "c.nii.gz")
    dice = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
    evaluate = ["evaluate", "-i", tmp_path / "p", "-l", place / "data", "-o", tmp_path / "scores"]
    for which in (["-m", place / "model"], ["--task", place / "balls.yaml"]):
        code, out, _ = samda(capsys, *evaluate, *which, "--json")
        assert code == 0
        scores = json.loads(out)["cases"]["c"]["ball"]
        assert scores["dice"] == pytest.approx(dice)
        assert scores["hd95_mm"] == pytest.approx(4.0)  # two voxels of 2 mm
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text("utf-8"))["cases"]["c"]["ball"] == scores
    with (tmp_path / "scores" / "metrics.csv").open() as file:
        assert float(next(csv.DictReader(file))["dice"]) == pytest.approx(dice)
    _, out, _ = samda(capsys, *evaluate, "--task", place / "balls.yaml")
    assert f"{dice:.3f} (1)" in out


def test_info_of_a_model(place: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = samda(capsys, "info", "-m", place / "model", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["task"]["classes"] == ["background", "ball"]
    assert facts["adapters"]["sam_da"]["type"] == "sam_da"
    assert facts["parameters"] == 395_522 + 2 * 140_064
    _, out, _ = samda(capsys, "info", "-m", place / "model")
    assert "background, ball" in out
    assert "64 pixels of 2.0 mm" in out
    dice = facts["record"]["metrics"]["mean_dice"]
    assert f"validation Dice      {dice:.3f}\n" in out


def test_erf(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    erf = ["erf", "-m", place / "model", "-i", place / "scans", "--slices", "2"]
    code, out, _ = samda(capsys, *erf, "--baseline", "--json", "-o", tmp_path / "fields")
    found = json.loads(out)
    assert code == 0
    assert (found["images"], found["image_size"], found["spacing_mm"]) == (2, [64, 64], 2.0)
    assert json.loads((tmp_path / "fields" / "erf.json").read_text("utf-8")) == found
    assert sorted(path.name for path in (tmp_path / "fields").iterdir()) == ["erf.json", "erf.png"]
    assert (tmp_path / "fields" / "erf.png").read_bytes().startswith(b"\x89PNG")
    model, base = found["models"]
    assert (model["model"], model["version"], list(model["adapters"])) == (str(place / "model"), "source", ["sam_da"])
    assert (base["model"], base["version"], base["adapters"]) == ("vit_t without adapters", None, {})
    assert model["taps"] == base["taps"]  # sam_da leaves the encoder as it is
    for tap in ("block", "neck"):
        assert (model["taps"][tap]["images"], model["taps"][tap]["skipped"]) == (2, 0)
        for scale in ("log", "mass", "normalized"):
            sides = [area["side"] for area in model["taps"][tap]["areas"][scale].values()]
            assert 3 <= sides[0] < sides[1] < sides[2] <= 63
            assert all(
                a["side"] is None or a["ratio"] == a["side"] ** 2 / 64**2
                for a in model["taps"][tap]["areas"][scale].values()
            )
    code, out, err = samda(capsys, *erf, "--quiet")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 1 + 2 * 3)
    side = model["taps"]["neck"]["areas"]["mass"]["0.5"]["side"]
    assert lines[5].startswith(f"{place / 'model'}, neck, mass") and f" {side} (" in lines[5]


def test_erf_sees_adapters_and_refuses_other_images(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own, own_task = tmp_path / "own.yaml", tmp_path / "other.yaml"
    own.write_text("adapters: {dka: {width: 4, large_kernel: 7, small_kernel: 3, init: paper}}")
    own_task.write_text(yaml.safe_dump(TASK | {"window": [-100, 150]}))
    train = ["train", "-d", place / "data", "--epochs", "1", "--set", "views=1", "--tracking", "none"]
    assert samda(capsys, *train, "--task", place / "balls.yaml", "-o", tmp_path / "dka", "--adapter", own)[0] == 0
    erf = ["erf", "-i", place / "scans", "--slices", "1", "--json", "--baseline", "-m", place / "model"]
    code, out, _ = samda(capsys, *erf, tmp_path / "dka")
    models = json.loads(out)["models"]
    assert (code, [list(m["adapters"]) for m in models]) == (0, [["sam_da"], [], ["dka"]])  # one base, measured once
    assert models[0]["taps"] == models[1]["taps"] != models[2]["taps"]
    assert samda(capsys, *train, "--task", own_task, "-o", tmp_path / "other")[0] == 0
    code, _, err = samda(capsys, *erf, tmp_path / "other")
    assert code == 2 and "(window (-100.0, 200.0) and (-100.0, 150.0))" in err.splitlines()[-1]


def test_weights(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = samda(capsys, "weights", "--json")
    known = json.loads(out)
    assert code == 0
    assert list(known) == ["vit_t", "vit_b", "vit_l", "vit_h"]
    assert known["vit_t"]["cached"]  # the training above needed it
    assert Path(known["vit_t"]["path"]).is_file()
    assert known["vit_b"]["published"]["sha256"].startswith("ec2df6")
    code, out, _ = samda(capsys, "weights", "vit_t")
    assert (code, out.strip()) == (0, known["vit_t"]["path"])


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["train", "-d", "NOWHERE", "-o", "OUT"], 1, ["NOWHERE", "does not exist"]),
        (["train", "-d", "SCANS", "-o", "OUT"], 1, ["(1 without label)"]),
        (["train", "-d", "DATA", "-o", "OUT", "--task", "bals.yaml"], 1, ["bals.yaml", "does not exist"]),
        (["train", "-d", "DATA", "-o", "OUT", "--task", "TASK", "--epochs", "3", "--set", "epochs=3"], 2, ["twice"]),
        (["train", "-d", "DATA", "-o", "OUT", "--task", "TASK", "--adapter", ""], 2, ["no adapter overlay ''"]),
        (["train", "-d", "DATA", "-o", "DATA", "--task", "TASK"], 2, ["is the data set; choose another folder"]),
        (["train", "-d", "DATA", "-o", "TASK", "--task", "TASK"], 2, ["balls.yaml is a file; give a folder"]),
        (["train", "-d", "DATA", "-o", "MODEL", "--task", "TASK"], 2, ["already holds a training"]),
        (["train", "-d", "DATA", "-o", "OUT", "--device", "cuda:99"], 2, ["cuda:99"]),
        (["predict", "-m", "NOWHERE", "-i", "SCANS", "-o", "OUT"], 1, ["NOWHERE", "trained model"]),
        (["predict", "-m", "MODEL", "-i", "NOWHERE", "-o", "OUT"], 1, ["NOWHERE", "does not exist"]),
        (["predict", "-m", "MODEL", "-i", "SCANS", "-o", "SCANS"], 2, ["choose another output folder"]),
        (["predict", "-m", "MODEL", "-i", "SCANS", "-o", "OUT", "--version", "sit"], 2, ["no version 'sit'"]),
        (["adapt", "-m", "MODEL", "-i", "SCANS", "-o", "OUT", "--labels", "NOWHERE"], 1, ["labels", "does not exist"]),
        (["adapt", "-m", "MODEL", "-i", "SCANS", "-o", "OUT", "--records", "SCANS"], 2, ["is a folder"]),
        (["adapt", "-m", "MODEL", "-i", "SCANS", "-o", "OUT", "--scope", "norm"], 1, ["no parameters in scope 'norm'"]),
        (["evaluate", "--task", "abdomen", "-i", "SCANS", "-l", "DATA", "-o", "OUT"], 2, ["did you mean 'abdomen_"]),
        (
            ["evaluate", "-m", "MODEL", "-i", "SCANS", "-l", "SCANS", "-o", "OUT", "--nsd-tolerance", "nan"],
            2,
            ["got nan"],
        ),
        (["evaluate", "-i", "SCANS", "-l", "DATA", "-o", "OUT"], 2, ["-m/--model", "--task"]),
        (
            ["evaluate", "-m", "MODEL", "--task", "TASK", "-i", "SCANS", "-l", "DATA", "-o", "OUT"],
            2,
            ["not allowed with"],
        ),
        (["evaluate", "-m", "MODEL", "-i", "SCANS", "-l", "NOWHERE", "-o", "OUT"], 1, ["NOWHERE", "does not exist"]),
        (["export", "-m", "MODEL", "-o", "OUT"], 2, ["required: --format"]),
        (["export", "-m", "MODEL", "-o", "OUT", "--format", "onx"], 2, ["'onx'", "did you mean 'onnx'?"]),
        (["export", "-m", "MODEL", "-o", "MODEL", "--format", "onnx"], 2, ["model exists and is not an empty folder"]),
        (["export", "-m", "MODEL", "-o", "a/b/c", "--format", "onnx"], 2, ["a/b does not exist; make it first"]),
        (["export", "-m", "MODEL", "-o", "model.pt2", "--format", "torch"], 2, ["is the name of a file", "'model'"]),
        (
            ["export", "-m", "MODEL", "-o", "OUT", "--format", "sam"],
            1,
            ["adapter 'sam_da'", "a module at decoder.0.layer and 1 more", "onnx or torch"],
        ),
        (["export", "-m", "NOWHERE", "-o", "OUT", "--format", "sam"], 1, ["NOWHERE", "trained model"]),
        (["erf", "-m", "NOWHERE", "-i", "SCANS"], 1, ["NOWHERE", "trained model"]),
        (["erf", "-m", "MODEL", "-i", "NOWHERE"], 1, ["NOWHERE", "does not exist"]),
        (["erf", "-m", "MODEL", "MODEL", "-i", "SCANS"], 2, ["--model", "twice"]),
        (["erf", "-m", "MODEL", "-i", "SCANS", "-o", "MODEL"], 2, ["model exists and is not an empty folder"]),
        (["erf", "-m", "MODEL", "-i", "SCANS", "--slices", "0"], 2, ["--slices", "0"]),
        (["erf", "-m", "MODEL", "-i", "SCANS", "--version", "sit"], 2, ["no version 'sit'"]),
        (["info", "-m", "NOWHERE"], 1, ["NOWHERE", "trained model"]),
        (["weights", "vit_q"], 2, ["vit_q", "did you mean 'vit_"]),
        (["site", "activate", "-m", "MODEL"], 2, ["samda site: activate needs the name of a version"]),
    ],
)
def test_refusals(
    args: list[str], code: int, words: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = {
        "DATA": place / "data",
        "MODEL": place / "model",
        "SCANS": place / "scans",
        "TASK": place / "balls.yaml",
        "OUT": tmp_path / "out",
        "NOWHERE": tmp_path / "NOWHERE",
    }
    found, out, err = samda(capsys, *(paths.get(arg, arg) for arg in args))
    assert found == code
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"samda {args[0]}: ")
    assert "unexpected" not in last
    assert "Traceback" not in err
    for word in words:
        assert word in last


def test_export_names_the_formats_that_there_are() -> None:
    from samda.cli.export import FORMATS
    from samda.models import export

    assert FORMATS == export.FORMATS == tuple(export.PACKAGES)


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_model_folder_from_a_stranger_runs_no_code(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(place / "model", model)
    pickled = pickle.dumps(Payload(mark))
    pickle.loads(pickled)
    assert mark.exists()  # the payload works
    mark.unlink()
    for name in ("last.pt", "models/model.pt", "adapter.pt", "adapter.bin"):
        (model / name).write_bytes(pickled)
    evil = {"_target_": "pathlib.Path.touch", "self": str(mark)}
    text = json.dumps({"initialize": [f"$__import__('pathlib').Path({str(mark)!r}).touch()"], "network_def": evil})
    for name in ("train.json", "inference.json", "evaluate.json", "metadata.json"):
        (model / "configs" / name).write_text(text)
    (model / "samda.py").write_text(f"open({str(mark)!r}, 'w')")
    predict = ["predict", "-m", model, "-i", place / "scans", "-o", tmp_path / "out"]
    assert samda(capsys, *predict)[0] == 0
    assert samda(capsys, "info", "-m", model)[0] == 0
    assert not mark.exists()
    header = json.loads((model / "adapter.json").read_text("utf-8"))
    for key, value in [
        ("network", {**header["network"], "backbone": evil}),
        ("network", {**header["network"], "backbone": f"$open({str(mark)!r}, 'w')"}),
        ("network", {**header["network"], "weights": str(mark), "_target_": "os.system"}),
        ("adapters", {"sam_da": evil}),
        ("base", {**header["base"], "file": "../last.pt"}),
        ("task", {**header["task"], "name": f"$open({str(mark)!r}, 'w')", "_target_": "os.system"}),
    ]:
        (model / "adapter.json").write_text(json.dumps({**header, key: value}))
        code, _, err = samda(capsys, *predict)
        assert code in (1, 2), key
        assert "unexpected" not in err, key
        assert not mark.exists(), key
