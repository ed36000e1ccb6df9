# SPDX-License-Identifier: Apache-2.0
"""Speed and memory against named rivals, side by side in one run: `make bench`, or some rows:

    python -m benchmarks.speed [--rows encoder,salt,dka] [--repeats 5] [--device cuda] [--model MODEL]

Prints a table, writes `benchmarks/results/speed_<device>.json`, in which rows that were not asked for stay as they are,
and docs/performance.md. Rows that need a GPU say "not measured" without one. Rivals: `benchmarks/rivals.py`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import monai.losses
import torch
import torch.nn as nn
import torch.nn.functional as F
from segment_anything import sam_model_registry

from samda import Adaptation, Predictor, SamSegmenter, VolumeInferer, attach, build_configs, fetch_examples, merge
from samda.adapters.base import modules
from samda.adapters.kernel import depthwise
from samda.adapters.sites import LinearSite, SiteInfo
from samda.cli.demo import hold_out
from samda.data import build_preprocessing
from samda.io import write_json
from samda.models import load_model
from samda.networks import vit
from samda.networks.backbones import backbone_config
from samda.processes import keep_freed_memory
from samda.training import DiceCELoss, train

from .jobs import disk, processes, runtimes, small
from .memory import ALWAYS, peak_gb
from .rivals import OriginalTinyViT, RebuiltSalt, SliceBySlice, sam_with_original_encoder, written_out_attention
from .timing import (
    Row,
    command_line,
    in_training,
    interleave,
    machine,
    median,
    processor,
    relative_error,
    table,
    training_step,
    write_page,
)

LOSS = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}  # as in train.json
QUICK = {"epochs": 24, "views": 1, "val_interval": 24, "patience": 0}  # not good, but no chance result either


def at_least(
    what: str, rival: str, goal: float, seconds: dict, theirs: float, ours: float, detail: str = "", notes: str = ""
) -> Row:
    """A row whose goal is `theirs` / `ours`."""
    ratio = theirs / ours
    return Row(what, rival, f">= {goal:g}x", seconds, f"{ratio:.2f}x{detail}", ratio >= goal, notes)


def encoder(options: argparse.Namespace) -> Iterator[Row]:
    """The ViT-B encoder forward at 1024 px, with random weights."""
    torch.manual_seed(0)
    rival = sam_model_registry["vit_b"]().image_encoder.eval()
    for parameter in rival.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    ours, device = backbone_config("vit_b").build().eval(), options.device
    ours.load_state_dict(rival.state_dict())
    rival, ours = (module.requires_grad_(False).to(device) for module in (rival, ours))
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
        seconds = interleave(runs, min(options.repeats, 3), device=device)
    base, fp32, bf16, *others = (median(values) for values in seconds.values())
    error = f"largest difference {relative_error(full, expected):.1e} fp32, {relative_error(half, expected):.1e} bf16"
    what, cuda_rival = "ViT-B encoder forward, 1024 px", "segment_anything bf16 / fp32"
    if device == "cuda":
        both = others[0] / bf16, base / bf16
        result, reached = f"{both[0]:.2f}x / {both[1]:.2f}x", both[0] >= 2 and both[1] >= 5
        yield Row(f"{what}, CUDA, bf16", cuda_rival, ">= 2x / >= 5x", seconds, result, reached, error)
        return
    yield at_least(f"{what}, fp32", "segment_anything fp32", 1.5, seconds, base, fp32, notes=error)
    yield at_least(f"{what}, bf16", "segment_anything fp32", 2.5, {}, base, bf16, notes="same run")
    command = "python -m benchmarks.speed --rows encoder --device cuda"
    yield Row(f"{what}, CUDA, bf16", cuda_rival, ">= 2x / >= 5x", notes=command)


def training_memory(options: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of a training step with SALT + DKA + SAM-DA, each candidate in a process of its own."""
    size, device = options.memory_size, options.device
    what = f"training step, ViT-B {size} px, SALT + DKA + SAM-DA: peak memory"
    rival, goal = "the same adapters on segment_anything's own attention", "<= 1/2" if device == "cuda" else "<= 4 GB"
    peaks = {}
    for name in ("segment_anything", "samda", "samda, checkpointing"):
        command = [sys.executable, "-m", "benchmarks.speed", "--step", name, "--memory-size", str(size)]
        run = subprocess.run([*command, "--device", device], stdout=subprocess.PIPE, encoding="utf-8", check=False)
        if run.returncode:
            yield Row(what, rival, goal, notes=f"{name}: the process ended with {run.returncode}; is there the memory?")
            return
        peaks[name] = json.loads(run.stdout.splitlines()[-1])
    theirs, ours, saving = (peak["peak_gb"] for peak in peaks.values())
    kind = "CUDA, bf16" if device == "cuda" else "CPU, fp32, peak resident memory"
    took = "; ".join(f"{name} {peak['seconds']:.1f} s" for name, peak in peaks.items())
    notes = f"{peaks['samda']['before_gb']:.2f} GB of it before the step; with activation checkpointing {saving:.2f} GB"
    result = f"{ours / theirs:.2f}x ({ours:.2f} against {theirs:.2f} GB)"
    reached = ours / theirs <= 0.5 if device == "cuda" else ours <= 4
    yield Row(f"{what}, {kind}", rival, goal, {}, result, reached, f"{notes}. The step took: {took}")
    if device != "cuda":
        yield Row(f"{what}, CUDA, bf16", rival, "<= 1/2", notes="`python -m benchmarks.speed --rows training_memory`")


