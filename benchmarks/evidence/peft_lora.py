# SPDX-License-Identifier: Apache-2.0
"""samda's LoRA against Hugging Face's peft: the same linear layers, the same values at the start, the same steps.

Both adapt the same `vit_t` and train the same class head on slices of patient A, in one process and in turns. peft
lives in an environment of its own, which is made on the first call (`peft.txt`); there, this module is the program.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from monai.losses import DiceCELoss

from samda import SamSegmenter, fetch_examples
from samda.adapters import LoraConfig, sites
from samda.adapters.sites import Site
from samda.data import build_preprocessing
from samda.training import SliceDataset, build_schedule

STEPS, SLICES, BATCH = 20, 8, 4
LORA = {"rank": 4, "alpha": 4, "seed": 0}

Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # layer -> A (rank, in), B (out, rank)


def compare() -> dict[str, Any]:
    """Train with both and compare the numbers.

    Returns:
        {"layers", "parameters": of the adapters, the largest absolute differences "outputs" (of the logits before the
        first step, with random A and B), "losses", "weights" (A and B after training), "logits" (after training),
        "changed": by how much training moved A and B, "step_seconds": median of "samda" and "peft"}

    Raises:
        NotRun: the environment cannot be made, or the program failed.
    """
    from .apart import interpreter, run_there

    example = fetch_examples()["A"]
    data = SliceDataset([example.case], build_preprocessing(example.task, labels=True), example.task)
    images, labels = (torch.as_tensor(values[0]) for values in (data.images, data.labels))
    filled = [i for i in range(len(labels)) if labels[i].any()][:: max(1, len(labels) // SLICES)][:SLICES]
    content = {"images": images[filled].float(), "labels": labels[filled].to(torch.uint8)}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(content | {"num_classes": example.task.num_classes}, Path(folder) / "data.pt")
        command = [interpreter("peft"), "-m", "benchmarks.evidence.peft_lora", folder]
        return json.loads(run_there(command, 3600, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1").splitlines()[-1])


def of_samda(num_classes: int) -> tuple[SamSegmenter, Pairs]:
    """The network with samda's adapters, and their parameters."""
    network = SamSegmenter("vit_t", num_classes=num_classes, adapters={"lora": LORA})
    adapters = {site.info.name: site.adapters["lora"] for site in sites(network).values() if "lora" in site.adapters}
    return network, {name: (adapter.down, adapter.up) for name, adapter in adapters.items()}


def of_peft(num_classes: int) -> tuple[SamSegmenter, Pairs]:
    """The network with peft's adapters in the layers that samda adapts, and their parameters."""
    import peft
    from peft.tuners.lora import LoraLayer

    network = SamSegmenter("vit_t", num_classes=num_classes, adapters={"head": {}})
    roles = LoraConfig().serves()
    found = {path: module for path, module in network.named_modules() if isinstance(module, Site)}
    targets = [path for path, site in found.items() if site.info.role in roles]
    head = set(network.head_params())
    config = peft.LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=targets)
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
    return network.eval()(images)


def main(folder: Path) -> dict[str, Any]:
    """The comparison on `folder`/data.pt, see :func:`compare`."""
    data = torch.load(folder / "data.pt", weights_only=True)
    networks: dict[str, SamSegmenter] = {}
    adapters: dict[str, Pairs] = {}
    for name, build in (("samda", of_samda), ("peft", of_peft)):
        networks[name], adapters[name] = build(data["num_classes"])
    ours, theirs = adapters["samda"], adapters["peft"]
    assert ours.keys() == theirs.keys(), "the two adapt other layers"
    generator, probe = torch.Generator().manual_seed(0), data["images"][:2]
    with torch.no_grad():
        for name in ours:  # with B zero both would give the base's output, whatever they compute
            ours[name][1].normal_(0, 0.02, generator=generator)
            for mine, other in zip(ours[name], theirs[name], strict=True):
                other.copy_(mine)
        at_start = {name: logits_of(network, probe) for name, network in networks.items()}
        for _, up in (pair for pairs in (ours, theirs) for pair in pairs.values()):
            up.zero_()
    start = {name: tuple(nn.Parameter(p.detach().clone()) for p in pair) for name, pair in ours.items()}

    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimizers, schedules, losses, seconds = {}, {}, {}, {}
    for name, network in networks.items():
        groups = [
            {"params": [p for pair in adapters[name].values() for p in pair], "lr": 1e-3},
            {"params": [network.get_parameter(path) for path in network.head_params()], "lr": 3e-3},
        ]
        optimizers[name] = torch.optim.AdamW(groups, weight_decay=0.01)
        schedules[name] = build_schedule(optimizers[name], epochs=1, iterations=STEPS, warmup=0.1)
        losses[name], seconds[name] = [], []
    for step in range(STEPS):
        chosen = torch.randint(len(data["images"]), (BATCH,), generator=generator)
        for name in list(networks)[:: 1 if step % 2 else -1]:  # neither is always the first
            begin = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            value = loss(networks[name].train()(data["images"][chosen]), data["labels"][chosen])
            value.backward()
            optimizers[name].step()
            schedules[name].step()
            seconds[name].append(time.perf_counter() - begin)
            losses[name].append(float(value))
    final = {name: logits_of(network, probe) for name, network in networks.items()}
    return {
        "layers": len(ours),
        "parameters": sum(p.numel() for pair in ours.values() for p in pair),
        "outputs": float((at_start["samda"] - at_start["peft"]).abs().max()),
        "losses": max(abs(a - b) for a, b in zip(losses["samda"], losses["peft"], strict=True)),
        "weights": furthest(ours, theirs),
        "changed": furthest(ours, start),
        "logits": float((final["samda"] - final["peft"]).abs().max()),
        "step_seconds": {name: round(statistics.median(took[1:]), 4) for name, took in seconds.items()},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
