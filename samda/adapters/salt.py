# SPDX-License-Identifier: Apache-2.0
"""SALT: singular value adaptation with low-rank transformation (arXiv 2503.16055).

With the thin SVD W = U diag(s) V^T of the frozen weight, k = min(out, in), split after the r largest values:

    Sigma' = ReLU( blockdiag( diag(alpha s[:r] + beta),  diag(s[r:]) + X Y ) )     (k, k), ReLU element by element
    W~     = U Sigma' V^T

Trained are alpha, beta (r,), X (k-r, d) and Y (d, k-r): 2 r + 2 d (k-r) parameters. `rank` is d, called rank in the
tables of the paper; `r` is the split, as a fraction max(1, floor(r k)). r = k is S-SAM (arXiv 2408.06447).

The recipe of the SALT paper (9.93 M parameters) also trains the neck's convolutions, the norms, the position table and
a layer for text prompts. Here SALT is the linear layers alone; nearest is `--adapter salt_256,norm`, with the norms.

X and Y depend on the singular basis of the training. An SVD is unique only up to the sign of every pair (u_i, v_i) and
up to rotations for equal singular values, and it is sensitive to small changes of the weight if they are close. Files
therefore contain a signature of the basis: the singular values, and projections of every u_i and v_i onto a fixed probe
vector.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from samda.adapters.base import Adapter, Choices, LinearAdapterConfig, is_int, random_normal, random_uniform, zeros
from samda.adapters.sites import LinearSite, Site
from samda.errors import AdapterError, is_finite
from samda.networks.ops import linear

# entries of a signature are of order 1; the tolerance covers a copy in bfloat16, but not a rotated vector
TOLERANCE = 1e-2


def singular_basis(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin SVD of a weight (out, in), k = min(out, in): U (out, k), s (k,) descending, V^T (k, in).

    Computed in fp64 on the CPU, independent of the device, and returned in fp32 (fp64 for a weight in fp64). Canonical
    signs: the entry of largest magnitude of each u_i is positive. The basis of a weight on the meta device is on the
    meta device. A weight that is not finite is refused; `name` is its layer.
    """
    k = min(weight.shape)
    if weight.is_meta:
        return weight.new_empty(len(weight), k), weight.new_empty(k), weight.new_empty(k, weight.shape[1])
    w = weight.double().cpu()
    if not torch.isfinite(w).all():
        raise AdapterError(f"{name}: the base weight holds values that are not finite; load the base weights first")
    if w.shape[0] >= w.shape[1]:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:  # the SVD of tall matrices is about twice as fast
        v, s, ut = torch.linalg.svd(w.T, full_matrices=False)
        u, vt = ut.T, v.T
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    kept = torch.promote_types(weight.dtype, torch.float32)
    return (u * signs).to(kept).contiguous(), s.to(kept), (vt * signs[:, None]).to(kept).contiguous()


def signature_of(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor) -> torch.Tensor:
    """The signature (3, k) of a basis: s, g_out^T U and V^T g_in, with fixed vectors g of entries of order 1."""
    if u.is_meta:
        return s.new_empty(3, len(s))
    at_u = _probe(len(u), u) @ u
    at_v = vt @ _probe(vt.shape[1], vt)
    return torch.stack([s, at_u, at_v]).detach()


def _probe(length: int, like: torch.Tensor) -> torch.Tensor:
    """A fixed irregular vector of variance 1, by a formula that does not depend on random generators."""
    index = torch.arange(1, length + 1, dtype=torch.float64, device=like.device)
    return ((index * index * 0.6180339887498949) % 1.0 - 0.5).mul(12**0.5).to(like.dtype)


