# SPDX-License-Identifier: Apache-2.0
"""Dice + cross-entropy: MONAI's value and gradient, whichever way they are computed."""

from __future__ import annotations

import monai.losses
import pytest
import torch

from samda.data.labels import IGNORED, OPEN, PartialLabels
from samda.training.loss import DiceCELoss

SHORT = {"to_onehot_y": True, "softmax": True, "batch": True}


def inputs(dtype: torch.dtype = torch.float64, shape=(3, 4, 10, 14)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    label = torch.randint(0, shape[1] - 1, (shape[0], 1, *shape[2:]), generator=generator)  # the last class is absent
    return logits.requires_grad_(), label.to(torch.uint8)


def both(settings: dict, logits: torch.Tensor, label: torch.Tensor, factor: float = 1.0) -> list[list[torch.Tensor]]:
    """Value and gradient of samda's and of MONAI's loss."""
    found = []
    for kind in (DiceCELoss, monai.losses.DiceCELoss):
        value = kind(**settings)(logits, label)
        found.append([value.detach(), torch.autograd.grad(factor * value, logits)[0]])
    return found


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize(
    "further",
    [
        {},
        {"include_background": False},
        {"lambda_dice": 0.3, "lambda_ce": 2.0},
        {"smooth_nr": 0.0, "smooth_dr": 1e-3},
    ],
    ids=str,
)
def test_the_short_way_is_the_same_loss(further, factor):
    logits, label = inputs()
    assert DiceCELoss(**SHORT, **further)._shared(logits, label)
    ours, theirs = both(SHORT | further, logits, label, factor)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_single_precision_and_volumes():
    logits, label = inputs(torch.float32, (2, 3, 40, 36, 8))
    ours, theirs = both(SHORT | {"include_background": False}, logits, label)
    rounding = torch.finfo(torch.float32).eps * label.numel() ** 0.5  # of sums over all pixels
    torch.testing.assert_close(ours[0], theirs[0], rtol=rounding, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=rounding, atol=rounding * float(theirs[1].abs().max()))


def test_certain_and_wrong_stays_finite():
    logits = torch.tensor([[[[200.0]], [[-200.0]]]], requires_grad=True)
    label = torch.ones(1, 1, 1, 1, dtype=torch.uint8)
    ours, theirs = both(SHORT, logits, label)
    assert float(ours[0]) == pytest.approx(401, abs=1)  # 400 of the cross-entropy, 1 of the Dice
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "further",
    [
        {"batch": False},
        {"squared_pred": True},
        {"jaccard": True},
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"weight": torch.tensor([1.0, 2.0, 1.0, 1.0])},
        {"softmax": False, "sigmoid": True},
    ],
    ids=str,
)
def test_everything_else_is_left_to_monai(further):
    logits, label = inputs()
    loss = DiceCELoss(**SHORT | further).to(torch.float64)
    assert not loss._shared(logits, label)
    reference = monai.losses.DiceCELoss(**SHORT | further).to(torch.float64)
    assert torch.equal(loss(logits, label), reference(logits, label))


def test_the_gradient_is_that_of_finite_differences():
    logits, label = inputs(shape=(2, 3, 2, 3))
    assert torch.autograd.gradcheck(lambda x: DiceCELoss(**SHORT)(x, label), logits)


def test_no_gradient_is_asked_for():
    logits, label = inputs()
    with torch.no_grad():
        value = DiceCELoss(**SHORT)(logits, label)
    torch.testing.assert_close(value, monai.losses.DiceCELoss(**SHORT)(logits, label).detach())


def test_labels_of_another_shape_are_refused_as_monai_does():
    logits, label = inputs()
    with pytest.raises(ValueError, match="number of dimensions"):
        DiceCELoss(**SHORT)(logits, label[:, 0])


GAPS = PartialLabels(("background", "a", "b", "c"), sets=((2,), (2, 3)))


def test_partial_labels_merge_background_with_what_is_lacking() -> None:
    logits, label = inputs()
    label[0][label[0] == 0] = OPEN  # background or b
    label[1][label[1] == 0] = OPEN + 1  # background, b or c
    label[2, :, :5] = IGNORED
    value = DiceCELoss(**SHORT, include_background=False, partial=GAPS)(logits, label)
    p = logits.detach().softmax(1)
    may = {0: [0], 1: [1], 2: [2], 3: [3], OPEN: [0, 2], OPEN + 1: [0, 2, 3], IGNORED: [0, 1, 2, 3]}
    terms, sums = [], torch.zeros(4, 3, dtype=torch.float64)
    for b, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(10), torch.arange(14)).tolist():
        possible = may[int(label[b, 0, i, j])]
        if len(possible) < 4:
            terms.append(-sum(p[b, k, i, j] for k in possible).log())
        for k in range(4):
            if k not in possible or len(possible) == 1:
                hit = float(possible == [k])
                sums[k] += torch.tensor([hit * p[b, k, i, j], hit, p[b, k, i, j]])
    overlap, count, predicted = sums[1:].T
    expected = torch.stack(terms).mean() + (1 - (2 * overlap + 1e-5) / (count + predicted + 1e-5)).mean()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(value, logits)
    assert not gradient[2, :, :5].any()  # ignored pixels move nothing
    assert gradient[2, :, 5:].any()


def test_labels_that_leave_nothing_open_give_the_plain_loss() -> None:
    logits, label = inputs()
    values = [DiceCELoss(**SHORT, partial=gaps)(logits, label) for gaps in (None, GAPS)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    one_hot = torch.nn.functional.one_hot(label[:, 0].long(), 4).movedim(-1, 1).double()
    torch.testing.assert_close(DiceCELoss(**SHORT)(logits, one_hot), values[0], rtol=1e-12, atol=0)


def test_soft_targets_are_monais_probabilities() -> None:
    logits, _ = inputs()
    target = inputs()[0].detach().roll(1, 2).softmax(1)
    ours = DiceCELoss(**SHORT)(logits, target)
    theirs = monai.losses.DiceCELoss(softmax=True, batch=True)(logits, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
