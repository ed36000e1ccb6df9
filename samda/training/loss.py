# SPDX-License-Identifier: Apache-2.0
"""Dice + cross-entropy in one pass over the logits: MONAI's loss, its value and its gradient, in half the time."""

from __future__ import annotations

from typing import Any

import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss

from samda.data.labels import PartialLabels
from samda.errors import UsageError

OPEN_TARGET = -0.5  # in place of a probability: the class is possible


class DiceCELoss(MonaiDiceCELoss):
    """`monai.losses.DiceCELoss`; with class indices, softmax and sums over the batch it takes a shorter way.

    With p = softmax(x), labels y, pixels n, and sums over all pixels of the batch

        I_k = sum_{y = k} p_k,   N_k = 2 I_k + s_n,   D_k = sum_{y = k} 1 + sum p_k + s_d
        L   = l_dice mean_k (1 - N_k / D_k) - l_ce / n sum log p_y

    MONAI computes softmax and log-softmax, writes the labels out as K maps, and goes back through each; here both
    terms share one softmax, and the gradient is written down: with c_k = -2 / D_k, d_k = N_k / D_k^2, both times
    l_dice / (number of classes), and e = l_ce / n,

        dL / dx_k = p_k (d_k - sum_j p_j d_j - c_y p_y + e) + [y = k] (c_y p_y - e)

    Everything else (other reductions, class weights, squared predictions, Jaccard, sums for each image) is left to
    MONAI. Arguments, shapes and errors are MONAI's.

    With `partial` labels the class of a pixel may be known to be one of S only (marginal loss, Shi et al. 2021, for all
    sets of classes): the cross-entropy is -log sum_{k in S} p_k, over the pixels that are known to be not of any class,
    and the sums of class k in the Dice leave out pixels of which it is not known whether they are of it. Soft targets
    (B, K, ...) take part as they are, -sum_k t_k log p_k, with I_k = sum t_k p_k.

    Args:
        partial: what the labels leave open.
    """

    def __init__(self, *args: Any, partial: PartialLabels | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.possible = None if partial is None else partial.possible()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, K, ...) logits and (B, 1, ...) class indices or (B, K, ...) soft targets -> the loss."""
        soft = target.shape == input.shape
        if not self._shared(input, target):
            if self.possible is not None or soft:
                raise UsageError("partial labels need the loss with softmax, batch=true and sums over the whole batch")
            return super().forward(input, target)
        dice = self.dice
        settings = (dice.include_background, dice.smooth_nr, dice.smooth_dr, self.lambda_dice, self.lambda_ce)
        if soft or self.possible is not None:
            return self._partial(input.flatten(2), target.flatten(2), *settings)
        return _DiceCE.apply(input, target, settings)

    def _partial(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        include_background: bool,
        smooth_nr: float,
        smooth_dr: float,
        lambda_dice: float,
        lambda_ce: float,
    ) -> torch.Tensor:
        """(B, K, n) logits, (B, 1, n) values of a label map or (B, K, n) of :func:`open_targets`."""
        log_p = torch.log_softmax(x, 1)
        if y.shape != x.shape:
            assert self.possible is not None
            y = open_targets(self.possible.to(x.device)[y[:, 0].long()].movedim(-1, 1), x.dtype)
        possible = y < 0
        some, told = possible.any(1), ~possible.all(1)
        log_q = log_p.masked_fill(~possible & some[:, None], -torch.inf).logsumexp(1)
        target, known = y.clamp_min(0).to(x), (~possible).to(x)
        likelihood = torch.where(some, log_q, (target * log_p).sum(1))
        cross_entropy = -(likelihood * told).sum() / told.sum().clamp_min(1)
        p = log_p.exp() * known
        overlap, count, predicted = ((target * p).sum((0, 2)), target.sum((0, 2)), p.sum((0, 2)))
        value = 1 - (2 * overlap + smooth_nr) / (count + predicted + smooth_dr)
        return lambda_dice * value[0 if include_background else 1 :].mean() + lambda_ce * cross_entropy

    def _shared(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        dice, ce = self.dice, self.cross_entropy
        return (
            x.dtype in (torch.float32, torch.float64)
            and x.ndim == y.ndim
            and x.shape[1] > 1
            and (y.shape == (x.shape[0], 1, *x.shape[2:]) or (y.shape == x.shape and y.is_floating_point()))
            and dice.softmax
            and dice.to_onehot_y
            and dice.batch
            and dice.reduction == "mean"
            and dice.class_weight is None
            and ce.weight is None
            and ce.label_smoothing == 0
            and not (dice.squared_pred or dice.jaccard or dice.sigmoid or dice.other_act or dice.soft_label)
        )


def open_targets(possible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, K, ...) bool of the classes that a pixel may be -> targets: 1 for the only one, else OPEN_TARGET for each."""
    alone = possible.sum(1, keepdim=True) == 1
    return torch.where(alone, 1.0, OPEN_TARGET).to(dtype) * possible


class _DiceCE(torch.autograd.Function):
    """The gradient is computed along with the value: the softmax is at hand."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, settings: tuple) -> torch.Tensor:
        include_background, smooth_nr, smooth_dr, lambda_dice, lambda_ce = settings
        batch, classes = logits.shape[:2]
        x, y = logits.detach().reshape(batch, classes, -1), target.reshape(batch, 1, -1).long()
        log_p = torch.log_softmax(x, 1)
        log_py = log_p.gather(1, y)
        p, py = log_p.exp_(), log_py.exp()
        predicted, flat = p.sum((0, 2)), y.flatten()
        # in double precision: half a million numbers are added one by one
        overlap = torch.bincount(flat, py.flatten().double(), minlength=classes).to(x)
        count = torch.bincount(flat, minlength=classes).to(x)
        numerator, denominator = 2 * overlap + smooth_nr, count + predicted + smooth_dr
        chosen = slice(0 if include_background else 1, None)
        value = lambda_dice * (1 - numerator / denominator)[chosen].mean() - lambda_ce * log_py.mean()
        if ctx.needs_input_grad[0]:
            share = x.new_zeros(classes)
            share[chosen] = lambda_dice / len(share[chosen])
            c, d, e = -2 * share / denominator, share * numerator / denominator**2, lambda_ce / len(flat)
            own = c[y] * py
            rest = e - own - torch.einsum("k,bkn->bn", d, p)[:, None]
            gradient = p.mul_(d[:, None] + rest).scatter_add_(1, y, own - e)
            ctx.save_for_backward(gradient.view_as(logits))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        unscaled = upstream.is_cpu and upstream == 1  # on a GPU the question would wait for it
        return gradient if unscaled else gradient * upstream, None, None
