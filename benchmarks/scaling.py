# SPDX-License-Identifier: Apache-2.0
"""How cost grows, where time goes, and how far the hardware's floor is:

    python -m benchmarks.scaling [--parts growth,profile,options] [--repeats 3] [--device cuda]

Growth: seconds against image size, slices, classes and adapter width. Profile: training steps and predictions by kind
of operation, with the floor of each: its FLOP at the speed of a large matrix product on this machine, and its bytes
(each operation reads its inputs and writes its output once) at the speed of a large copy. Options: `torch.compile` and
activation checkpointing. Writes `benchmarks/results/scaling_<device>.json`, in which parts not asked for stay as they
are, and docs/performance.md.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from samda import SamSegmenter, Task, VolumeInferer
from samda.io import write_json
from samda.networks.ops import linear

from .timing import command_line, interleave, machine, median, training_step, write_page

KINDS = {  # kind of operation -> parts of the names of PyTorch's operations; the first that fits
    "attention": ("scaled_dot_product", "flash"),
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "linear"),
    "convolutions": ("conv",),
    "FFT": ("fft",),
    "activations": ("gelu", "relu", "threshold", "softmax"),
    "norms": ("norm",),
    "interpolation": ("upsample", "interpolate"),
    "optimizer": ("_fused", "_foreach", "addcdiv", "addcmul", "lerp"),
    "copies": ("copy_", "cat", "clone", "fill_", "zero_", "index"),
    "sums and products": ("add", "mul", "sub", "div", "sum", "pow", "sqrt", "mean", "max", "masked"),
}


def network(backbone: str, classes: int = 7, device: str = "cpu", **adapters: Any) -> SamSegmenter:
    """A segmenter with random weights, as speed does not depend on them; the default one if no adapters are named."""
    torch.manual_seed(0)
    head = "sam" if adapters else "pyramid"
    return SamSegmenter(backbone, classes, weights=None, adapters=adapters or {"ssf": {}}, head=head).to(device)


@torch.no_grad()
def forward(model: Callable[..., object], image: torch.Tensor, amp: bool = False) -> object:
    """A forward pass without gradients, with `amp` in bfloat16."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=amp):
        return model(image)


def growth(device: str, repeats: int) -> dict[str, Any]:
    """Curves: name -> {"fixed", "seconds": {value: seconds}}."""
    curves: dict[str, dict[str, Any]] = {}

    def curve(name: str, fixed: str, runs: dict[str, Callable[[], object]]) -> None:
        seconds = interleave(runs, repeats, device=device)
        points = {key: round(median(values), 5) for key, values in seconds.items()}
        curves[name] = {"fixed": fixed, "seconds": points}
        print(name, points, flush=True)

    for backbone, sizes in (("vit_t", (128, 256, 512, 1024)), ("vit_b", (128, 256, 512))):
        model = network(backbone, device=device).eval()
        images = {str(size): torch.rand(1, 1, size, size, device=device) for size in sizes}
        runs = {size: functools.partial(forward, model, image) for size, image in images.items()}
        curve(f"image size, {backbone}", "forward pass of one slice, 7 classes", runs)

    def volume(slices: int, classes: int) -> Callable[[], object]:
        names = ("background", *(f"class {k}" for k in range(1, classes)))
        task = Task(classes=names, image_size=256, spacing=1.5)
        scan = torch.zeros(1, 1, 160, 160, slices)
        scan[..., 20:140, 20:140, :] = 0.5
        inferer, model = VolumeInferer(task, device=device), network("vit_t", classes, device)
        return lambda: inferer(scan, model, spacing_mm=(1.5, 1.5, 3.0))

    runs = {str(n): volume(n, 7) for n in (8, 16, 32, 64)}
    curve("slices", "prediction of a volume, vit_t at 256 px, 7 classes", runs)
    runs = {str(k): volume(16, k) for k in (2, 7, 25, 105)}
    curve("classes", "prediction of 16 slices, vit_t at 256 px", runs)
    for name, key, values in (
        ("salt", "rank", (1, 4, 64, 256)),
        ("lora", "rank", (1, 4, 64, 128)),
        ("dka", "width", (8, 16, 64, 192)),
        ("lka", "width", (8, 16, 64)),
    ):
        runs = {}
        for value in values:
            model = network("vit_t", device=device, **{name: {key: value}})
            runs[str(value)] = training_step(model, 256, 2, device)
        curve(f"{key} of {name}", "training step, vit_t at 256 px, batch 2", runs)
    return curves


