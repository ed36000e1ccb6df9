# SPDX-License-Identifier: Apache-2.0
"""Volumes through networks whose answer is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from samda.data.slices import SliceGrid
from samda.errors import InputError, SamdaError, UsageError
from samda.inference.volume import VolumeInferer
from samda.task import Task

SHAPE = (40, 48, 10)  # even in-plane, so that pixels of 1 mm fall on the voxels of 1 mm


def volume(labels: np.ndarray, spacing_mm: tuple[float, float, float] = (1, 1, 3)) -> MetaTensor:
    """(1, 1, X, Y, Z) in [0, 1] that shows `labels`."""
    values = torch.tensor([0.5, 0.9, 0.2])[torch.from_numpy(labels).long()]
    return MetaTensor(values[None, None], affine=torch.diag(torch.tensor([*spacing_mm, 1.0])))


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_labels_are_exact_where_pixels_meet_voxels(
    band_network: torch.nn.Module, band_task: Task, axis: str, phantom: SimpleNamespace
) -> None:
    labels = phantom.truth(SHAPE)
    result = VolumeInferer(dataclasses.replace(band_task, axis=axis), batch_size=3)(
        volume(labels, (1, 1, 1)), band_network
    )
    assert isinstance(result, MetaTensor)
    assert result.dtype == torch.uint8
    assert np.array_equal(result[0, 0].numpy(), labels)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_context_hands_the_network_the_slice_below_itself_and_above(
    band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace, channel: int
) -> None:
    """A network that looks at one channel only: its labels are those of that neighbor, also across batches."""
    labels = phantom.truth(SHAPE)
    wide = dataclasses.replace(band_task, context=1)
    result = VolumeInferer(wide, batch_size=3)(
        volume(labels), lambda x: band_network(x[:, channel : channel + 1]) if x.shape[1] == 3 else None
    )
    shifted = labels[:, :, np.clip(np.arange(10) + channel - 1, 0, 9)]
    assert np.array_equal(result[0, 0].numpy(), shifted)


def test_context_sees_nothing_new_in_a_volume_of_equal_slices(
    make_segmenter: Callable, band_task: Task, phantom: SimpleNamespace
) -> None:
    """SAM repeats a single channel to three; equal neighbors are the same input, so the same probabilities."""
    image = volume(np.repeat(phantom.truth((40, 48, 1)), 5, axis=2))
    one, three = (make_segmenter(in_channels=channels).eval() for channels in (1, 3))
    wide = dataclasses.replace(band_task, context=1)
    a, b = (
        VolumeInferer(t, output="probabilities")(image, network) for t, network in ((band_task, one), (wide, three))
    )
    assert torch.equal(a.as_tensor(), b.as_tensor())


def test_batches(band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace) -> None:
    VolumeInferer(band_task, batch_size=4)(volume(phantom.truth(SHAPE)), band_network)
    assert band_network.shapes == [(4, 1, 64, 64), (4, 1, 64, 64), (2, 1, 64, 64)]


def test_probabilities_and_logits_agree_with_the_labels(band_task: Task, phantom: SimpleNamespace) -> None:
    def soft(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x, 1.0), 3 * x, 1 - x], 1)

    image = volume(phantom.truth(SHAPE), (0.7, 0.9, 3))
    labels, p, logits = (VolumeInferer(band_task, output=o)(image, soft) for o in ("labels", "probabilities", "logits"))
    assert p.shape == (1, 3, *SHAPE)
    assert p.dtype == torch.float32
    assert torch.allclose(p.sum(1), torch.ones(()), atol=1e-5)
    assert torch.equal(p.argmax(1, keepdim=True).as_tensor().to(torch.uint8), labels.as_tensor())
    assert torch.allclose(logits.softmax(1), p, atol=1e-5)
    # far from any border, the value is the network's own: softmax of (1, 3 x, 1 - x) at x = 0.9
    assert p[0, :, 10, 34, 2].as_tensor() == pytest.approx(torch.tensor([1.0, 2.7, 0.1]).softmax(0), abs=1e-5)


def test_probabilities_return_before_the_largest_is_taken(band_task: Task) -> None:
    # pixels are 4 mm, voxels 1 mm. The network knows one step between two pixels; a border taken on the pixel grid
    # could only lie on multiples of 4 voxels, the interpolated probabilities cross 0.5 between two of them
    task = dataclasses.replace(band_task, classes=("background", "organ"), spacing=4.0, image_size=16)

    def step(x: torch.Tensor) -> torch.Tensor:
        p = torch.where(torch.arange(16) < 8, 0.1, 0.6).expand(len(x), 1, 16, 16)  # of the organ, by column
        return torch.cat([1 - p, p], 1).log()

    labels = VolumeInferer(task)(torch.full((1, 1, 64, 64, 2), 0.5), step, spacing_mm=(1, 1, 5))[0, 0]
    # column k lies at voxel 31.5 - 4 (k - 7.5): 33.5 for k = 7 (p 0.1) and 29.5 for k = 8 (p 0.6), 0.5 at 30.3
    assert torch.equal(labels, (torch.arange(64) < 30.3).to(torch.uint8)[:, None, None].expand(64, 64, 2))


def test_windows_change_nothing_for_a_network_that_sees_pixels(
    band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace
) -> None:
    labels = phantom.truth((120, 88, 3))
    small = VolumeInferer(dataclasses.replace(band_task, image_size=32), overlap=0.25)(volume(labels), band_network)
    assert {s[2:] for s in band_network.shapes} == {(32, 32)}
    large = VolumeInferer(dataclasses.replace(band_task, image_size=128))(volume(labels), band_network)
    assert band_network.shapes[-1][2:] == (128, 128)
    assert np.array_equal(small[0, 0].numpy(), labels)
    assert np.array_equal(large[0, 0].numpy(), labels)


def test_windows_are_blended_with_gaussian_weights(band_task: Task) -> None:
    # a network that answers with the position inside its window: blending must favor the middle of each window
    task = dataclasses.replace(band_task, classes=("background", "organ"), image_size=16)

    def position(x: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(16.0).expand(len(x), 1, 16, 16)
        return torch.cat([torch.zeros_like(ramp), ramp], 1)

    p = VolumeInferer(task, overlap=0.5, output="probabilities")(
        torch.full((1, 1, 24, 16, 1), 0.5), position, spacing_mm=(1, 1, 5)
    )
    logit = (p[0, 1] / p[0, 0]).log()[:, 8, 0].flip(0)  # by canvas column: columns run against X
    # the canvas is 32 wide, the volume its middle 24; windows start at 0, 8 and 16
    column = torch.arange(4, 28).float()
    weights, total = torch.zeros(24), torch.zeros(24)
    for start in (0, 8, 16):
        place = column - start
        weight = torch.exp(-0.5 * ((place - 7.5) / 2) ** 2).clamp(min=1e-3) * ((place >= 0) & (place < 16))
        weights, total = weights + weight, total + weight * place
    assert logit == pytest.approx(total / weights, abs=0.05)


def test_the_slab_changes_no_byte(small_sam: torch.nn.Module, band_task: Task, phantom: SimpleNamespace) -> None:
    image = volume(phantom.truth((50, 37, 4)), (1.3, 0.8, 3))
    task = dataclasses.replace(band_task, spacing=1.1)
    grid = SliceGrid.from_volume(image[0].as_tensor(), (1.3, 0.8, 3), task)
    results = {}
    for budget in (0.001, 0.3, 1e4):
        inferer = VolumeInferer(task, batch_size=3, memory_budget_mb=budget, output="probabilities")
        results[inferer.slab_size(grid)] = inferer(image, small_sam).as_tensor()
    assert list(results) == [1, 2, 3]
    assert all(torch.equal(result, results[3]) for result in results.values())
    assert results[3].std(dim=(2, 3, 4)).min() > 1e-4  # the network does look at the image


def test_the_volumes_place_in_memory_changes_no_byte(
    small_sam: torch.nn.Module, band_task: Task, phantom: SimpleNamespace
) -> None:
    image = volume(phantom.truth((50, 37, 3)), (1.3, 0.8, 3))
    plain = image.as_tensor().contiguous()
    turned = plain.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    inferer = VolumeInferer(band_task, output="probabilities")
    first, second = (inferer(x, small_sam, spacing_mm=(1.3, 0.8, 3)) for x in (plain, turned))
    assert torch.equal(first, second)


def test_slab_size_from_the_budget(band_task: Task) -> None:
    grid = SliceGrid((512, 512, 600), (0.8, 0.8, 1), np.array([[100, 164]] * 3), band_task)
    # 3 classes, 4 bytes: softmax 64 x 64, half restored 64 x 512, restored 512 x 512; 8 bytes an index: 5.69 MB a slice
    assert VolumeInferer(band_task, memory_budget_mb=17.0).slab_size(grid) == 2
    assert VolumeInferer(band_task, memory_budget_mb=17.2).slab_size(grid) == 3


def test_a_tensor_without_metadata_needs_its_spacing(
    band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace
) -> None:
    image = volume(phantom.truth(SHAPE))
    plain = VolumeInferer(band_task)(image.as_tensor(), band_network, spacing_mm=(1, 1, 3))
    assert not isinstance(plain, MetaTensor)
    assert torch.equal(plain, VolumeInferer(band_task)(image, band_network).as_tensor())
    with pytest.raises(UsageError, match="spacing_mm"):
        VolumeInferer(band_task)(image.as_tensor(), band_network)


def test_task_values_and_network_keywords(band_task: Task, phantom: SimpleNamespace) -> None:
    def network(x: torch.Tensor, gain: float, *, offset: float) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), gain * (x - offset), torch.full_like(x, -9.0)], 1)

    labels = phantom.truth(SHAPE)
    result = VolumeInferer(band_task.to_dict())(volume(labels), network, 100.0, offset=0.7)
    assert np.array_equal(result[0, 0].numpy(), labels == 1)


def test_many_classes_need_two_bytes() -> None:
    task = Task(classes=("background", *(f"c{k}" for k in range(1, 300))), spacing=1.0, image_size=16)

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full((len(x), 16, 16), 299), 300).permute(0, 3, 1, 2) * 9.0

    result = VolumeInferer(task)(torch.full((1, 1, 16, 16, 2), 0.5), network, spacing_mm=(1, 1, 1))
    assert result.dtype == torch.uint16
    assert (result.numpy() == 299).all()


def test_autocast_wraps_the_network_only(
    band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace
) -> None:
    seen = []

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            seen.append((x.dtype, y.dtype))
            return y

    network = Linear()
    image = volume(phantom.truth(SHAPE))
    half, full = (VolumeInferer(band_task, output="probabilities", amp=a)(image, network) for a in ("bf16", None))
    assert set(seen) == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}
    assert half.dtype == torch.float32
    assert torch.allclose(half.sum(1), torch.ones(()), atol=1e-5)  # rounding of bf16 would be 0.004
    assert torch.allclose(half, full, atol=0.02)
    assert not torch.equal(half.as_tensor(), full.as_tensor())
    assert not torch.is_autocast_enabled("cpu")


def test_the_precision_suits_the_processor(band_task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for computed, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("samda.inference.volume.computes_bf16", lambda device, computed=computed: computed)
        assert VolumeInferer(band_task).precision("cpu") == expected
        assert VolumeInferer(band_task, amp="off").precision("cpu") == torch.float32
        assert VolumeInferer(band_task, amp="bf16").precision("cpu") == torch.bfloat16


def test_a_network_may_keep_what_it_returns(band_task: Task) -> None:
    kept = torch.randn(8, 3, 16, 16)
    before = kept.clone()
    task = dataclasses.replace(band_task, image_size=16)
    VolumeInferer(task)(torch.full((1, 1, 40, 40, 2), 0.5), lambda x: kept[: len(x)], spacing_mm=(1, 1, 1))
    assert torch.equal(kept, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "label"}, "did you mean 'labels'"),
        ({"amp": "float16"}, "amp 'float16' is unknown; did you mean 'fp16'"),
        ({"amp": "full"}, "choose from auto, bf16, fp16, off"),
        ({"batch_size": 0}, "batch_size"),
        ({"overlap": 1.0}, "overlap"),
        ({"memory_budget_mb": 0}, "memory_budget_mb"),
    ],
)
def test_refuses_settings(band_task: Task, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VolumeInferer(band_task, **settings)


def test_refuses_volumes_and_networks(band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace) -> None:
    image = volume(phantom.truth(SHAPE))
    with pytest.raises(UsageError, match="one at a time"):
        VolumeInferer(band_task)(torch.cat([image, image]), band_network)
    with pytest.raises(InputError, match="LAS"):
        flipped = MetaTensor(image.as_tensor(), affine=torch.diag(torch.tensor([-1.0, 1, 1, 1])))
        VolumeInferer(band_task)(flipped, band_network)
    with pytest.raises(UsageError, match="2 classes, task 'bands' has 3"):
        VolumeInferer(band_task)(image, lambda x: torch.cat([x, x], 1))
    with pytest.raises(SamdaError, match="not finite"):
        VolumeInferer(band_task)(image, lambda x: torch.cat([x, x, x * float("nan")], 1))
    with pytest.raises(UsageError, match=r"fp16.*GPU"):
        VolumeInferer(band_task, amp="fp16")(image, band_network)


@pytest.mark.parametrize("budget", [512.0, 0.01])
def test_all_axes_are_the_mean_of_each(band_task: Task, budget: float) -> None:
    """Odd, unequal sides; a network that treats rows and columns differently; the mean in memory and in a file."""
    torch.manual_seed(1)
    network = torch.nn.Conv2d(1, 3, (3, 7), padding=(1, 3))
    image = MetaTensor(torch.rand(1, 1, 37, 29, 11, generator=torch.Generator().manual_seed(3)), affine=torch.eye(4))
    tasks = [dataclasses.replace(band_task, axis=axis) for axis in ("coronal", "sagittal", "axial")]
    single = [VolumeInferer(t, output="probabilities")(image, network).as_tensor() for t in tasks]
    assert (single[0] - single[1]).abs().max() > 1e-3
    inferer = VolumeInferer(tasks[0], axes="all", memory_budget_mb=budget)
    labels, kept = inferer.segment(image, network, keep_probabilities=True)
    mean = sum(single) / 3
    assert kept is not None and (kept - mean).abs().max() < 6 * torch.finfo(torch.float32).eps
    only, none = inferer.segment(image, network)
    assert none is None and torch.equal(only, labels)
    sure = mean.topk(2, dim=1).values.diff(dim=1).abs()[0, 0] > 1e-5
    assert torch.equal(labels[0, 0][sure], mean.argmax(1)[0].to(torch.uint8)[sure])


def test_mirrored_slices_are_averaged_with_the_others(band_task: Task) -> None:
    """A network that looks to one side only; its first pass sees the slices as they are."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.ZeroPad2d((4, 0, 0, 0)), torch.nn.Conv2d(1, 3, (1, 5)))
    image = MetaTensor(torch.rand(1, 1, 38, 30, 5, generator=torch.Generator().manual_seed(3)), affine=torch.eye(4))
    plain, other = (
        VolumeInferer(band_task, output="probabilities")(image, call).as_tensor()
        for call in (network, lambda x: network(x.flip(-1)).flip(-1))
    )
    assert (plain - other).abs().max() > 1e-2
    seen: list[tuple[bool, torch.Tensor]] = []
    inferer = VolumeInferer(dataclasses.replace(band_task, mirror=True), output="probabilities")
    found = inferer(image, lambda x: seen.append((inferer.first_pass, x)) or network(x)).as_tensor()
    torch.testing.assert_close(found, (plain + other) / 2, rtol=0, atol=1e-6)
    (first, slices), (second, mirrored) = seen
    assert first and not second and torch.equal(mirrored, slices.flip(-1)) and inferer.first_pass


def test_all_axes_of_a_volume_with_thick_slices_are_one(
    band_network: torch.nn.Module, band_task: Task, phantom: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    labels = phantom.truth(SHAPE)
    found = VolumeInferer(band_task, axes="all")(volume(labels), band_network)
    assert np.array_equal(found[0, 0].numpy(), labels)
    assert "1 x 1 x 3 mm" in caplog.text and len(caplog.records) == 1
    assert {shape[2:] for shape in band_network.shapes} == {(64, 64)} and len(band_network.shapes) == 2
    caplog.clear()
    found = VolumeInferer(band_task, axes="all")(volume(labels, (1, 1, 1.5)), band_network)
    assert not caplog.records
