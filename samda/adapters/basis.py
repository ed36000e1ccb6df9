# SPDX-License-Identifier: Apache-2.0
"""Singular bases that can be recognized again.

Parameters that live in a singular basis are worthless in another one, and an SVD is unique only up to the sign of every
pair (u_i, v_i), up to rotations where singular values repeat, and changes much with small changes of the weight where
they lie close. So a basis gets a signature: its singular values, and what every u_i and v_i say to one fixed vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from samda.errors import AdapterError

__all__ = ["check_reconstruction", "find_signs", "sign", "singular_basis"]

# entries of a signature are of order 1; the tolerance admits a copy in bfloat16, a rotated vector exceeds it
TOLERANCE = 1e-2


def singular_basis(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin SVD of a weight (out, in), k = min(out, in): U (out, k), s (k,) descending, V^T (k, in).

    It is computed in fp64 on the CPU, so that it does not depend on the device, and returned in fp32 (fp64 for a weight
    in fp64). Canonical signs: the entry of largest magnitude of each u_i is positive. A weight on the meta device has
    no values; its basis has none either.

    Raises:
        AdapterError: the weight is not finite; `name` is its layer.
    """
    k = min(weight.shape)
    if weight.is_meta:
        return weight.new_empty(len(weight), k), weight.new_empty(k), weight.new_empty(k, weight.shape[1])
    w = weight.double().cpu()
    if not torch.isfinite(w).all():
        raise AdapterError(f"{name}: the base weight holds values that are not finite; load the base weights first")
    if w.shape[0] >= w.shape[1]:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:  # tall matrices are decomposed about twice as fast
        v, s, ut = torch.linalg.svd(w.T, full_matrices=False)
        u, vt = ut.T, v.T
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    kept = torch.promote_types(weight.dtype, torch.float32)
    return (u * signs).to(kept).contiguous(), s.to(kept), (vt * signs[:, None]).to(kept).contiguous()


def sign(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor) -> torch.Tensor:
    """The signature (3, k) of a basis: s, g_out^T U and V^T g_in, with fixed vectors g of entries of order 1."""
    if u.is_meta:
        return s.new_empty(3, len(s))
    seen_by_u = _probe(len(u), u) @ u
    seen_by_v = vt @ _probe(vt.shape[1], vt)
    return torch.stack([s, seen_by_u, seen_by_v]).detach()


def _probe(length: int, like: torch.Tensor) -> torch.Tensor:
    """A fixed irregular vector of variance 1; a formula, since random generators may change between versions."""
    index = torch.arange(1, length + 1, dtype=torch.float64, device=like.device)
    return ((index * index * 0.6180339887498949) % 1.0 - 0.5).mul(12**0.5).to(like.dtype)


def find_signs(own: torch.Tensor, stored: torch.Tensor, name: str, source: str) -> torch.Tensor:
    """The signs (k,) that turn the basis of signature `own` into the one of signature `stored`.

    Raises:
        AdapterError: no choice of signs does; `name` is the layer, `source` where the stored signature comes from.
    """
    stored = stored.to(own.device, own.dtype)
    s, at_u, at_v = own
    s_stored, at_u_stored, at_v_stored = stored
    agreement = at_u * at_u_stored + at_v * at_v_stored
    signs = torch.where(agreement < 0, -1.0, 1.0).to(own.dtype)
    aligned = torch.stack([at_u * signs, at_v * signs]) - stored[1:]
    same = (s - s_stored).abs().max() <= TOLERANCE * s.max()
    if own.is_meta or (same and bool((aligned.abs() <= TOLERANCE * (1 + stored[1:].abs())).all())):
        return signs
    raise AdapterError(
        f"{name}: {source} was trained in another singular basis of this weight; load the base weights that it was "
        "trained on, or train with save_basis"
    )


def check_reconstruction(
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor], stored: Mapping[str, torch.Tensor], name: str, source: str
) -> None:
    """Refuse a stored basis (tensors u, s, vt) that does not give the same weight within 1e-3.

    Raises:
        AdapterError: `name` is the layer, `source` where the stored basis comes from.
    """
    u, s, vt = (tensor.float() for tensor in own)
    u2, s2, vt2 = (stored[key].to(u) for key in ("u", "s", "vt"))
    if float(torch.dist((u * s) @ vt, (u2 * s2) @ vt2)) > 1e-3 * float(torch.linalg.vector_norm(s)):
        raise AdapterError(f"{name}: {source} was trained on another base weight; load the base weights it names")
