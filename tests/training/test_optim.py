# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from samda.adapters.base import adapter_parameters, regularization, trainable_parameters
from samda.errors import UsageError
from samda.networks.segmenter import SamSegmenter
from samda.training import PenalizedLoss, build_optimizer, build_schedule, parameter_groups

Make = Callable[..., SamSegmenter]

MIXTURES: list[dict[str, Any]] = [
    {"sam_da": {}},
    {"head": {}},
    {"decoder": {}},
    {"full": {}},
    {"salt": {"rank": 2}, "dka": {"width": 2}, "sam_da": {}},
    {"lora": {}, "norm": {}},
    {"lka": {}},
    {"bottleneck": {}},
]


@pytest.mark.parametrize("adapters", MIXTURES, ids=lambda adapters: "+".join(adapters))
def test_every_trainable_parameter_is_in_exactly_one_group(make_segmenter: Make, adapters: dict[str, Any]) -> None:
    network = make_segmenter(adapters=adapters)
    optimizer = build_optimizer(network)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in trainable_parameters(network).values())
    for group in optimizer.param_groups:
        dims = {p.ndim for p in group["params"]}
        assert dims <= {0, 1} if group["name"].endswith("/vectors") else min(dims) >= 2
        assert group["weight_decay"] == (0 if group["name"].endswith("/vectors") else 0.01)


def test_the_groups_are_what_adapters_and_head_declare(make_segmenter: Make) -> None:
    network = make_segmenter(adapters={"sam_da": {}, "decoder": {}})
    groups = parameter_groups(network)
    assert set(groups["adapters"]) == set(adapter_parameters(network))
    assert set(groups["head"]) == set(network.head_params())
    assert all(name.startswith("mask_decoder.") for name in groups["base"]) and groups["base"]


def test_rates_by_group(make_segmenter: Make) -> None:
    optimizer = build_optimizer(make_segmenter(adapters={"sam_da": {}}), {"adapters": 0.5, "head": 0.25, "base": 9.0})
    assert {group["name"].split("/")[0]: group["lr"] for group in optimizer.param_groups} == {
        "adapters": 0.5,
        "head": 0.25,
    }


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ({"head": 0.1}, "no rate for the group 'adapters'"),
        ({"adapters": 0.1, "head": 0.1, "encoder": 0.1}, "unknown group 'encoder'"),
        (0.0, "learning_rate of 'adapters' must be positive, got 0.0"),
    ],
)
def test_wrong_rates_are_refused(make_segmenter: Make, rate: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_optimizer(make_segmenter(adapters={"sam_da": {}}), rate)


@pytest.mark.parametrize("adapters", MIXTURES, ids=lambda adapters: "+".join(adapters))
def test_steps_move_nothing_but_the_declared_parameters(make_segmenter: Make, adapters: dict[str, Any]) -> None:
    network = make_segmenter(adapters=adapters)
    network.full_state_dict = True
    declared = set(trainable_parameters(network))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = build_optimizer(network, 1e-2)
    torch.manual_seed(0)
    network.train()
    for _ in range(3):  # gates and zero factors let the rest move from the second step on
        optimizer.zero_grad()
        network(torch.rand(2, 1, 64, 64)).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= declared
    assert {name for name in declared if name in network.head_params()} <= moved
    own = set(adapter_parameters(network))
    assert not own or len(own & moved) > len(own) / 2  # parts behind a ReLU or a softmax may rest


def test_the_schedule_rises_then_falls_to_zero(make_segmenter: Make) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = build_schedule(optimizer, epochs=5, iterations=4, warmup=0.2)  # 4 of 20 steps
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    assert rates[12] == pytest.approx(0.5)  # half way: step 4 + 8 of 16
    assert rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))


def test_a_warm_up_that_fills_the_training_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(UsageError, match="warmup is a share of the training"):
        build_schedule(optimizer, 1, 1, warmup=1.0)


def test_the_penalty_is_added_and_weight_0_changes_nothing(make_segmenter: Make) -> None:
    network = make_segmenter(adapters={"salt": {"rank": 4}})
    with torch.no_grad():  # at its start the penalty is 0, with gradient 0
        for name, parameter in network.named_parameters():
            if name.endswith("shift"):
                parameter.add_(0.5)
    logits, label = torch.randn(1, 2, 4, 4), torch.randint(2, (1, 1, 4, 4))

    def data_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return (logits.mean() - label.float().mean()).square()

    penalty = regularization(network)
    assert penalty > 0
    plain, weighted = (PenalizedLoss(data_loss, network, weight) for weight in (0.0, 0.1))
    assert torch.equal(plain(logits, label), data_loss(logits, label))
    torch.testing.assert_close(weighted(logits, label), data_loss(logits, label) + 0.1 * penalty)
    weighted(logits, label).backward()
    gradients = [p.grad for name, p in network.named_parameters() if name.endswith("shift")]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert not list(weighted.parameters())


def test_a_penalty_that_no_adapter_has_is_refused(make_segmenter: Make) -> None:
    network = make_segmenter(adapters={"lora": {"rank": 2}})
    PenalizedLoss(torch.nn.MSELoss(), network, 0.0)
    with pytest.raises(UsageError, match=r"regularization 0\.1"):
        PenalizedLoss(torch.nn.MSELoss(), network, 0.1)
