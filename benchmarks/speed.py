# SPDX-License-Identifier: Apache-2.0
"""Speed and memory against named rivals, side by side in one run: `make bench`, or some rows:

    python benchmarks/speed.py [--rows encoder,salt,dka] [--repeats 5] [--device cuda]

Prints a table and writes `benchmarks/results/speed_<device>.json`. Rows that need a GPU say "not measured" without one.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import Row, interleave, machine, median, table

from samda.adapters import attach, build_configs, merge
from samda.adapters.depthwise import depthwise
from samda.adapters.sites import LinearSite, SiteInfo
from samda.files import write_json
from samda.networks.backbones import BACKBONES, backbone_config
from samda.networks.segmenter import SamSegmenter

RESULTS = Path(__file__).parent / "results"


def random_vit_b() -> tuple[nn.Module, nn.Module]:
    """segment_anything's ViT-B encoder with random weights, and ours with the same ones."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    rival = sam_model_registry["vit_b"]().image_encoder.eval()
    for parameter in rival.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    ours = backbone_config("vit_b").build().eval()
    ours.load_state_dict(rival.state_dict())
    return rival.requires_grad_(False), ours.requires_grad_(False)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((value.float() - expected.float()).abs().max() / expected.float().abs().max())


def encoder(device: str, repeats: int) -> Iterator[Row]:
    """The ViT-B encoder forward at 1024 px."""
    rival, ours = (module.to(device) for module in random_vit_b())
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1)).to(device)

    def low(module: nn.Module) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return module(image)

    with torch.no_grad():
        expected, full, half = rival(image), ours(image), low(ours)
        runs: dict[str, Callable[[], object]] = {
            "segment_anything fp32": lambda: rival(image),
            "samda fp32": lambda: ours(image),
            "samda bf16": lambda: low(ours),
        }
        if device == "cuda":
            runs["segment_anything bf16"] = lambda: low(rival)
        seconds = interleave(runs, repeats, device=device)
    base, fp32, bf16 = (median(seconds[name]) for name in list(runs)[:3])
    error = f"largest difference {relative_error(full, expected):.1e} fp32, {relative_error(half, expected):.1e} bf16"
    what = "ViT-B encoder forward, 1024 px"
    if device == "cuda":
        own = median(seconds["segment_anything bf16"])
        yield Row(
            f"{what}, CUDA, bf16",
            "segment_anything bf16 / fp32",
            ">= 2x / >= 5x",
            seconds,
            f"{own / bf16:.2f}x / {base / bf16:.2f}x",
            own / bf16 >= 2 and base / bf16 >= 5,
            error,
        )
        return
    yield Row(
        f"{what}, fp32", "segment_anything fp32", ">= 1.5x", seconds, f"{base / fp32:.2f}x", base / fp32 >= 1.5, error
    )
    yield Row(
        f"{what}, bf16", "segment_anything fp32", ">= 2.5x", {}, f"{base / bf16:.2f}x", base / bf16 >= 2.5, "same run"
    )
    yield Row(
        f"{what}, CUDA, bf16",
        "segment_anything bf16 / fp32",
        ">= 2x / >= 5x",
        notes="python benchmarks/speed.py --rows encoder --device cuda",
    )


