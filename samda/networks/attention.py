# SPDX-License-Identifier: Apache-2.0
"""SAM's attention with decomposed relative positions, exact and fast.

For a query at grid position (y, x) and a key at (y', x'), SAM adds a bias to the scaled product:

    logit = scale * q . k  +  q . Rh[y - y']  +  q . Rw[x - x']

with one learned table per axis (MViTv2, arXiv 2112.01526). Two formulations give the same numbers:

* `mask`: the bias as an additive mask of `scaled_dot_product_attention`;
* `channels`: the bias as extra channels of query and key. With one-hot row and column codes at the keys,
  [scale q, q Rh, q Rw] . [k, onehot(y'), onehot(x')] is the logit, and no (HW, HW) mask is ever written.

:func:`choose_formulation` holds the measured rule which of the two runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from samda.networks.recompute import inside_recompute

T = TypeVar("T")

# of the masks that exist at a time, one head's at least: near the cache of a CPU, in few kernel calls elsewhere
MASK_ELEMENTS = {"cpu": 2**22}
MANY_MASK_ELEMENTS = 2**28
MAX_FUSED_WIDTH = 256  # channels per head that the fused CUDA kernels take


class DerivedTensors:
    """Remembers tensors that are computed from frozen parameters and a size; a changed parameter is noticed.

    Nothing is remembered while gradients flow to a parameter.
    """

    limit = 8  # sizes kept at a time

    def __init__(self) -> None:
        self._kept: dict[object, tuple[object, Any]] = {}

    def __call__(self, parameters: torch.Tensor | Sequence[torch.Tensor], key: object, compute: Callable[[], T]) -> T:
        """`compute()`, a tensor or several, or what it gave for the same parameters and key before."""
        sources = (parameters,) if isinstance(parameters, torch.Tensor) else parameters
        trained = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if trained or torch.compiler.is_compiling():
            return compute()
        stamp = [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.device) for p in sources]
        kept = self._kept.get(key)
        if kept is None or kept[0] != stamp:
            if len(self._kept) >= self.limit:
                self._kept.clear()
            # a normal tensor, also when asked for in inference mode: a later training step may read it
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept[key] = (stamp, compute())
        return kept[1]

    def __deepcopy__(self, memo: object) -> DerivedTensors:
        return DerivedTensors()

    def __reduce__(self) -> tuple[type[DerivedTensors], tuple[()]]:
        return DerivedTensors, ()


def relative_table(table: torch.Tensor, size: int) -> torch.Tensor:
    """Position vectors R[y, y'] of every query and key along one axis.

    A table made for another size is resized linearly, as SAM does.

    Args:
        table: (L, d), row y - y' + (L - 1) / 2 belongs to the distance y - y'.
        size: tokens along the axis.

    Returns:
        (size, size, d), query first.
    """
    length = 2 * size - 1
    if table.shape[0] != length:
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        table = F.interpolate(wide.T[None], size=length, mode="linear")[0].T.to(table.dtype)
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + (size - 1)]


def choose_formulation(q: torch.Tensor, size: tuple[int, int]) -> str:
    """The faster formulation for queries `q` (N, heads, H W, d) on a grid of `size` (H, W).

    Measured on a CPU: the mask is faster unless gradients are needed, for which the fused kernel takes no mask; beyond
    a 16 x 16 grid the channels then cost no more and need no (HW, HW) memory. Reasoned for CUDA, not measured: the
    channels keep the kernels that need no such memory, as long as they fit into the widest head.
    """
    tokens = size[0] * size[1]
    if tokens <= 256 or (q.is_cuda and q.shape[-1] + sum(size) > MAX_FUSED_WIDTH):
        return "mask"
    return "channels" if q.is_cuda or (q.requires_grad and torch.is_grad_enabled()) else "mask"


def relative_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    formulation: str | None = None,
) -> torch.Tensor:
    """Multi-head attention with decomposed relative positions.

    Args:
        q, k, v: queries (unscaled), keys and values (N, heads, H W, d); the result has the same shape.
        table_h, table_w: (H, H, d) and (W, W, d) from :func:`relative_table`.
        formulation: "mask" or "channels"; None takes the faster one.
    """
    formulation = formulation or choose_formulation(q, (table_h.shape[0], table_w.shape[0]))
    if formulation == "mask":
        return _with_mask(q, k, v, *_biases(q, table_h, table_w))
    return _with_channels(q, k, v, table_h, table_w)


def _biases(q: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q . Rh and q . Rw: (N, heads, HW, H) and (N, heads, HW, W)."""
    grid = q.unflatten(2, (table_h.shape[0], table_w.shape[0]))
    bias_h = torch.einsum("nhyxc,ykc->nhyxk", grid, table_h.to(q.dtype)).flatten(2, 3)
    bias_w = torch.einsum("nhyxc,xkc->nhyxk", grid, table_w.to(q.dtype)).flatten(2, 3)
    return bias_h, bias_w


def _with_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
) -> torch.Tensor:
    """A few heads at a time, their masks in one buffer: fresh memory for each would cost more than filling it."""
    elements = MASK_ELEMENTS.get(q.device.type, MANY_MASK_ELEMENTS)
    heads = max(1, elements // (q.shape[0] * q.shape[2] ** 2))
    recorded = torch.is_grad_enabled() and bias_h.requires_grad
    buffer = None
    out = []
    for q_, k_, v_, h_, w_ in zip(*(t.split(heads, 1) for t in (q, k, v, bias_h, bias_w)), strict=True):
        h_, w_ = h_[..., :, None], w_[..., None, :]
        if recorded or buffer is None:
            mask = buffer = h_ + w_
        else:
            mask = torch.add(h_, w_, out=buffer[:, : h_.shape[1]])
        out.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask.flatten(3)))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _with_channels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor
) -> torch.Tensor:
    dim, height, width = q.shape[-1], table_h.shape[0], table_w.shape[0]

    def query() -> torch.Tensor:
        return torch.cat([q * dim**-0.5, *_biases(q, table_h, table_w)], -1)

    def key() -> torch.Tensor:
        row = torch.eye(height, dtype=q.dtype, device=q.device).repeat_interleave(width, 0)  # (HW, H)
        column = torch.eye(width, dtype=q.dtype, device=q.device).repeat(height, 1)  # (HW, W)
        return torch.cat([k, torch.cat([row, column], -1).expand(*k.shape[:2], -1, -1)], -1)

    def value() -> torch.Tensor:  # the fused kernels ask for equal widths of query, key and value
        return F.pad(v, (0, height + width))

    wide = query(), key(), value()
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wide)
    if not recorded or inside_recompute() or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(*wide, attn_mask=None, dropout_p=0.0, scale=1.0)[..., :dim]

    # The backward pass would keep four tensors of dim + height + width channels, three times q, k and v on a 64 x 64
    # grid. Three of them are built again from q, k and v, which are kept anyway; the added channels of the fourth, the
    # result, are zero.
    builders: dict[int, Any] = {wide[0].data_ptr(): query, wide[1].data_ptr(): key, wide[2].data_ptr(): value}
    shape = wide[0].shape  # `pack` lives as long as what it keeps and must not refer to `wide`
    others: list[list[Any]] = []

    def pack(tensor: torch.Tensor) -> list[Any]:
        kept: list[Any] = [tensor]
        if tensor.shape == shape and tensor.dtype == q.dtype:
            kept[0] = builders.get(tensor.data_ptr(), tensor)
            others.append(kept)
        return kept

    def unpack(kept: list[Any]) -> torch.Tensor:
        with torch.no_grad():
            return kept[0] if isinstance(kept[0], torch.Tensor) else kept[0]()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = F.scaled_dot_product_attention(*wide, attn_mask=None, dropout_p=0.0, scale=1.0)
    for kept in others:
        if isinstance(kept[0], torch.Tensor) and kept[0].data_ptr() == out.data_ptr():
            kept[0] = functools.partial(_widened, out.detach()[..., :dim].clone(), shape, out.stride())
    return out[..., :dim]


def _widened(out: torch.Tensor, shape: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
    wide = torch.empty_strided(shape, stride, dtype=out.dtype, device=out.device).zero_()
    wide[..., : out.shape[-1]] = out
    return wide
