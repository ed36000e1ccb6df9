# SPDX-License-Identifier: Apache-2.0
"""What docs/start.md and docs/how-to.md tell people to type does what they say, block by block, on tiny scans.

Each code block runs in a folder of its own that holds what the pages speak of: a data set, a task, scans, a model. A
block below `<!-- goes on -->` runs in the folder that the block before it leaves. A block below
`<!-- not run: REASON -->` is listed with its reason and not run; one in the language `text` shows what is printed. What
shortens the blocks is :data:`SHORT`, and `image_size` in liver.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import yaml

from samda.cli import main as cli
from samda.task import Task

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("start.md", "how-to.md")
REASONS = ("takes minutes", "needs a network", "starts a server", "make integration tests it")
# added to every `samda train` that does not say otherwise; the adapter is that of the model, which `--resume` continues
SHORT = {"--epochs": "1", "--set views": "views=1", "--adapter": "sam_da"}
BLOCK = re.compile(
    r"^(?: *<!-- (?:not run: (?P<reason>[^>]*?)|(?P<goes_on>goes on)) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
AFFINE = np.array([[0, -2.0, 0, 30], [2.5, 0, 0, -40], [0, 0, 5.0, 7], [0, 0, 0, 1]])


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    body: str
    reason: str | None
    goes_on: bool

    @property
    def name(self) -> str:
        kind = self.language or "commands"
        return f"{self.page}, line {self.line}, {kind}" + (f" (not run: {self.reason})" if self.reason else "")


def read_blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            textwrap.dedent(match["body"]),
            match["reason"],
            match["goes_on"] is not None,
        )
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
GROUPS: list[list[Block]] = []  # what runs in one folder
for _block in BLOCKS:
    if _block.goes_on:
        GROUPS[-1].append(_block)
    else:
        GROUPS.append([_block])
FILES = {block.body.splitlines()[0].lstrip("# "): block.body for block in BLOCKS if block.language == "yaml"}


def write_scan(image: Path, label: Path, seed: int) -> None:
    """A liver with a tumor in a body of water, (34, 44, 5) voxels."""
    shape = (34, 44, 5)
    x, y, z = np.indices(shape)
    far = ((x - 15 - seed) * 2.5) ** 2 + ((y - 22) * 2.0) ** 2 + ((z - 2) * 5.0) ** 2
    labels = (far < 24**2).astype(np.uint8) + (far < 10**2)
    values = np.array([0, 120, -80])[labels] + np.random.default_rng(seed).normal(0, 5, shape)
    for path, array in ((image, values.astype(np.int16)), (label, labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(array, AFFINE).to_filename(path)


def write_series(folder: Path, values: np.ndarray) -> None:
    """A DICOM series of axial slices."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(values.shape[2]):
        image = sitk.GetImageFromArray(values[:, :, k].T[None])
        image.SetSpacing((2.5, 2.0, 5.0))
        tags = {"0008|0060": "CT", "0020|000d": "1.2", "0020|000e": "1.2.3", "0008|0018": f"1.2.3.{k + 1}"}
        tags |= {"0020|0032": f"0\\0\\{5 * k}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(k + 1)}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the pages speak of, and a model with an adapter, trained for one epoch."""
    place = tmp_path_factory.mktemp("docs")
    data = place / "Dataset001_Liver"
    for seed in range(3):
        write_scan(data / "imagesTr" / f"case{seed}_0000.nii.gz", data / "labelsTr" / f"case{seed}.nii.gz", seed)
    about = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumor": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (data / "dataset.json").write_text(json.dumps(about))
    for name, content in FILES.items():
        (place / name).write_text(content)
    task = yaml.safe_load(FILES["liver.yaml"]) | {"image_size": 64, "spacing": 2.0}
    (place / "liver.yaml").write_text(yaml.safe_dump(task))
    write_scan(place / "new_scans" / "new.nii.gz", place / "true_labels" / "new.nii.gz", 3)
    shutil.copytree(place / "new_scans", place / "scans")
    write_series(place / "series", np.asarray(nib.load(place / "scans" / "new.nii.gz").dataobj))
    shutil.copy(place / "scans" / "new.nii.gz", place / "scan.nii.gz")
    shutil.copytree(place / "true_labels", place / "labels_of_another_tool")
    local = place / "local_cases"
    for seed in range(5):
        write_scan(local / "images" / f"case{seed}.nii.gz", local / "labels" / f"case{seed}.nii.gz", 4 + seed)
    train = ["train", "-d", data, "-o", place / "model", "--task", place / "liver.yaml", "--epochs", 1]
    train += ["--adapter", "sam_da"]  # samda adapt needs one
    predict = ["predict", "-m", place / "model", "-i", data, "-o", place / "labels", "--section", "training"]
    for args in ([*train, "--set", "views=1"], predict):
        assert cli.main(list(map(str, args))) == 0
    return place


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, as the working directory."""
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def command_lines(body: str) -> list[list[str]]:
    lines = body.replace("\\\n", " ").splitlines()
    parsed = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in parsed if words]


def run_commands(body: str) -> None:
    """Run the command lines; what they write is not there before, and trainings are short."""
    for words in command_lines(body):
        assert words[0] == "samda", f"{words}: only samda commands are run; mark the block as not run"
        args = words[1:]
        if "-o" in args and not {"--resume", "--continue"} & set(args):
            output = Path(args[args.index("-o") + 1])
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        if args[0] == "train":
            for option, value in SHORT.items():
                if not any(word.startswith(option.split()[-1]) for word in args):
                    args += [option.split()[0], value]
        assert cli.main(args) == 0, " ".join(words)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: " + ".join(block.name for block in group))
def test_block(group: list[Block], request: pytest.FixtureRequest) -> None:
    for block in group:
        if block.reason is not None:
            assert block.reason in REASONS
        elif block.language == "text":
            continue
        elif block.language == "yaml":
            assert block.body.startswith("# ") and yaml.safe_load(block.body)
        elif block.language == "python":
            request.getfixturevalue("place")
            exec(compile(block.body, block.name, "exec"), {"__name__": "__main__"})
        else:
            assert block.language == "", "command lines stand in blocks without a language"
            request.getfixturevalue("place")
            run_commands(block.body)


def test_the_task_of_the_first_page_is_one() -> None:
    task = Task.from_dict(yaml.safe_load(FILES["liver.yaml"]))
    assert (task.classes, task.labels) == (("background", "liver", "tumor"), {"liver": (1,), "tumor": (2,)})
    assert task.spacing * task.image_size == 384  # mm, as the page says


def test_every_block_is_found() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * sum(block.page == page for block in BLOCKS)