class RebuiltSalt(nn.Module):
    """The published formula: the weight is rebuilt from U, Sigma' and V in every forward."""

    def __init__(self, salt: nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.u, self.s, self.vt, self.bias, self.r = salt.u, salt.s, salt.vt, bias, salt.r
        self.alpha = nn.Parameter(1 + salt.scale.detach().clone())
        self.beta = nn.Parameter(salt.shift.detach().clone())
        self.left, self.right = (nn.Parameter(t.detach().clone()) for t in (salt.left, salt.right))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = torch.diag(self.alpha * self.s[: self.r] + self.beta)
        tail = torch.diag(self.s[self.r :]) + self.left @ self.right
        return F.linear(x, self.u @ torch.block_diag(top, tail).relu() @ self.vt, self.bias)


def salt(device: str, repeats: int) -> Iterator[Row]:
    """SALT on the four linear layers of a ViT-B block, 1024 tokens, forward and backward."""
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


def merged(device: str, repeats: int) -> Iterator[Row]:
    """Inference after merging, ViT-B encoder at 512 px."""
    torch.manual_seed(0)
    base = SamSegmenter("vit_b", num_classes=2, weights=None).to(device)
    image = torch.rand(1, 1, 512, 512, device=device)
    for name, settings in (("salt", {"rank": 4}), ("lora", {"rank": 4}), ("dka", {"width": 16})):
        model = copy.deepcopy(base)
        attach(model, build_configs({name: settings}))
        model.to(device)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim > 1:
                    parameter.add_(torch.randn_like(parameter) * 1e-3)
            before = model.encode(image)
            after_model = copy.deepcopy(model)
            merge(after_model)
            error = relative_error(after_model.encode(image), before)
            runs = {
                "base": lambda: base.encode(image),
                "attached": lambda m=model: m.encode(image),
                "merged": lambda m=after_model: m.encode(image),
            }
            seconds = interleave(runs, repeats, device=device)
        plain, attached_, folded = (median(seconds[n]) for n in runs)
        goal = "1.00x, equal outputs" if name != "dka" else "two kernels as one, equal outputs"
        reached = error < 1e-4 and (name == "dka" or folded / plain < 1.03)
        text = f"{folded / plain:.2f}x of the base ({attached_ / plain:.2f}x before), difference {error:.1e}"
        yield Row(f"{name.upper()} inference after merging, ViT-B 512 px", "base model", goal, seconds, text, reached)


def dka(device: str, repeats: int) -> Iterator[Row]:
    """DKA's kernels 51 + 5 on a 64 x 64 grid, forward and backward."""
    for width in (16, 192):
        generator = torch.Generator().manual_seed(width)
        x = torch.randn(1, 64, 64, width, generator=generator).to(device).requires_grad_()
        large, small = (
            (torch.randn(width, 1, k, k, generator=generator) / k).to(device).requires_grad_() for k in (51, 5)
        )

        def plain(x=x, large=large, small=small, width=width) -> torch.Tensor:
            z = x.permute(0, 3, 1, 2).contiguous()
            y = F.conv2d(z, large, padding=25, groups=width) + F.conv2d(z, small, padding=2, groups=width)
            return y.permute(0, 2, 3, 1)

        def ours(x=x, large=large, small=small) -> torch.Tensor:
            return depthwise(x, large + F.pad(small, (23,) * 4), None)

        error = relative_error(ours(), plain())
        runs = {
            "nn.Conv2d": lambda f=plain: f().square().mean().backward(),
            "samda": lambda f=ours: f().square().mean().backward(),
        }
        seconds = interleave(runs, repeats, device=device)
        ratio = median(seconds["nn.Conv2d"]) / median(seconds["samda"])
        goal = ">= 10x" if width == 16 and device == "cpu" else "report"
        yield Row(
            f"DKA 51x51 + 5x5, 64x64 grid, width {width}, forward + backward",
            "nn.Conv2d depthwise",
            goal,
            seconds,
            f"{ratio:.1f}x",
            ratio >= 10 if goal != "report" else None,
            f"largest difference {error:.1e}",
        )


def embeddings(device: str, repeats: int) -> Iterator[Row]:
    """Training that leaves the encoder unchanged: slices per second, encoding every step against embeddings at hand."""
    cases = (("vit_t", 256, 8, 8.0), ("vit_b", 1024, 1, 20.0))
    for backbone, size, batch, goal in cases:
        torch.manual_seed(0)
        network = SamSegmenter(backbone, num_classes=7, weights=None, adapters={"sam_da": {}}).to(device).train()
        image = torch.rand(batch, 1, size, size, device=device)
        label = torch.randint(0, 7, (batch, size, size), device=device)
        with torch.no_grad():
            embedding = network.encode(image)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)

        def step(x, embedded, network=network, label=label, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x, embedded=embedded), label).backward()
            optimizer.step()

        runs = {
            "encoding every step": lambda s=step, x=image: s(x, False),
            "embeddings at hand": lambda s=step, x=embedding: s(x, True),
        }
        seconds = interleave(runs, repeats if size < 1024 else min(repeats, 3), device=device)
        slow, fast = (median(values) for values in seconds.values())
        yield Row(
            f"training SAM-DA + class head, {backbone} at {size} px, batch {batch}",
            "encoding every step",
            f">= {goal:.0f}x slices per second",
            seconds,
            f"{slow / fast:.1f}x ({batch / slow:.2f} against {batch / fast:.2f} slices/s)",
            slow / fast >= goal,
            f"cache {embedding[0].nbytes / 1e6:.2f} MB and {(slow - fast) / batch:.2f} s once per slice and view",
        )