def measure_step(name: str, size: int, device: str) -> dict[str, float]:
    """One step in this process, after a small one that fetches what PyTorch loads only once."""
    if name == "segment_anything":
        vit.relative_attention = written_out_attention
    torch.manual_seed(0)
    network = SamSegmenter("vit_b", 7, weights=None, adapters={"salt": {}, "dka": {}, "sam_da": {}}).to(device).train()
    network.image_encoder.checkpointing = "checkpointing" in name
    in_training(network)  # away from the start, at which SALT needs less

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


def salt(options: argparse.Namespace) -> Iterator[Row]:
    """SALT on the four linear layers of a ViT-B block, 1024 tokens, forward and backward."""
    device = options.device
    shapes = {"attn.qkv": (768, 2304), "attn.proj": (768, 768), "mlp.fc1": (768, 3072), "mlp.fc2": (3072, 768)}
    for rank, lora_goal in ((4, 1.35), (256, 1.15)):
        lora_name = f"LoRA rank {rank}"
        names = ("samda SALT", "published formula", lora_name, "plain linear")
        layers: dict[str, list[nn.Module]] = {name: [] for name in names}
        torch.manual_seed(0)
        for role, (inside, outside) in shapes.items():
            site = LinearSite(inside, outside, SiteInfo(f"encoder.0.{role}", "linear", role, 0, inside))
            nn.init.normal_(site.weight, std=0.03)
            model = nn.Sequential(site)
            layers["plain linear"].append(copy.deepcopy(model).requires_grad_(False).to(device))
            for name, key in ((lora_name, "lora"), ("samda SALT", "salt")):
                adapted = copy.deepcopy(model)
                attach(adapted, build_configs({key: {"rank": rank}}))
                layers[name].append(in_training(adapted, 1e-2).to(device))
            ours = layers["samda SALT"][-1][0]
            layers["published formula"].append(RebuiltSalt(ours.adapters["salt"], ours.bias.detach()).to(device))
        inputs = [torch.randn(1, 1024, inside, device=device, requires_grad=True) for inside, _ in shapes.values()]

        def step(modules: list[nn.Module], inputs: list[torch.Tensor] = inputs) -> None:
            for module, x in zip(modules, inputs, strict=True):
                module(x).square().mean().backward()

        pairs = zip(layers["samda SALT"], layers["published formula"], inputs, strict=True)
        same = max(relative_error(mine(x), theirs(x)) for mine, theirs, x in pairs)
        runs = {name: lambda m=m: step(m) for name, m in layers.items()}
        seconds = interleave(runs, options.repeats, 2, device)
        ours, formula, lora, _ = (median(seconds[name]) for name in names)
        yield Row(
            f"SALT d = {rank}, linear layers of a ViT-B block, 1024 tokens, forward + backward",
            "published formula / LoRA of the same rank",
            f">= 1.6x faster / <= {lora_goal}x its time",
            seconds,
            f"{formula / ours:.2f}x faster / {ours / lora:.2f}x LoRA",
            formula / ours >= 1.6 and ours / lora <= lora_goal,
            f"largest difference to the formula {same:.1e}",
        )


