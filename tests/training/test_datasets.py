# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from samda.data.labels import IGNORED, PartialLabels, partial_labels
from samda.data.transforms import build_augmentation, build_preprocessing
from samda.embeddings import EmbeddingDataset
from samda.errors import InputError
from samda.networks.segmenter import SamSegmenter
from samda.task import Task
from samda.training import SliceDataset, build_dataset, prepare_batch
from samda.training.datasets import tile_starts

Write = Callable[..., dict[str, Any]]


def dataset_of(cases: list[dict[str, Any]], task: Task, **settings: Any) -> SliceDataset:
    return SliceDataset(cases, build_preprocessing(task, labels=True), task, **settings)


def test_items_are_all_slices_of_all_cases(write_case: Write, task: Task) -> None:
    dataset = dataset_of([write_case("a", 1), write_case("b", 2, shape=(40, 36, 6))], task)
    assert [dataset[i]["case"] for i in range(len(dataset))] == [0] * 8 + [1] * 6
    assert dataset.foreground.tolist() == [False] + [True] * 6 + [False] * 2 + [True] * 4 + [False]
    assert dataset.present.tolist() == [True, True, True]
    item = dataset[3]
    assert item["image"].shape == (1, 64, 64) and item["label"].shape == (1, 64, 64)
    assert item["label"].dtype == torch.uint8


def test_image_and_label_lie_on_each_other(write_case: Write, task: Task) -> None:
    item = dataset_of([write_case("a", 1)], task)[3]
    image, label = item["image"][0], item["label"][0]
    # -50, 70 and 210 HU in the window -160 to 240: 0.275, 0.575, 0.925
    for k, value in enumerate((0.275, 0.575, 0.925)):
        inside = image[label == k] if k else image[20:44, 20:44][label[20:44, 20:44] == 0]
        assert float(inside.median()) == pytest.approx(value, abs=0.05)


def test_ranges_of_slices_are_respected(write_case: Write, task: Task) -> None:
    case = write_case("a", 1)
    whole, part = dataset_of([case], task), dataset_of([case | {"slices": [(2, 4), (6, 7)]}], task)
    assert len(part) == 3
    for i, j in enumerate((2, 3, 6)):
        assert torch.equal(part[i]["image"], whole[j]["image"])
        assert torch.equal(part[i]["label"], whole[j]["label"])
    with pytest.raises(InputError, match="case 'a': slices 6 to 12 do not lie within its 8 slices"):
        dataset_of([case | {"slices": [(6, 12)]}], task)


def test_all_axes_are_the_slices_along_each(write_case: Write, task: Task) -> None:
    """A training case gives what three data sets along one axis hold, with neighbors along that axis."""
    case = write_case("a", 1, shape=(36, 28, 18))
    wide = dataclasses.replace(task, context=1)
    every = dataset_of([case], dataclasses.replace(wide, axes="all"))
    single = [dataset_of([case], dataclasses.replace(wide, axis=axis)) for axis in ("axial", "sagittal", "coronal")]
    assert len(every) == sum(map(len, single)) == 18 + 36 + 28
    expected = [dataset[i] for dataset in single for i in range(len(dataset))]
    for i, item in enumerate(expected):
        assert torch.equal(every[i]["image"], item["image"]) and torch.equal(every[i]["label"], item["label"])
        assert every[i]["case"] == 0
    assert every.statistics.to_dict() == single[0].statistics.to_dict()
    assert len(dataset_of([case], dataclasses.replace(wide, axes="all"), part="validation")) == 18


def test_slices_that_are_held_out_are_open_along_the_other_axes(write_case: Write, task: Task, tmp_path: Path) -> None:
    case, every = write_case("a", 1, shape=(36, 28, 18)), dataclasses.replace(task, axes="all")
    part = dataset_of([case | {"slices": [(2, 5), (9, 18)]}], every, partial=PartialLabels(task.classes))
    whole = dataset_of([case], every)
    label = nib.load(case["label"])
    held = np.zeros(label.shape, np.uint8)
    held[:, :, [0, 1, 5, 6, 7, 8]] = 1
    nib.save(nib.Nifti1Image(held, label.affine), tmp_path / "held.nii.gz")
    outside = dataset_of([case | {"label": str(tmp_path / "held.nii.gz")}], every)
    assert len(part) == 12 + 36 + 28
    for i, j in zip(range(12), (2, 3, 4, *range(9, 18)), strict=True):
        assert torch.equal(part[i]["label"], whole[j]["label"])
    for i in range(36 + 28):
        found, expected, hidden = part[12 + i], whole[18 + i], outside[18 + i]["label"] == 1
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["label"] == IGNORED, hidden) and hidden.any()
        # at the border of classes a voxel that is hidden may decide
        assert (found["label"][~hidden] == expected["label"][~hidden]).float().mean() > 0.98


