# SPDX-License-Identifier: Apache-2.0
"""The rivals get the same slices and are scored alike; nothing of theirs has to be installed for it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks`, from the root of the repository."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def slices() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of five slices of different sides."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 16, 24, generator=generator)
    return images, torch.randint(0, 3, (5, 1, 16, 24), generator=generator).to(torch.uint8)


def test_nnunet_gets_exactly_the_chosen_slices(slices: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    from benchmarks.evidence.apart import Exam
    from benchmarks.evidence.nnunet import read_volume, write_dataset

    images, labels = slices
    write_dataset(tmp_path, Exam(images, labels, [4, 1], [0], num_classes=3))
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {
        "dataset.json", "imagesTr/train_0000.nii.gz", "labelsTr/train.nii.gz",
    }  # fmt: skip
    image: Any = nib.load(tmp_path / "imagesTr" / "train_0000.nii.gz")
    label: Any = nib.load(tmp_path / "labelsTr" / "train.nii.gz")
    assert image.shape == label.shape == (24, 16, 2)
    assert np.array_equal(image.affine, label.affine)
    for position, index in enumerate((1, 4)):
        assert np.array_equal(image.get_fdata()[..., position].T, images[index, 0].double().numpy())
        assert np.array_equal(label.get_fdata()[..., position].T, labels[index, 0].numpy())
    assert torch.equal(read_volume(tmp_path / "labelsTr" / "train.nii.gz"), labels[[1, 4], 0])
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "class_1": 1, "class_2": 2}
    assert content["numTraining"] == 1 and content["channel_names"] == {"0": "CT"}


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (["no_such_program"], "no_such_program cannot be started"),
        (
            [sys.executable, "-c", "print('fine'); raise ValueError('too small')"],
            r"failed \(1\): ValueError: too small",
        ),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "took longer than 1 s"),
    ],
)
def test_a_program_that_does_not_run_says_why(program: list[str], reason: str) -> None:
    from benchmarks.evidence.apart import NotRun, run_there

    with pytest.raises(NotRun, match=reason):
        run_there(program, timeout=1 if "sleep" in program[-1] else 60)


def test_dice_is_pooled_over_the_slices(slices: tuple[torch.Tensor, torch.Tensor]) -> None:
    from benchmarks.evidence.apart import Exam

    images, labels = slices
    predicted = labels[:, 0].flip(0)
    expected = []
    for k in (1, 2):
        a, b = predicted.numpy() == k, labels[:, 0].numpy() == k
        expected.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    row = Exam(images, labels, [], list(range(5)), num_classes=4).scores(predicted)
    assert row["dice"] == [pytest.approx(expected[0], abs=5e-5), pytest.approx(expected[1], abs=5e-5), None]
    assert row["mean"] == pytest.approx(sum(expected) / 2, abs=5e-5)


@pytest.mark.parametrize(
    ("side", "filters"), [(256, [32, 64, 128, 256, 512, 512, 512]), (48, [32, 64, 128, 256]), (30, [32, 64])]
)
def test_levels_of_the_u_net(side: int, filters: list[int]) -> None:
    from benchmarks.evidence.dynunet import plan

    levels = plan(side)
    assert levels["filters"] == filters
    assert levels["strides"] == [1] + [2] * (len(filters) - 1)


def test_rate_falls_to_zero_with_the_budget() -> None:
    from benchmarks.evidence.dynunet import rate

    assert rate(0) == 0.01
    assert rate(0.5) == pytest.approx(0.01 * 0.5**0.9)
    assert rate(1) == rate(1.2) == 0


def test_heads_are_weighted_by_their_level() -> None:
    from benchmarks.evidence.dynunet import SupervisedHeads

    loss = SupervisedHeads()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 8, 8, generator=generator)
    label = torch.randint(0, 4, (2, 1, 8, 8), generator=generator)
    one, two, three = (float(loss.loss(logits[:, level], label)) for level in range(3))
    assert float(loss(logits, label)) == pytest.approx((4 * one + 2 * two + three) / 7, rel=1e-6)


def test_the_u_net_sees_every_class(slices: tuple[torch.Tensor, torch.Tensor]) -> None:
    from benchmarks.evidence.apart import Exam
    from benchmarks.evidence.dynunet import batches

    images, labels = slices
    labels = torch.zeros_like(labels)
    labels[1, 0, :4], labels[2, 0, 4:] = 1, 2
    drawn = list(itertools.islice(batches(Exam(images, labels, [0, 1, 2, 3], [4], 3), batch_size=2, seed=0), 400))
    assert {first for first, _ in drawn} == {0, 1, 2, 3}
    assert {second for _, second in drawn} == {1, 2} and abs(sum(second == 1 for _, second in drawn) - 200) < 50


def test_the_u_net_trains_for_its_budget(slices: tuple[torch.Tensor, torch.Tensor]) -> None:
    from benchmarks.evidence.apart import Exam
    from benchmarks.evidence.dynunet import train_dynunet

    images, labels = (torch.nn.functional.pad(values, (0, 0, 0, 8)) for values in slices)
    row = train_dynunet(Exam(images, labels, [0, 1, 2], [3, 4], 3), cpu_seconds=0.3, seed=0)
    assert row["steps"] >= 1 and row["cpu_seconds"] >= 0.3
    assert len(row["dice"]) == 2 and all(0 <= value <= 1 for value in row["dice"])
