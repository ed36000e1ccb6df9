# SPDX-License-Identifier: Apache-2.0
"""Attention with decomposed relative positions against the written-out sum and against segment_anything."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from segment_anything.modeling.image_encoder import get_rel_pos

from samda.networks import attention
from samda.networks.attention import DerivedTensors, choose_formulation, relative_attention, relative_table
from samda.networks.recompute import recompute

FORMULATIONS = ["mask", "channels"]


def random_inputs(n: int, heads: int, height: int, width: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    shapes = [(n, heads, height * width, dim)] * 3 + [(2 * height - 1, dim), (2 * width - 1, dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rh: torch.Tensor, rw: torch.Tensor) -> torch.Tensor:
    """One query at a time, the bias from the tables' own rows: distance 0 is the middle row."""
    height, width = (len(rh) + 1) // 2, (len(rw) + 1) // 2
    out = torch.empty_like(q)
    for n in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(height * width):
                query, (y, x) = q[n, head, i], divmod(i, width)
                logits = []
                for j in range(height * width):
                    y2, x2 = divmod(j, width)
                    bias = query @ rh[y - y2 + height - 1] + query @ rw[x - x2 + width - 1]
                    logits.append(query @ k[n, head, j] / math.sqrt(q.shape[-1]) + bias)
                out[n, head, i] = torch.softmax(torch.stack(logits), 0) @ v[n, head]
    return out


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_equals_the_written_out_sum(formulation: str) -> None:
    q, k, v, rh, rw = random_inputs(2, 2, 3, 4, 6)
    found = relative_attention(q, k, v, relative_table(rh, 3), relative_table(rw, 4), formulation)
    torch.testing.assert_close(found, written_out(q, k, v, rh, rw), rtol=0, atol=1e-12)


def test_formulations_have_equal_gradients() -> None:
    gradients = []
    for formulation in FORMULATIONS:
        inputs = [tensor.requires_grad_() for tensor in random_inputs(1, 2, 4, 3, 8)]
        q, k, v, rh, rw = inputs
        out = relative_attention(q, k, v, relative_table(rh, 4), relative_table(rw, 3), formulation)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_that_are_built_again_give_the_same_gradients(autocast: bool) -> None:
    """Within a recomputation the widened query, key, value and result are kept as they are."""
    gradients = []
    for keep in (False, True):
        dtype = torch.bfloat16 if autocast else torch.float32  # as linear layers give them
        inputs = [tensor.to(dtype).requires_grad_() for tensor in random_inputs(2, 2, 4, 3, 8)]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
            return relative_attention(q, k, v, relative_table(tables[0], 4), relative_table(tables[1], 3), "channels")

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = recompute(attend, *inputs) if keep else attend(*inputs)
        gradients.append(torch.autograd.grad(out.float().square().sum(), inputs))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_heads_in_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, rh, rw = random_inputs(2, 5, 4, 4, 8)
    tables = relative_table(rh, 4), relative_table(rw, 4)
    whole = relative_attention(q, k, v, *tables, "mask")
    monkeypatch.setitem(attention.MASK_ELEMENTS, "cpu", 2 * 2 * 16**2)  # two heads at a time: 2, 2 and 1
    assert torch.equal(relative_attention(q, k, v, *tables, "mask"), whole)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_half_precision_stays_near(formulation: str) -> None:
    q, k, v, rh, rw = random_inputs(2, 2, 6, 4, 16)
    expected = relative_attention(q, k, v, relative_table(rh, 6), relative_table(rw, 4))
    half = [tensor.bfloat16() for tensor in (q, k, v)]
    found = relative_attention(*half, relative_table(rh, 6), relative_table(rw, 4), formulation)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("size", [4, 7, 11])
def test_table_follows_the_size_as_in_sam(size: int) -> None:
    stored = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))  # made for 7 tokens
    assert torch.equal(relative_table(stored, size), get_rel_pos(size, size, stored))


def test_a_small_grid_or_no_gradient_takes_the_mask_on_a_cpu() -> None:
    q = torch.zeros(1, 1, 1, 8)
    assert choose_formulation(q, (16, 16)) == "mask"
    assert choose_formulation(q, (64, 64)) == "mask"
    q.requires_grad_()
    assert choose_formulation(q, (16, 16)) == "mask"
    assert choose_formulation(q, (32, 48)) == "channels"


def test_derived_tensors_are_remembered_until_the_parameter_changes() -> None:
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    derived, calls = DerivedTensors(), []

    def double() -> torch.Tensor:
        calls.append(1)
        return 2 * parameter

    assert derived(parameter, "a", double) is derived(parameter, "a", double)
    assert len(calls) == 1
    parameter.add_(1)
    assert derived(parameter, "a", double).tolist() == [4, 4, 4]
    assert derived(parameter, "b", double).tolist() == [4, 4, 4]
    assert len(calls) == 3


def test_derived_tensors_keep_the_graph_of_a_trained_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    derived = DerivedTensors()
    for _ in range(2):  # a second backward pass would fail on a remembered graph
        derived(parameter, "a", lambda: 2 * parameter).sum().backward()
    assert parameter.grad.tolist() == [4, 4, 4]


def test_derived_tensors_of_inference_mode_serve_training() -> None:
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    derived = DerivedTensors()
    with torch.inference_mode():
        derived(frozen, "a", lambda: frozen * 2)
    x = torch.ones(3, requires_grad=True)
    (x * derived(frozen, "a", lambda: frozen * 2)).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_derived_tensors_are_not_copied() -> None:
    derived = DerivedTensors()
    parameter = torch.ones(2)
    derived(parameter, "a", lambda: parameter * 2)
    assert not copy.deepcopy(derived)._kept
    assert not pickle.loads(pickle.dumps(derived))._kept