def find_signs(own: torch.Tensor, stored: torch.Tensor, name: str, source: str) -> torch.Tensor:
    """The signs (k,) that map the basis of signature `own` to that of signature `stored`.

    If there are none, AdapterError names the layer (`name`) and the `source` of the stored signature.
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
    """Refuse a stored basis (tensors u, s, vt) that does not reproduce the weight within 1e-3."""
    u, s, vt = (tensor.float() for tensor in own)
    u2, s2, vt2 = (stored[key].to(u) for key in ("u", "s", "vt"))
    if float(torch.dist((u * s) @ vt, (u2 * s2) @ vt2)) > 1e-3 * float(torch.linalg.vector_norm(s)):
        raise AdapterError(f"{name}: {source} was trained on another base weight; load the base weights it names")


class SaltAdapter(Adapter):
    """SALT of one linear layer.

    The change of the weight, dW = U (Sigma' - diag(s)) V^T, is exactly zero at the start. `scale` is alpha - 1, so that
    weight decay pulls towards the base; `shift` is beta, `left` X and `right` Y.

    **Cost.** ReLU makes the tail of Sigma' a full matrix, so no small form of dW exists. Forming dW or W~ in every step
    costs products of the weight's own size, and its gradient is also dense. Neither is needed: since W = U diag(s) V^T,
    the adapted layer is x V Sigma'^T U^T. That takes the place of the base layer (:meth:`fused_forward`), costs only
    products with the smaller side more than it, and keeps only x V for the backward pass. With many tokens it is
    cheaper still to multiply the tail once into V (or U, whichever is square) than into every token.
    Three cases add the delta to the untouched base layer instead: the start, where the sum is the base layer's output
    bit for bit; reduced precision, where three roundings would harm the frozen part; and a site where another adapter
    has replaced the base layer.

    **Basis.** Flipped signs are corrected when a file is loaded, another basis is refused. `save_basis` stores U, s and
    V as well.
    """

    mergeable = True

    def __init__(self, site: LinearSite, config: SaltConfig, r: int, generator: torch.Generator) -> None:
        super().__init__()
        self.site_name = site.info.name
        self.relu = config.activation == "relu"
        self.save_basis = config.save_basis
        self._moved = False
        self.u: torch.Tensor
        self.s: torch.Tensor
        self.vt: torch.Tensor
        k = min(site.out_features, site.in_features)
        self.r, self.m, d = r, k - r, config.rank
        self.scale = zeros(r)
        self.shift = zeros(r)
        if config.init == "paper":
            self.left = random_normal(self.m, d, std=0.01, generator=generator)
            self.right = random_normal(d, self.m, std=0.01, generator=generator)
        else:
            self.left = random_uniform(self.m, d, bound=math.sqrt(6 / d), generator=generator)
            self.right = zeros(d, self.m)
        for name, tensor in zip(("u", "s", "vt"), singular_basis(site.weight.detach(), self.site_name), strict=True):
            self.register_buffer(name, tensor, persistent=self.save_basis)
        self.register_buffer("signature", signature_of(self.u, self.s, self.vt))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> x dW^T (..., out)."""
        return linear(*self._halves(x, change=True))

    def fused_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """x (..., in) -> x W~^T + bias (..., out)."""
        if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
            return None
        if self._at_identity():
            return None if torch.is_grad_enabled() else linear(x, weight, bias)
        return linear(*self._halves(x, change=False), bias)

    def _at_identity(self) -> bool:
        """Is dW exactly zero? On a GPU this synchronizes and is checked only until it is not."""
        if self.scale.is_cpu or not self._moved:
            self._moved = bool(self.scale.any() or self.shift.any() or (self.left.any() and self.right.any()))
        return not self._moved

    def _halves(self, x: torch.Tensor, change: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, F) with q F^T = x W~^T, or x dW^T for `change`; the caller computes the last, largest product."""
        top, tail = self._core(change)
        top, tail = top.to(x.dtype), None if tail is None else tail.to(x.dtype)
        if tail is not None and self._folds(x.shape[:-1].numel()):
            if len(self.u) >= self.vt.shape[1]:  # V is the square one
                return linear(x, torch.cat([top[:, None] * self.vt[: self.r], tail @ self.vt[self.r :]])), self.u
            return linear(x, self.vt), torch.cat([self.u[:, : self.r] * top, self.u[:, self.r :] @ tail], 1)
        return self._mix(linear(x, self.vt), top, tail, change), self.u

    def _mix(self, p: torch.Tensor, top: torch.Tensor, tail: torch.Tensor | None, change: bool) -> torch.Tensor:
        """p Sigma'^T for p (..., k), or p (Sigma' - diag(s))^T for `change`."""
        p, p_tail = p.split([self.r, self.m], dim=-1)
        if tail is not None:
            return torch.cat([p * top, linear(p_tail, tail)], dim=-1)
        q_tail = linear(linear(p_tail, self.right.to(p)), self.left.to(p))
        return torch.cat([p * top, q_tail if change else q_tail + p_tail * self.s[self.r :]], dim=-1)

    def _folds(self, tokens: int) -> bool:
        """Is it cheaper to multiply the tail into V (or U) than into the tokens, in forward and backward pass?"""
        k = self.r + self.m
        return tokens * k**2 + 2 * self.m**2 * k < 3 * tokens * self.m**2

    def _core(self, change: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Diagonal (r,) and tail (m, m) of Sigma', less diag(s) for `change`, in fp32 or wider.

        Without ReLU the tail is X Y and is not computed: None.
        """
        wide = torch.promote_types(self.s.dtype, torch.float32)
        with torch.autocast(self.s.device.type, enabled=False):
            scale, shift, s = self.scale.to(wide), self.shift.to(wide), self.s.to(wide)
            s, s_tail = s.split([self.r, self.m])
            top = (1 + scale) * s + shift
            if not self.relu:
                return top - s if change else top, None
            top = top.relu()
            tail = torch.addmm(torch.diag(s_tail), self.left.to(wide), self.right.to(wide)).relu()
            return (top - s, tail - torch.diag(s_tail)) if change else (top, tail)

    def delta(self) -> torch.Tensor:
        wide = torch.promote_types(self.s.dtype, torch.float32)
        return linear(self.u.to(wide), self._mix(self.vt.T.to(wide), *self._core(change=True), change=True))

    def regularizer(self) -> torch.Tensor:
        """|| alpha s[:r] + beta - s[:r] || + || X Y ||, Frobenius norms; 0 with gradient 0 at the start."""
        top = torch.linalg.vector_norm(self.scale * self.s[: self.r] + self.shift)
        return top + torch.linalg.vector_norm(self.left @ self.right)

    @torch.no_grad()
    def rebase(self, weight: torch.Tensor) -> None:
        """Compute the SVD of a newly loaded base weight, if it has changed."""
        if not torch.allclose((self.u * self.s) @ self.vt, weight, rtol=0, atol=1e-5 * float(self.s.max())):
            basis = (t.to(weight.device, weight.dtype) for t in singular_basis(weight.detach(), self.site_name))
            self.u, self.s, self.vt = basis
            self.signature = signature_of(self.u, self.s, self.vt)

    def check_state(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        if self.save_basis:
            check_reconstruction((self.u, self.s, self.vt), tensors, self.site_name, source)
        else:
            find_signs(self.signature, tensors["signature"], self.site_name, source)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "signature")
        if not self.save_basis and stored is not None and stored.shape == self.signature.shape:
            try:
                signs = find_signs(self.signature, stored, self.site_name, "the state dict")
                self.u, self.vt = self.u * signs, self.vt * signs[:, None]
            except AdapterError as error:
                args[-1].append(str(error))  # `error_msgs`
        self._moved = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"r={self.r}, rank={self.left.shape[1]}, tail={self.m}, activation={'relu' if self.relu else None}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaltConfig(LinearAdapterConfig):
    """Settings of SALT."""

    name: ClassVar[str] = "salt"
    positive: ClassVar[tuple[str, ...]] = ("rank",)
    choices: ClassVar[Choices] = {"activation": ("relu", None), "init": ("identity", "paper")}

    rank: int = 4  # d, of X Y; the paper uses up to 256
    r: int | float | str = "preset"  # number of scaled values, fraction of k, or "preset" (k - 8; 50 in the MLP)
    activation: str | None = "relu"  # "relu" as in the paper, or null
    init: str = "identity"  # "identity": Y = 0; "paper": X and Y from N(0, 0.01^2), as in the released SAM code
    save_basis: bool = False  # store U, s, V in the file (large; for SVDs that cannot be reproduced)

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = isinstance(self.r, float) and is_finite(self.r) and 0 < self.r <= 1
        valid = self.r == "preset" or is_int(self.r, 0) or fraction
        self.require("r", valid, "'preset', an integer or a fraction <= 1.0")

    def split(self, site: LinearSite) -> int:
        """r at `site`, clipped to [0, k]; a fraction is at least one value."""
        k = min(site.out_features, site.in_features)
        if self.r == "preset":
            return max(k - 8, 0) if site.info.role in ("attn.qkv", "attn.proj") else min(50, k)
        return max(1, math.floor(self.r * k)) if isinstance(self.r, float) else min(int(self.r), k)

    def review(self, places: Sequence[Site]) -> None:
        tails = [min(s.out_features, s.in_features) - self.split(s) for s in places if isinstance(s, LinearSite)]
        wasteful = [m for m in tails if 0 < m < 2 * self.rank]
        if wasteful:
            warnings.warn(
                f"salt: in {len(wasteful)} of {len(places)} layers, rank {self.rank} has more parameters than a full "
                f"tail (of {min(wasteful)} values and more); a smaller rank or r gives the same freedom",
                stacklevel=4,
            )

    def build(self, site: Site, generator: torch.Generator) -> SaltAdapter:
        assert isinstance(site, LinearSite)
        return SaltAdapter(site, self, self.split(site), generator)