class Counter(TorchDispatchMode):
    """Counts the FLOP of operations, and the bytes they read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(word in str(func) for word in ("view", "empty", "detach", "expand")) and not func.is_view:
            tensors = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            query, key = args[:2]
            self.flop += 4 * query.numel() * key.shape[-2]
        elif str(func).startswith("mkldnn._linear_pointwise"):
            self.flop += 2 * args[0].numel() * len(args[1])
        elif count := flop_registry.get(func._overloadpacket):
            self.flop += count(*args, **kwargs, out_val=out)
        return out


def peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a product of large matrices, and bytes/s of a copy (read and write), best of several."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: linear(a, b), "copy": lambda: target.copy_(source)}
    seconds = interleave(runs, 7, device=device)
    return {"flop_per_s": 2 * n**3 / min(seconds["product"]), "bytes_per_s": 2 * source.nbytes / min(seconds["copy"])}


def kind_of(name: str) -> str:
    name = name.removeprefix("aten::")
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "everything else")


def profiles(device: str, repeats: int) -> dict[str, Any]:
    """Where the time of a step and of a prediction goes, and the floor of both."""
    model = network("vit_t", device=device).eval()
    image = torch.rand(8, 1, 256, 256, device=device)
    with torch.no_grad():
        pyramid = model.encode(image)
    label = torch.randint(0, 7, (8, 256, 256), device=device)
    head = network("vit_t", device=device)

    def on_embeddings() -> None:
        F.cross_entropy(head(pyramid), label).backward()

    flagship = network("vit_t", device=device, salt={}, dka={}, sam_da={})
    jobs = {
        "prediction, vit_t, 8 slices of 256 px, fp32": (lambda: forward(model, image), torch.float32),
        "prediction, vit_t, 8 slices of 256 px, bf16": (lambda: forward(model, image, True), torch.bfloat16),
        "training step on embeddings, vit_t, 8 slices": (on_embeddings, torch.float32),
        "training step with SALT + DKA + SAM-DA, vit_t, 2 slices of 256 px": (
            training_step(flagship, 256, 2, device),
            torch.float32,
        ),
    }
    result = {}
    for name, (run, dtype) in jobs.items():
        measured = median(interleave({"run": run}, repeats, 2, device)["run"])
        with Counter() as counted:
            run()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        with profile(activities=activities) as recorded:
            run()
        shares: dict[str, float] = {}
        for event in recorded.key_averages():
            took = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            kind = kind_of(event.key)
            shares[kind] = shares.get(kind, 0.0) + took
        whole = sum(shares.values())
        peak = peaks(device, dtype)
        compute, memory = counted.flop / peak["flop_per_s"], counted.bytes / peak["bytes_per_s"]
        result[name] = {
            "seconds": measured,
            "shares": {kind: round(took / whole, 4) for kind, took in sorted(shares.items(), key=lambda s: -s[1])},
            "gflop": counted.flop / 1e9,
            "gbyte": counted.bytes / 1e9,
            "peak": peak,
            "floor_seconds": {"compute": compute, "memory": memory},
            "of_floor": measured / max(compute, memory),
        }
        print(name, {k: v for k, v in result[name].items() if k != "shares"}, flush=True)
    return result


def options(device: str, repeats: int) -> dict[str, Any]:
    """What is possible and no default: seconds without and with `torch.compile` and activation checkpointing."""
    result: dict[str, Any] = {}
    model = network("vit_t", device=device).eval()
    image = torch.rand(8, 1, 256, 256, device=device)
    compiled = torch.compile(model)
    start = time.perf_counter()
    try:
        forward(compiled, image)
    except Exception as error:  # no C++ compiler, for instance
        result["torch.compile"] = {"failed": str(error).splitlines()[0]}
    else:
        first = time.perf_counter() - start
        runs = {"without": lambda: forward(model, image), "with": lambda: forward(compiled, image)}
        seconds = interleave(runs, repeats, device=device)
        result["torch.compile"] = {key: median(values) for key, values in seconds.items()} | {"first_call": first}
        result["torch.compile"]["what"] = "prediction, vit_t, 8 slices of 256 px"
    steps = {}
    for name, checkpointing in (("without", False), ("with", True)):
        flagship = network("vit_b", device=device, salt={}, dka={}, sam_da={})
        flagship.image_encoder.checkpointing = checkpointing
        steps[name] = training_step(flagship, 256, 1, device)
    result["checkpointing"] = {k: median(v) for k, v in interleave(steps, repeats, device=device).items()}
    result["checkpointing"]["what"] = "training step, SALT + DKA + SAM-DA, ViT-B at 256 px (memory: see above)"
    print(result, flush=True)
    return result


PARTS = {"growth": growth, "profile": profiles, "options": options}


def main() -> None:
    arguments = command_line(__doc__, "--parts", PARTS, repeats=3).parse_args()
    path = arguments.results / f"scaling_{arguments.device}.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name in arguments.names:
        content[name] = PARTS[name](arguments.device, arguments.repeats)
        write_json(path, content | {"machine": machine(arguments.device), "repeats": arguments.repeats})
    write_page()


if __name__ == "__main__":
    main()