def salt_step(options: argparse.Namespace) -> Iterator[Row]:
    """A whole training step (forward, loss, backward, optimizer) of a ViT-B with SALT in all its linear layers."""
    size = 512
    for rank in (4, 256):
        runs = {}
        base = SamSegmenter("vit_b", 7, weights=None)
        salted = copy.deepcopy(base)
        attach(salted, build_configs({"salt": {"rank": rank}}))  # the decompositions take their time: once
        attach(base, build_configs({"lora": {"rank": rank}}))
        for name, model in (("samda SALT", salted), ("published formula", salted), (f"LoRA rank {rank}", base)):
            torch.manual_seed(0)
            network = in_training(copy.deepcopy(model)).to(options.device)
            if name == "published formula":
                for _, _, adapter in modules(network):
                    adapter.rebuilt = RebuiltSalt(adapter, None)  # its parameters are trained instead
                    adapter.fused_forward = lambda x, weight, bias, rebuilt=adapter.rebuilt: rebuilt(x, bias)
            runs[name] = training_step(network, size, 1, options.device)
        seconds = interleave(runs, min(options.repeats, 2), device=options.device)
        ours, formula, lora = (median(values) for values in seconds.values())
        result = f"{formula / ours:.2f}x faster / {ours / lora:.2f}x LoRA"
        what = f"SALT d = {rank}, whole training step, ViT-B {size} px, batch 1"
        yield Row(what, "published formula / LoRA of the same rank", "report", seconds, result)


def merged(options: argparse.Namespace) -> Iterator[Row]:
    """Inference after merging, ViT-B encoder at 512 px."""
    torch.manual_seed(0)
    base = SamSegmenter("vit_b", num_classes=2, weights=None).to(options.device)
    image = torch.rand(1, 1, 512, 512, device=options.device)
    for name, settings in (("salt", {"rank": 4}), ("lora", {"rank": 4}), ("dka", {"width": 16})):
        model = copy.deepcopy(base)
        attach(model, build_configs({name: settings}))
        in_training(model.to(options.device))
        with torch.no_grad():
            before, after_model = model.encode(image)["embedding"], copy.deepcopy(model)
            merge(after_model)
            error = relative_error(after_model.encode(image)["embedding"], before)
            candidates = {"base": base, "attached": model, "merged": after_model}
            runs = {what: lambda m=m: m.encode(image) for what, m in candidates.items()}
            seconds = interleave(runs, options.repeats, device=options.device)
        plain, attached, folded = (min(seconds[n]) for n in runs)  # the same code: what differs is the machine
        goal = "1.00x, equal outputs" if name != "dka" else "two kernels as one, equal outputs"
        reached = error < 1e-4 and (name == "dka" or folded / plain < 1.03)
        text = f"{folded / plain:.2f}x of the base ({attached / plain:.2f}x before), difference {error:.1e}"
        yield Row(f"{name.upper()} inference after merging, ViT-B 512 px", "base model", goal, seconds, text, reached)


def dka(options: argparse.Namespace) -> Iterator[Row]:
    """DKA's kernels 51 + 5 on a 64 x 64 grid, forward and backward."""
    for width in (16, 192):
        generator = torch.Generator().manual_seed(width)
        x = torch.randn(1, 64, 64, width, generator=generator).to(options.device).requires_grad_()
        kernels = [torch.randn(width, 1, k, k, generator=generator) / k for k in (51, 5)]
        large, small = (kernel.to(options.device).requires_grad_() for kernel in kernels)

        def plain(x=x, large=large, small=small, width=width) -> torch.Tensor:
            z = x.permute(0, 3, 1, 2).contiguous()
            y = F.conv2d(z, large, padding=25, groups=width) + F.conv2d(z, small, padding=2, groups=width)
            return y.permute(0, 2, 3, 1)

        def ours(x=x, large=large, small=small) -> torch.Tensor:
            return depthwise(x, large + F.pad(small, (23,) * 4), None)

        error, candidates = relative_error(ours(), plain()), {"nn.Conv2d": plain, "samda": ours}
        runs = {name: lambda f=f: f().square().mean().backward() for name, f in candidates.items()}
        seconds = interleave(runs, options.repeats, device=options.device)
        ratio = median(seconds["nn.Conv2d"]) / median(seconds["samda"])
        goal = ">= 10x" if width == 16 and options.device == "cpu" else "report"
        what, reached = f"DKA 51x51 + 5x5, 64x64 grid, width {width}", ratio >= 10 if goal != "report" else None
        notes = f"largest difference {error:.1e}"
        yield Row(f"{what}, forward + backward", "nn.Conv2d depthwise", goal, seconds, f"{ratio:.1f}x", reached, notes)


