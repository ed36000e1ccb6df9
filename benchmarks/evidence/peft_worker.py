# SPDX-License-Identifier: Apache-2.0
"""The comparison of `peft_lora.py`, in the environment that holds peft: `python peft_worker.py FOLDER`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn as nn
from monai.losses import DiceCELoss
from peft.tuners.lora import LoraLayer

from samda.adapters import LoraConfig, sites
from samda.adapters.sites import Site
from samda.networks.segmenter import SamSegmenter
from samda.training import build_schedule

Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # layer -> A (rank, in), B (out, rank)


def of_samda(settings: dict[str, Any]) -> tuple[SamSegmenter, Pairs]:
    """The network with samda's adapters, and their parameters."""
    lora = {key: settings[key] for key in ("rank", "alpha", "seed")}
    network = SamSegmenter("vit_t", num_classes=settings["num_classes"], adapters={"lora": lora})
    adapters = {site.info.name: site.adapters["lora"] for site in sites(network).values() if "lora" in site.adapters}
    return network, {name: (adapter.down, adapter.up) for name, adapter in adapters.items()}


def of_peft(settings: dict[str, Any]) -> tuple[SamSegmenter, Pairs]:
    """The network with peft's adapters in the layers that samda adapts, and their parameters."""
    network = SamSegmenter("vit_t", num_classes=settings["num_classes"], adapters={"head": {}})
    roles = LoraConfig().serves()
    found = {path: module for path, module in network.named_modules() if isinstance(module, Site)}
    targets = [path for path, site in found.items() if site.info.role in roles]
    config = peft.LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=targets)
    head = set(network.head_params())
    peft.inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name or name in head)
    layers = {m.base_layer.info.name: m for m in network.modules() if isinstance(m, LoraLayer)}
    return network, {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}


def furthest(a: Pairs, b: Pairs) -> float:
    """Largest difference between the parameters of two sets of adapters."""
    return max(float((p - q).detach().abs().max()) for name in a for p, q in zip(a[name], b[name], strict=True))


@torch.no_grad()
def logits_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, K, H, W) without training anything."""
    network.eval()
    return torch.cat([network(part) for part in images.split(4)])


def main(folder: Path) -> None:
    """Read `data.pt` and `settings.json`; write `result.json` and `predicted.pt`."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    data = torch.load(folder / "data.pt", weights_only=True)
    networks: dict[str, SamSegmenter] = {}
    adapters: dict[str, Pairs] = {}
    networks["samda"], adapters["samda"] = of_samda(settings)
    networks["peft"], adapters["peft"] = of_peft(settings)
    ours, theirs = adapters["samda"], adapters["peft"]
    assert ours.keys() == theirs.keys(), "the two adapt other layers"
    generator = torch.Generator().manual_seed(settings["seed"])
    with torch.no_grad():
        for name in ours:  # with B zero both would give the base's output, whatever they compute
            ours[name][1].normal_(0, 0.02, generator=generator)
            for mine, other in zip(ours[name], theirs[name], strict=True):
                other.copy_(mine)
        at_start = {name: logits_of(network, data["scored"][:2]) for name, network in networks.items()}
        for a in (ours, theirs):
            for _, up in a.values():
                up.zero_()
        base = logits_of(networks["samda"], data["scored"][:2])
    start = {name: tuple(nn.Parameter(p.detach().clone()) for p in pair) for name, pair in ours.items()}

    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimizers, schedules, losses, seconds = {}, {}, {}, {}
    for name, network in networks.items():
        groups = [
            {"params": [p for pair in adapters[name].values() for p in pair], "lr": 1e-3},
            {"params": [network.get_parameter(path) for path in network.head_params()], "lr": 3e-3},
        ]
        optimizers[name] = torch.optim.AdamW(groups, weight_decay=0.01)
        schedules[name] = build_schedule(optimizers[name], epochs=1, iterations=settings["steps"], warmup=0.1)
        losses[name], seconds[name] = [], []
    for step in range(settings["steps"]):
        chosen = torch.randint(len(data["images"]), (settings["batch_size"],), generator=generator)
        order = list(networks) if step % 2 else list(networks)[::-1]  # neither is always the first
        for name in order:
            begin = time.perf_counter()
            networks[name].train()
            optimizers[name].zero_grad(set_to_none=True)
            value = loss(networks[name](data["images"][chosen]), data["labels"][chosen])
            value.backward()
            optimizers[name].step()
            schedules[name].step()
            seconds[name].append(time.perf_counter() - begin)
            losses[name].append(float(value))

    final = {name: logits_of(network, data["scored"]) for name, network in networks.items()}
    torch.save({name: values.argmax(1).to(torch.uint8) for name, values in final.items()}, folder / "predicted.pt")
    result: dict[str, Any] = {
        "versions": {"peft": peft.__version__, "torch": torch.__version__},
        "layers": len(ours),
        "parameters": sum(p.numel() for pair in ours.values() for p in pair),
        "outputs": float((at_start["samda"] - at_start["peft"]).abs().max()),
        "outputs_moved": float((at_start["samda"] - base).abs().max()),
        "losses": max(abs(a - b) for a, b in zip(losses["samda"], losses["peft"], strict=True)),
        "weights": furthest(ours, theirs),
        "changed": furthest(ours, start),
        "logits": float((final["samda"] - final["peft"]).abs().max()),
    }
    for name in networks:
        timed = seconds[name][1:] or seconds[name]  # the first step warms up
        result[name] = {"step_seconds": round(statistics.median(timed), 4), "losses": losses[name]}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
