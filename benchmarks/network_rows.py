# SPDX-License-Identifier: Apache-2.0
"""Rows of speed.py about a forward pass and single layers: encoder, merged adapters, DKA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import Options, Row, interleave, median, relative_error

from samda.adapters import attach, build_configs, merge
from samda.adapters.kernel import depthwise
from samda.networks.backbones import backbone_config
from samda.networks.segmenter import SamSegmenter

__all__ = ["dka", "encoder", "merged"]


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


def encoder(options: Options) -> Iterator[Row]:
    """The ViT-B encoder forward at 1024 px."""
    device, repeats = options.device, options.repeats
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
        seconds = interleave(runs, min(repeats, 3), device=device)
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


def merged(options: Options) -> Iterator[Row]:
    """Inference after merging, ViT-B encoder at 512 px."""
    device, repeats = options.device, options.repeats
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
        plain, attached_, folded = (min(seconds[n]) for n in runs)  # the same code: what differs is the machine
        goal = "1.00x, equal outputs" if name != "dka" else "two kernels as one, equal outputs"
        reached = error < 1e-4 and (name == "dka" or folded / plain < 1.03)
        text = f"{folded / plain:.2f}x of the base ({attached_ / plain:.2f}x before), difference {error:.1e}"
        yield Row(f"{name.upper()} inference after merging, ViT-B 512 px", "base model", goal, seconds, text, reached)


def dka(options: Options) -> Iterator[Row]:
    """DKA's kernels 51 + 5 on a 64 x 64 grid, forward and backward."""
    device, repeats = options.device, options.repeats
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