def test_all_axes_need_nearly_cubic_voxels(
    write_case: Write, task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = write_case("a", 1)
    for key in ("image", "label"):
        thick = nib.Nifti1Image(np.asarray(nib.load(case[key]).dataobj), np.diag([4.0, 4.0, 6.5, 1.0]))
        case[key] = str(tmp_path / f"thick_{key}.nii.gz")
        nib.save(thick, case[key])
    every = dataset_of([case], dataclasses.replace(task, axes="all"))
    assert len(every) == 8 and "case 'a'" in caplog.text and "4 x 4 x 6.5 mm" in caplog.text


def test_context_adds_the_neighbors_and_a_range_is_a_scan_of_its_own(write_case: Write, task: Task) -> None:
    case, wide = write_case("a", 1), dataclasses.replace(task, context=1)
    plain = dataset_of([case], task)
    whole, part = dataset_of([case], wide), dataset_of([case | {"slices": [(2, 4), (6, 7)]}], wide)
    around = {i: (max(i - 1, 0), i, min(i + 1, 7)) for i in range(8)}
    for dataset, expected in ((whole, around), (part, {0: (2, 2, 3), 1: (2, 3, 3), 2: (6, 6, 6)})):
        assert len(dataset) == len(expected)
        for i, triple in expected.items():
            assert torch.equal(dataset[i]["image"], torch.cat([plain[j]["image"] for j in triple]))
            assert torch.equal(dataset[i]["label"], plain[triple[1]]["label"])
    assert whole.statistics.to_dict() == plain.statistics.to_dict(), "statistics are those of the slices alone"
    assert whole.signature() == plain.signature()


def test_context_of_tiles_stays_in_the_tile(write_case: Write, task: Task) -> None:
    small = Task(classes=task.classes, spacing=4.0, image_size=32)
    case = write_case("a", 1)
    plain, wide = dataset_of([case], small), dataset_of([case], dataclasses.replace(small, context=1))
    assert len(wide) == len(plain) > 8
    for i in range(len(plain)):
        window, j = divmod(i, 8)
        triple = [8 * window + k for k in (max(j - 1, 0), j, min(j + 1, 7))]
        assert torch.equal(wide[i]["image"], torch.cat([plain[k]["image"] for k in triple]))


def test_augmentation_with_context_gives_the_label_of_the_slice(write_case: Write, task: Task) -> None:
    """Geometry depends on nothing but (seed, epoch, index), so labels are those without context."""
    case = write_case("a", 1)
    augmentation = build_augmentation(task)
    plain = dataset_of([case], task, augmentation=augmentation, seed=7)
    wide = dataset_of([case], dataclasses.replace(task, context=1), augmentation=augmentation, seed=7)
    for key in [(1, 3), (2, 4), (5, 6)]:
        item = wide[key]
        assert item["image"].shape == (3, 64, 64) and item["label"].shape == (1, 64, 64)
        assert torch.equal(item["label"], plain[key]["label"])


def test_augmentation_follows_from_seed_epoch_and_index_alone(write_case: Write, task: Task) -> None:
    case = write_case("a", 1)

    def make(seed: int) -> SliceDataset:
        return dataset_of([case], task, augmentation=build_augmentation(task), seed=seed)

    first, second = make(7), make(7)
    torch.manual_seed(3)
    _ = [first[epoch, index] for epoch in range(1, 12) for index in range(8)]
    for key in [(epoch, index) for epoch in (9, 4) for index in (2, 5, 7)]:
        a, b = first[key], second[key]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    assert not torch.equal(first[3, 2]["image"], first[4, 2]["image"])
    assert not torch.equal(first[3, 2]["image"], make(8)[3, 2]["image"])
    assert torch.equal(first[2]["image"], dataset_of([case], task)[2]["image"])  # a plain index: not augmented


def test_a_body_beyond_the_field_of_view_gives_tiles(write_case: Write, task: Task) -> None:
    small = Task(classes=task.classes, spacing=4.0, image_size=32)
    dataset = dataset_of([write_case("a", 1)], small)  # the body fills 34 x 30 pixels: canvas 48 x 32 or larger
    assert len(dataset) > 8 and len(dataset) % 8 == 0
    assert dataset[0]["image"].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("length", "size", "starts"), [(64, 64, [0]), (80, 64, [0, 16]), (128, 64, [0, 64]), (144, 64, [0, 40, 80])]
)
def test_tiles_cover_the_canvas(length: int, size: int, starts: list[int]) -> None:
    assert tile_starts(length, size) == starts


def test_what_exceeds_the_memory_lies_on_disk_and_is_the_same(write_case: Write, task: Task) -> None:
    case = write_case("a", 1)
    memory, disk = dataset_of([case], task), dataset_of([case], task, memory_mb=0)
    assert torch.equal(memory[4]["image"], disk[4]["image"])


def test_the_signature_tells_data_apart(write_case: Write, task: Task) -> None:
    a, b = write_case("a", 1), write_case("b", 2)
    assert dataset_of([a], task).signature() == dataset_of([a], task).signature() != dataset_of([b], task).signature()


def test_labels_without_foreground_are_one_line(write_case: Write, task: Task) -> None:
    with pytest.raises(InputError) as error:
        dataset_of([write_case("a", empty=True)], task)
    assert str(error.value) == (
        "the training labels hold no foreground (liver, spleen) in 8 slices; check the task's labels"
    )