def embeddings(options: argparse.Namespace) -> Iterator[Row]:
    """Training that leaves the encoder unchanged: slices per second, encoding every step against embeddings at hand."""
    device = options.device
    for backbone, size, batch, goal in (("vit_t", 256, 8, 8.0), ("vit_b", 1024, 1, 20.0)):
        torch.manual_seed(0)
        network = SamSegmenter(backbone, num_classes=7, weights=None, adapters={"sam_da": {}}).to(device).train()
        if backbone == "vit_t":
            original: nn.Module = OriginalTinyViT(network.image_encoder, size).train(False)
        else:  # speed does not depend on the weights
            original = sam_model_registry["vit_b"]().image_encoder.eval()
        original.requires_grad_(False).to(device)
        image = torch.rand(batch, 1, size, size, device=device)
        label = torch.randint(0, 7, (batch, 1, size, size), device=device)
        with torch.no_grad():
            pyramid = network.encode(image)
        cached = pyramid["embedding"][0].nbytes / 2e6  # MB in half precision
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)

        def step(x, loss=DiceCELoss, network=network, label=label, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            loss(**LOSS)(network(x), label).backward()
            optimizer.step()

        def encoded_by_the_original(step=step, image=image, original=original) -> None:
            with torch.no_grad():
                embedding = original(image.expand(-1, 3, -1, -1))
            step({"embedding": embedding}, loss=monai.losses.DiceCELoss)

        runs = {
            "original encoder every step": encoded_by_the_original,
            "samda's encoder every step": lambda s=step, x=image: s(x),
            "embeddings at hand": lambda s=step, x=pyramid: s(x),
        }
        seconds = interleave(runs, options.repeats if size < 1024 else min(options.repeats, 2), device=device)
        slow, own, fast = (median(values) for values in seconds.values())
        yield Row(
            f"training SAM-DA + class head, {backbone} at {size} px, batch {batch}",
            "the original encoder in every step, MONAI's loss",
            f">= {goal:.0f}x slices per second",
            seconds,
            f"{slow / fast:.1f}x ({batch / slow:.2f} against {batch / fast:.2f} slices/s)",
            slow / fast >= goal,
            f"{own / fast:.1f}x samda's own encoder in every step; cache {cached:.2f} MB and "
            f"{(own - fast) / batch:.2f} s once per slice and view",
        )


@functools.cache
def _model(given: Path | None, device: str) -> tuple:
    """The given model, or one trained on patient A in a minute; network, task, record."""
    if given is not None:
        return load_model(given)
    example = fetch_examples()["A"]
    with tempfile.TemporaryDirectory() as folder:
        dataset = hold_out(example, Path(folder) / "data")
        train(dataset, Path(folder) / "model", example.task, "sam_da", "vit_t", QUICK, device=device)
        return load_model(Path(folder) / "model")


def predict(options: argparse.Namespace) -> Iterator[Row]:
    """Patient A from preprocessed volume to label map, in memory: samda against SamPredictor, slice by slice."""
    example, device = fetch_examples()["A"], options.device
    network, task, _ = _model(options.model, options.device)
    network.to(device)
    sam = sam_with_original_encoder(task.image_size).to(device)
    image = build_preprocessing(task, labels=False)({"image": str(example.image)})["image"]
    volume, slices = image.as_tensor()[0], image.shape[-1]
    inferers = {amp: VolumeInferer(task, amp=amp, device=device) for amp in (None, "bf16")}
    rivals = {amp: SliceBySlice(sam, task.num_classes - 1, amp, device) for amp in (None, "bf16")}
    runs = {
        "SamPredictor fp32": lambda: rivals[None](volume),
        "samda fp32": lambda: inferers[None](image[None], network),
        "SamPredictor bf16": lambda: rivals["bf16"](volume),
        "samda bf16": lambda: inferers["bf16"](image[None], network),
    }
    full, half = runs["samda fp32"](), runs["samda bf16"]()  # warms up, too
    rivals[None](volume[..., :4]), rivals["bf16"](volume[..., :4])
    seconds = interleave(runs, min(options.repeats, 2), warm_up=0, device=device)
    theirs, ours, theirs_half, ours_half = (median(values) for values in seconds.values())
    with torch.no_grad():
        pixels = torch.rand(1, 3, task.image_size, task.image_size, device=device)
        error = relative_error(network.image_encoder(pixels), sam.image_encoder(pixels))
    what = f"predicting patient A, {slices} slices, vit_t at {task.image_size} px, {task.num_classes - 1} classes"
    rival, rate = "SamPredictor, slice by slice, fp32", f" ({slices / ours:.1f} against {slices / theirs:.1f} slices/s)"
    notes = f"embeddings differ by {error:.1e}"
    yield at_least(f"{what}, fp32", rival, 1.3, seconds, theirs, ours, rate, notes)
    same = (full == half).float().mean().item()
    notes = (
        f"same run; {theirs_half / ours_half:.2f}x SamPredictor in bf16; {100 * same:.2f} % of the voxels as in fp32"
    )
    rate = f" ({slices / ours_half:.1f} slices/s)"
    yield at_least(f"{what}, bf16", rival, 2.5, {}, theirs, ours_half, rate, notes)


def adapt(options: argparse.Namespace) -> Iterator[Row]:
    """Adapting to a patient (views, steps, guard, both predictions) against predicting it: A as it is and through all
    stages, whatever the model thinks of it, and the small scan M of another modality."""
    network, task, record = _model(options.model, options.device)
    predictor = Predictor(network, task, options.device, record=record)  # with predicted Dice, as `samda predict`
    bare = Predictor(network, task, options.device)
    for name, how, guard in (("A", "", {}), ("A", ", through all stages", {"guard": ALWAYS}), ("M", "", {})):
        image, decisions = fetch_examples()[name].image, []
        adaptation = Adaptation(network, task, record, device=options.device, **guard)

        def run(adaptation: Adaptation = adaptation, image: Path = image, decisions: list = decisions) -> None:
            decisions.append(adaptation.adapt(image).record)

        runs = {
            "predict": functools.partial(predictor.predict, image),
            "without predicted Dice": functools.partial(bare.predict, image),
            "adapt": run,
        }
        seconds = interleave(runs, min(options.repeats, 2), device=options.device)
        took = median(seconds["adapt"])
        ratio, more = took / median(seconds["predict"]), took / median(seconds["without predicted Dice"])
        what = f"adapting to patient {name}, vit_t, the defaults of `samda adapt`{how}"
        notes = f"decision: {decisions[-1]['decision']} ({decisions[-1]['reason']}); {more:.2f}x without predicted Dice"
        yield Row(what, "predicting it", "<= 2.5x its time", seconds, f"{ratio:.2f}x", ratio <= 2.5, notes)


def start(options: argparse.Namespace) -> Iterator[Row]:
    command = [sys.executable, "-m", "samda", "--help"]
    run = functools.partial(subprocess.run, command, check=True, capture_output=True)
    seconds = interleave({"samda --help": run}, options.repeats)
    took = median(seconds["samda --help"])
    yield Row("`samda --help`", "-", "< 0.5 s", seconds, f"{took:.2f} s", took < 0.5)


ROWS = {
    row.__name__: row
    for row in (
        encoder,
        training_memory,
        salt,
        salt_step,
        merged,
        dka,
        embeddings,
        predict,
        adapt,
        start,
        runtimes,
        processes,
        disk,
        small,
    )
}


def main() -> None:
    """Measure the chosen rows, print the table, write the JSON and the page."""
    parser = command_line(__doc__, "--rows", ROWS, repeats=5)
    parser.add_argument("--model", type=Path, help="a trained vit_t for the rows predict and adapt; default: train one")
    parser.add_argument("--data", type=Path, help="folder of the data sets of benchmarks.evidence, for the row disk")
    parser.add_argument("--memory-size", type=int, default=1024, help="pixels, of the row training_memory")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # one candidate of training_memory
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measure_step(options.step, options.memory_size, options.device)))
        return
    keep_freed_memory()  # as the commands do
    path = options.results / f"speed_{options.device}.json"
    measured = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    for name in options.names:
        rows = []
        for row in ROWS[name](options):
            print(f"{row.what}: {row.result}  [{row.goal}]", file=sys.stderr, flush=True)
            rows.append(vars(row) | {"processor": processor()})
        measured[name] = rows
        ordered = {key: measured[key] for key in ROWS if key in measured}
        write_json(path, {"machine": machine(options.device), "repeats": options.repeats, "rows": ordered})
    print(table([Row(**row) for rows in ordered.values() for row in rows]))
    write_page()


if __name__ == "__main__":
    main()