def training_memory(device: str, repeats: int) -> Iterator[Row]:
    """Peak memory of a training step, ViT-B at 1024 px with SALT + DKA + SAM-DA."""
    what = "training step, ViT-B 1024 px, SALT + DKA + SAM-DA: peak memory"
    rival = "the same adapters on segment_anything's own attention"
    if device != "cuda":
        yield Row(
            what, rival, "<= 1/2 on CUDA", notes="python benchmarks/speed.py --rows training_memory --device cuda"
        )
        return
    from samda.networks import attention

    def written_out(q, k, v, table_h, table_w, formulation=None) -> torch.Tensor:
        """The full attention matrix in memory, as segment_anything computes it."""
        height, width = len(table_h), len(table_w)
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        grid = q.unflatten(2, (height, width))
        rows = torch.einsum("nhyxc,ykc->nhyxk", grid, table_h.to(q.dtype))
        columns = torch.einsum("nhyxc,xkc->nhyxk", grid, table_w.to(q.dtype))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        return (weights + bias).softmax(-1) @ v

    from samda.networks import vit

    peaks, own = {}, attention.relative_attention
    for name, function in (("segment_anything's attention", written_out), ("samda", own)):
        vit.relative_attention = function
        torch.manual_seed(0)
        adapters = {"salt": {}, "dka": {}, "sam_da": {}}
        network = SamSegmenter("vit_b", num_classes=7, weights=None, adapters=adapters).to(device).train()
        image, label = torch.rand(1, 1, 1024, 1024, device=device), torch.randint(0, 7, (1, 1024, 1024), device=device)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(network(image), label)
            loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    vit.relative_attention = own
    theirs, ours = peaks.values()
    text = f"{ours / theirs:.2f}x ({ours:.2f} against {theirs:.2f} GiB)"
    yield Row(what, rival, "<= 1/2 on CUDA", {}, text, ours / theirs <= 0.5)


def start(device: str, repeats: int) -> Iterator[Row]:
    """`samda --help`."""

    def run() -> None:
        subprocess.run([sys.executable, "-m", "samda", "--help"], check=True, capture_output=True)

    seconds = interleave({"samda --help": run}, repeats)
    took = median(seconds["samda --help"])
    yield Row("samda --help", "-", "< 0.5 s", seconds, f"{took:.2f} s", took < 0.5)


ROWS = {row.__name__: row for row in (encoder, training_memory, salt, merged, dka, embeddings, start)}


def main() -> None:
    """Measure the chosen rows, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated names of rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.rows.split(","):
        for row in ROWS[name](arguments.device, arguments.repeats):
            print(f"{row.what}: {row.result}  [{row.goal}]", file=sys.stderr, flush=True)
            rows.append(row)
    print(table(rows))
    content = {"machine": machine(arguments.device), "repeats": arguments.repeats, "rows": [vars(row) for row in rows]}
    write_json(RESULTS / f"speed_{arguments.device}.json", content)


if __name__ == "__main__":
    assert set(BACKBONES) >= {"vit_t", "vit_b"}
    main()