def test_a_class_that_never_occurs_is_named(write_case: Write, task: Task, caplog: pytest.LogCaptureFixture) -> None:
    more = Task(classes=(*task.classes, "kidney"), spacing=4.0, image_size=64)
    dataset_of([write_case("a")], more)
    assert "no training slice holds kidney" in caplog.text


def test_ignored_pixels_are_told(write_case: Write, task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    case, ids = write_case("a"), {"liver": (1,), "spleen": (2,), "ignore": (7,)}
    image = nib.load(case["label"])
    labels = np.asarray(image.dataobj).copy()
    labels[:, :, :2] = 7
    nib.save(nib.Nifti1Image(labels, image.affine), case["label"])
    partial = partial_labels([case], task, ids)
    transform = build_preprocessing(task, labels=True, dataset_labels=ids, partial=partial)
    dataset = SliceDataset([case], transform, task, partial=partial)
    ignored = sum(int((dataset[i]["label"] == IGNORED).sum()) for i in range(len(dataset)))
    share = 100 * ignored / (64 * 64 * len(dataset))
    assert ignored and f"{share:.3g} % of the training labels are open" in caplog.text


def test_a_label_of_another_scan_is_one_line(write_case: Write, task: Task) -> None:
    case, other = write_case("a"), write_case("b", shape=(40, 36, 6))
    with pytest.raises(InputError, match=r"40 x 36 x 6 voxels but its image 40 x 36 x 8"):
        dataset_of([case | {"label": other["label"]}], task)


def test_no_case_and_no_label_are_one_line(write_case: Write, task: Task) -> None:
    with pytest.raises(InputError, match="the data set has no validation case"):
        dataset_of([], task, part="validation")
    case = write_case("a")
    del case["label"]
    with pytest.raises(InputError, match="case 'a' has no label"):
        dataset_of([case], task)


def test_embeddings_where_the_encoder_stays_images_where_not(
    write_case: Write, task: Task, make_segmenter: Callable[..., SamSegmenter]
) -> None:
    cases, transform = [write_case("a")], build_preprocessing(task, labels=True)
    augmentation = build_augmentation(task)

    def build(adapters: dict[str, Any], **settings: Any) -> Any:
        network = make_segmenter(adapters=adapters)
        return build_dataset(cases, transform, task, network, augmentation, views=3, **settings)

    embedded = build({"sam_da": {}})
    assert isinstance(embedded, EmbeddingDataset) and embedded.views == 3
    assert embedded.foreground.tolist() == [False] + [True] * 6 + [False]
    images = build({"sam_da": {}}, embeddings=False)
    assert isinstance(images, SliceDataset) and images.signature() == embedded.signature()
    assert isinstance(build({"salt": {}}), SliceDataset)
    plain = build_dataset(cases, transform, task, make_segmenter(), None, views=3)
    assert plain.views == 1  # without augmentation all views would be equal


def test_embeddings_hold_the_augmented_view_of_image_and_label(
    write_case: Write, task: Task, make_segmenter: Callable[..., SamSegmenter]
) -> None:
    network = make_segmenter()
    args = ([write_case("a")], build_preprocessing(task, labels=True), task)
    embedded = build_dataset(*args, network, build_augmentation(task), views=3, seed=2)
    slices = SliceDataset(*args, augmentation=build_augmentation(task), seed=2)
    for epoch, index in [(1, 3), (2, 3), (3, 5)]:
        item = embedded[epoch, index]
        view = slices.view(index, embedded.choose(epoch, index))
        with torch.no_grad():
            expected = network.encode(view["image"][None])["embedding"][0]
            torch.testing.assert_close(item["pyramid"]["embedding"], expected.half())
        assert torch.equal(item["label"], view["label"])


def test_prepare_batch_gives_what_the_network_takes() -> None:
    image, label = torch.zeros(2, 3), torch.ones(2, 1, 8, 8)
    for given, expected in (({"image": image}, image), ({"pyramid": {"4": image}}, {"4": image})):
        inputs, labels = prepare_batch(given | {"label": label}, torch.device("cpu"))
        assert str(inputs) == str(expected) and labels.sum() == 128


def test_the_slices_are_the_file_seen_from_below(write_case: Write, task: Task) -> None:
    """Rows run from anterior to posterior, columns from right to left."""
    case = write_case("a", 1)
    label = nib.load(case["label"]).get_fdata()
    x, y = (axis.mean() for axis in np.nonzero(label[:, :, 3] == 1))
    other_x, other_y = (axis.mean() for axis in np.nonzero(label[:, :, 3] == 2))
    seen = dataset_of([case], task)[3]["label"][0]
    rows, columns = zip(*[torch.nonzero(seen == k).float().mean(0).tolist() for k in (1, 2)], strict=True)
    assert columns[0] - columns[1] == pytest.approx((other_x - x) * 4.2 / 4.0, abs=0.6)
    assert rows[0] - rows[1] == pytest.approx((other_y - y) * 3.9 / 4.0, abs=0.6)
