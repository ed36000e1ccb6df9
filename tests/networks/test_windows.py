# SPDX-License-Identifier: Apache-2.0
"""Attention in windows against the softmax over padded windows, written out."""

from __future__ import annotations

import pytest
import torch

from samda.networks.ops import bias_index, spans, window_attention, window_bias

HEADS, DIM = 2, 3


@pytest.mark.parametrize("window", [2, 3, 7])
def test_bias_index_numbers_distances_as_they_come(window: int) -> None:
    tokens = [(y, x) for y in range(window) for x in range(window)]
    numbers: dict[tuple[int, int], int] = {}
    for i, (y, x) in enumerate(tokens):
        for j, (y2, x2) in enumerate(tokens):
            number = numbers.setdefault((abs(y - y2), abs(x - x2)), len(numbers))
            assert bias_index(window)[i, j] == number


@pytest.mark.parametrize(
    ("size", "expected"),
    [(14, [(0, 14, 7)]), (16, [(0, 14, 7), (14, 16, 2)]), (5, [(0, 5, 5)]), (7, [(0, 7, 7)])],
)
def test_spans(size: int, expected: list) -> None:
    assert spans(size, 7) == expected


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded_softmax(qkv: torch.Tensor, padding: torch.Tensor, biases: torch.Tensor, window: int) -> torch.Tensor:
    """Every window filled with padding tokens, one at a time."""
    batch, height, width, channels = qkv.shape
    full = padding.expand(batch, height + -height % window, width + -width % window, channels).clone()
    full[:, :height, :width] = qkv
    out = torch.zeros(*full.shape[:3], channels // 3, dtype=qkv.dtype)
    for top in range(0, full.shape[1], window):
        for left in range(0, full.shape[2], window):
            place = (slice(None), slice(top, top + window), slice(left, left + window))
            tokens = full[place].reshape(batch, window**2, HEADS, 3, DIM)
            q, k, v = tokens.permute(3, 0, 2, 1, 4)
            weights = (q @ k.transpose(-2, -1) / DIM**0.5 + biases[:, bias_index(window)]).softmax(-1)
            out[place] = (weights @ v).transpose(1, 2).reshape(batch, window, window, -1)
    return out[:, :height, :width]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 4), (5, 7), (2, 3), (9, 4), (1, 1)])
def test_one_token_stands_for_all_padding(height: int, width: int) -> None:
    window, channels = 4, 3 * HEADS * DIM
    inputs = [noise(2, height, width, channels), noise(channels, seed=1), 2 * noise(HEADS, window**2, seed=2)]
    found_inputs, expected_inputs = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    qkv, padding, biases = found_inputs
    found = window_attention(
        qkv, padding, HEADS, window, lambda rows, columns: window_bias(biases[:, bias_index(window)], rows, columns)
    )
    expected = padded_softmax(*expected_inputs, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = noise(*found.shape, seed=3)
    for one, two in zip(
        torch.autograd.grad(found, found_inputs, upstream, allow_unused=True),
        torch.autograd.grad(expected, expected_inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(torch.zeros_like(two) if one is None else one, two, rtol=0, atol=1e-11)


def test_windows_without_padding_need_no_padding_token() -> None:
    qkv, biases = noise(1, 4, 8, 3 * HEADS * DIM), noise(HEADS, 16)
    found = window_attention(qkv, None, HEADS, 4, lambda *_: biases[:, bias_index(4)])
    expected = padded_softmax(qkv, torch.zeros(1).double(), biases, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_window_bias_of_a_window_with_two_real_tokens() -> None:
    bias = torch.arange(16.0).reshape(1, 4, 4)  # 2 x 2 tokens, of which the upper two are real
    padding = torch.tensor([2.0, 6.0]) + (1 + torch.tensor(1.0).exp()).log()  # log(exp(x) + exp(x + 1))
    expected = torch.cat([torch.tensor([[0.0, 1.0], [4.0, 5.0]]), padding[:, None]], 1)[None]
    torch.testing.assert_close(window_bias(bias, 1, 2), expected)
