# SPDX-License-Identifier: Apache-2.0
"""Rows of speed.py about training: SALT, embeddings at hand, memory of a step."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import monai.losses
import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import Options, Row, interleave, median, relative_error
from rivals import OriginalTinyViT, RebuiltSalt, written_out_attention
from segment_anything import sam_model_registry

from samda.adapters import attach, build_configs
from samda.adapters.base import modules
from samda.adapters.sites import LinearSite, SiteInfo
from samda.networks import vit
from samda.networks.segmenter import SamSegmenter
from samda.training.loss import DiceCELoss

LOSS = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}  # as in train.json

__all__ = ["embeddings", "salt", "salt_step", "training_memory"]


def salt(options: Options) -> Iterator[Row]:
    """SALT on the four linear layers of a ViT-B block, 1024 tokens, forward and backward."""
    device, repeats = options.device, options.repeats
    shapes = {"attn.qkv": (768, 2304), "attn.proj": (768, 768), "mlp.fc1": (768, 3072), "mlp.fc2": (3072, 768)}
    for rank, lora_goal in ((4, 1.35), (256, 1.15)):
        layers: dict[str, list[nn.Module]] = {
            "samda SALT": [],
            "published formula": [],
            f"LoRA rank {rank}": [],
            "plain linear": [],
        }
        torch.manual_seed(0)
        for role, (inside, outside) in shapes.items():
            site = LinearSite(inside, outside, SiteInfo(f"encoder.0.{role}", "linear", role, 0, inside))
            nn.init.normal_(site.weight, std=0.03)
            model = nn.Sequential(site)
            layers["plain linear"].append(copy.deepcopy(model).requires_grad_(False).to(device))
            for name, key in ((f"LoRA rank {rank}", "lora"), ("samda SALT", "salt")):
                adapted = copy.deepcopy(model)
                attach(adapted, build_configs({key: {"rank": rank}}))
                with torch.no_grad():  # as in the midst of training: nothing is zero any more
                    for parameter in adapted.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter) * 1e-2)
                layers[name].append(adapted.to(device))
            adapter = layers["samda SALT"][-1][0].adapters["salt"]
            layers["published formula"].append(
                RebuiltSalt(adapter, layers["samda SALT"][-1][0].bias.detach()).to(device)
            )
        inputs = [torch.randn(1, 1024, inside, device=device, requires_grad=True) for inside, _ in shapes.values()]

        def step(modules: list[nn.Module], inputs: list[torch.Tensor] = inputs) -> None:
            for module, x in zip(modules, inputs, strict=True):
                module(x).square().mean().backward()

        same = max(
            relative_error(ours(x), theirs(x))
            for ours, theirs, x in zip(layers["samda SALT"], layers["published formula"], inputs, strict=True)
        )
        seconds = interleave({name: lambda m=m: step(m) for name, m in layers.items()}, repeats, 2, device)
        ours, formula, lora = (median(seconds[n]) for n in ("samda SALT", "published formula", f"LoRA rank {rank}"))
        yield Row(
            f"SALT d = {rank}, linear layers of a ViT-B block, 1024 tokens, forward + backward",
            "published formula / LoRA of the same rank",
            f">= 1.6x faster / <= {lora_goal}x its time",
            seconds,
            f"{formula / ours:.2f}x faster / {ours / lora:.2f}x LoRA",
            formula / ours >= 1.6 and ours / lora <= lora_goal,
            f"largest difference to the formula {same:.1e}",
        )


def embeddings(options: Options) -> Iterator[Row]:
    """Training that leaves the encoder unchanged: slices per second, encoding every step against embeddings at hand."""
    device, repeats = options.device, options.repeats
    cases = (("vit_t", 256, 8, 8.0), ("vit_b", 1024, 1, 20.0))
    for backbone, size, batch, goal in cases:
        torch.manual_seed(0)
        network = SamSegmenter(backbone, num_classes=7, weights=None, adapters={"sam_da": {}}).to(device).train()
        if backbone == "vit_t":
            original: nn.Module = OriginalTinyViT(network.image_encoder, size).train(False).requires_grad_(False)
        else:  # speed does not depend on the weights
            original = sam_model_registry["vit_b"]().image_encoder.eval().requires_grad_(False)
        original.to(device)
        image = torch.rand(batch, 1, size, size, device=device)
        label = torch.randint(0, 7, (batch, 1, size, size), device=device)
        with torch.no_grad():
            embedding = network.encode(image)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)

        def step(x, embedded=True, loss=DiceCELoss, network=network, label=label, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            loss(**LOSS)(network(x, embedded=embedded), label).backward()
            optimizer.step()

        def encoded_by_the_original(step=step, image=image, original=original) -> None:
            with torch.no_grad():
                embedded = original(image.expand(-1, 3, -1, -1))
            step(embedded, loss=monai.losses.DiceCELoss)

        runs = {
            "original encoder every step": encoded_by_the_original,
            "samda's encoder every step": lambda s=step, x=image: s(x, False),
            "embeddings at hand": lambda s=step, x=embedding: s(x, True),
        }
        seconds = interleave(runs, repeats if size < 1024 else min(repeats, 2), device=device)
        slow, own, fast = (median(values) for values in seconds.values())
        yield Row(
            f"training SAM-DA + class head, {backbone} at {size} px, batch {batch}",
            "the original encoder in every step, MONAI's loss",
            f">= {goal:.0f}x slices per second",
            seconds,
            f"{slow / fast:.1f}x ({batch / slow:.2f} against {batch / fast:.2f} slices/s)",
            slow / fast >= goal,
            f"{own / fast:.1f}x samda's own encoder in every step; cache {embedding[0].nbytes / 1e6:.2f} MB and "
            f"{(own - fast) / batch:.2f} s once per slice and view",
        )


def salt_step(options: Options) -> Iterator[Row]:
    """A whole training step (forward, loss, backward, optimizer) of a ViT-B with SALT in all its linear layers."""
    size, classes = 512, 7
    image = torch.rand(1, 1, size, size, device=options.device)
    label = torch.randint(0, classes, (1, size, size), device=options.device)
    for rank in (4, 256):
        runs: dict[str, Callable[[], object]] = {}
        base = SamSegmenter("vit_b", classes, weights=None)
        salted = copy.deepcopy(base)
        attach(salted, build_configs({"salt": {"rank": rank}}))  # the decompositions take their time: once
        attach(base, build_configs({"lora": {"rank": rank}}))
        for name, model in (("samda SALT", salted), ("published formula", salted), (f"LoRA rank {rank}", base)):
            torch.manual_seed(0)
            network = copy.deepcopy(model)
            for _, _, adapter in modules(network):
                for parameter in adapter.parameters():  # as in the midst of training: nothing is zero any more
                    parameter.data.add_(torch.randn_like(parameter) * 1e-3)
                if name == "published formula":
                    _rebuild_weight(adapter)
            network.to(options.device).train()
            optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-5)

            def step(network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                F.cross_entropy(network(image), label).backward()
                optimizer.step()

            runs[name] = step
        seconds = interleave(runs, min(options.repeats, 2), device=options.device)
        ours, formula, lora = (median(values) for values in seconds.values())
        yield Row(
            f"SALT d = {rank}, whole training step, ViT-B {size} px, batch 1",
            "published formula / LoRA of the same rank",
            "report",
            seconds,
            f"{formula / ours:.2f}x faster / {ours / lora:.2f}x LoRA",
        )


def _rebuild_weight(adapter: nn.Module) -> None:
    """Let an adapter of ours run the published formula on its own parameters."""

    def whole(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        top = torch.diag((1 + adapter.scale) * adapter.s[: adapter.r] + adapter.shift)
        tail = torch.diag(adapter.s[adapter.r :]) + adapter.left @ adapter.right
        return F.linear(x, adapter.u @ torch.block_diag(top, tail).relu() @ adapter.vt, bias)

    adapter.whole = whole


def training_memory(options: Options) -> Iterator[Row]:
    """Peak memory of a training step with SALT + DKA + SAM-DA, each candidate in a process of its own."""
    size, device = options.memory_size, options.device
    what = f"training step, ViT-B {size} px, SALT + DKA + SAM-DA: peak memory"
    rival = "the same adapters on segment_anything's own attention"
    if device == "cuda":
        candidates, goal = {"segment_anything": "bf16", "samda": "bf16", "samda, checkpointing": "bf16"}, "<= 1/2"
    else:
        candidates, goal = {"segment_anything": "fp32", "samda": "fp32", "samda, checkpointing": "fp32"}, "report"
    peaks = {}
    for name in candidates:
        command = [sys.executable, __file__, name, str(size), device]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            yield Row(what, rival, goal, notes=f"{name}: the process ended with {run.returncode}; is there the memory?")
            return
        peaks[name] = json.loads(run.stdout.splitlines()[-1])
    theirs, ours, saving = (peak["peak_gb"] for peak in peaks.values())
    kind = "CUDA, bf16" if device == "cuda" else "CPU, fp32, peak resident memory"
    before = peaks["samda"]["before_gb"]
    notes = "; ".join(f"{name} {peak['seconds']:.1f} s" for name, peak in peaks.items())
    yield Row(
        f"{what}, {kind}",
        rival,
        goal,
        {},
        f"{ours / theirs:.2f}x ({ours:.2f} against {theirs:.2f} GB)",
        ours / theirs <= 0.5 if device == "cuda" else None,
        f"{before:.2f} GB of it before the step; with activation checkpointing {saving:.2f} GB. The step took: {notes}",
    )
    if device != "cuda":
        yield Row(f"{what}, CUDA, bf16", rival, "<= 1/2", notes="`python benchmarks/speed.py --rows training_memory`")


def measure_step(name: str, size: int, device: str) -> dict[str, float]:
    """One step in this process, after a small one that fetches what PyTorch loads only once."""
    import time

    from memory import peak_gb

    if name == "segment_anything":
        vit.relative_attention = written_out_attention
    torch.manual_seed(0)
    adapters = {"salt": {}, "dka": {}, "sam_da": {}}
    network = SamSegmenter("vit_b", 7, weights=None, adapters=adapters).to(device).train()
    network.image_encoder.checkpointing = "checkpointing" in name
    with torch.no_grad():  # away from the start, at which SALT needs less
        for _, _, adapter in modules(network):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)

    def step(size: int) -> None:
        image, label = torch.rand(1, 1, size, size, device=device), torch.zeros(1, size, size, dtype=int, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(network(image), label)
        loss.backward()

    step(64)
    before = torch.cuda.memory_allocated() / 1e9 if device == "cuda" else peak_gb()
    start = time.perf_counter()
    step(size)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_gb()
    return {"peak_gb": peak, "before_gb": before, "seconds": time.perf_counter() - start}


if __name__ == "__main__":  # one candidate of training_memory
    print(json.dumps(measure_step(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
