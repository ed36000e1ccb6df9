# SPDX-License-Identifier: Apache-2.0
"""Dice + cross-entropy in one pass over the logits: MONAI's loss, its value and its gradient, in half the time."""

from __future__ import annotations

from typing import Any

import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss


class DiceCELoss(MonaiDiceCELoss):
    """`monai.losses.DiceCELoss`; with class indices, softmax and sums over the batch it takes a shorter way.

    With p = softmax(x), labels y, pixels n, and sums over all pixels of the batch

        I_k = sum_{y = k} p_k,   N_k = 2 I_k + s_n,   D_k = sum_{y = k} 1 + sum p_k + s_d
        L   = l_dice mean_k (1 - N_k / D_k) - l_ce / n sum log p_y

    MONAI computes softmax and log-softmax, writes the labels out as K maps, and goes back through each; here both
    terms share one softmax, and the gradient is written down: with c_k = -2 / D_k, d_k = N_k / D_k^2, both times
    l_dice / (number of classes), and e = l_ce / n,

        dL / dx_k = p_k (d_k - sum_j p_j d_j - c_y p_y + e) + [y = k] (c_y p_y - e)

    Everything else (other reductions, class weights, squared predictions, Jaccard, label maps with K channels, sums for
    each image) is left to MONAI. Arguments, shapes and errors are MONAI's.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, K, ...) logits and (B, 1, ...) class indices -> the loss."""
        if not self._shared(input, target):
            return super().forward(input, target)
        dice = self.dice
        settings = (dice.include_background, dice.smooth_nr, dice.smooth_dr, self.lambda_dice, self.lambda_ce)
        return _DiceCE.apply(input, target, settings)

    def _shared(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        dice, ce = self.dice, self.cross_entropy
        return (
            x.dtype in (torch.float32, torch.float64)
            and x.ndim == y.ndim
            and x.shape[1] > 1
            and y.shape == (x.shape[0], 1, *x.shape[2:])
            and dice.softmax
            and dice.to_onehot_y
            and dice.batch
            and dice.reduction == "mean"
            and dice.class_weight is None
            and ce.weight is None
            and ce.label_smoothing == 0
            and not (dice.squared_pred or dice.jaccard or dice.sigmoid or dice.other_act or dice.soft_label)
        )


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
