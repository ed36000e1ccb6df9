# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Invertd, apply_transform
from volumes import AFFINES, SHAPE, numbered, save, world

from samda.data.slices import SliceGrid
from samda.data.transforms import (
    AIR,
    RandTissueContrastd,
    ScaleBodyIntensityd,
    build_augmentation,
    build_preprocessing,
    intensity_range,
)
from samda.errors import InputError, UsageError, cause_of
from samda.task import Task

TASK = Task(classes=("background", "liver", "spleen"), window=(-100.0, 739.0), spacing=1.0, image_size=64)
MARKED = (8, 11, 4)  # a voxel near a corner of SHAPE, nowhere near its mirror images


def case(folder, affine, ending=".nii.gz", label_affine=None, label=None) -> dict[str, str]:
    label = np.zeros(SHAPE, np.uint8) if label is None else label
    label[MARKED] = 2
    return {
        "id": "p1",
        "image": save(folder / f"image{ending}", numbered(), affine),
        "label": save(folder / f"label{ending}", label, affine if label_affine is None else label_affine),
    }


# -------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("name", AFFINES)
def test_every_voxel_keeps_its_value_at_its_physical_place(tmp_path, name):
    affine = AFFINES[name]
    result = build_preprocessing(TASK, labels=True)(case(tmp_path, affine))
    image, label = result["image"], result["label"]
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    assert label.dtype == torch.uint8
    assert result["id"] == "p1"
    to_index = np.linalg.inv(image.affine.numpy())
    assert (np.diag(image.affine.numpy())[:3] > 0).all()  # RAS: every axis runs along its own direction
    for voxel in [(0, 0, 0), (9, 13, 5), MARKED, (3, 0, 5)]:
        place = world(affine, voxel)
        index = tuple(np.round(to_index @ [*place, 1]).astype(int)[:3])
        np.testing.assert_allclose(world(image.affine.numpy(), index), place, atol=1e-4)
        assert image[(0, *index)].item() == pytest.approx((numbered()[voxel] + 100) / 839, abs=1e-6)
        assert label[(0, *index)].item() == (2 if voxel == MARKED else 0)
    assert int((label > 0).sum()) == 1


def test_marked_voxel_lies_where_it_belongs_on_the_slice(tmp_path):
    """Files with flipped axes give the same picture: the marked voxel is anterior right, so top left."""
    flip = np.array([[-1, 0, 0, 9], [0, -1, 0, 13], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    files = {"as it is": ((8, 11, 4), AFFINES["ras"]), "flipped": ((1, 2, 4), AFFINES["ras"] @ flip)}
    places = []
    for name, (voxel, affine) in files.items():
        array = np.full(SHAPE, -100, np.int16)
        array[voxel] = 700
        path = save(tmp_path / f"{name}.nii.gz", array, affine)
        image = build_preprocessing(TASK, labels=False)({"image": path})["image"]
        grid = SliceGrid(image.shape[1:], image.pixdim, np.array([[0, n] for n in image.shape[1:]]), TASK)
        plane = grid.extract(image, 4)[0, 0]
        places.append(np.unravel_index(plane.argmax(), plane.shape))
    assert places[0] == places[1]
    row, column = places[0]
    # from the middle (between voxels 4 and 5, 6 and 7): 3.5 voxels of 2 mm to the right, 4.5 of 0.7 mm to the front
    assert column == pytest.approx(31.5 - 7, abs=0.51)
    assert row == pytest.approx(31.5 - 3.15, abs=0.51)


def test_label_in_another_orientation_of_the_same_grid(tmp_path):
    """The label is stored with x and y reversed, as NIfTI beside a DICOM series often is."""
    flip = np.array([[-1, 0, 0, 9], [0, -1, 0, 13], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 3:9, 1:3] = 1
    image = save(tmp_path / "image.nii", numbered(), AFFINES["oblique"])
    flipped = save(tmp_path / "label.nii", label[::-1, ::-1].copy(), AFFINES["oblique"] @ flip)
    result = build_preprocessing(TASK, labels=True)({"image": image, "label": flipped})
    np.testing.assert_array_equal(result["label"][0].numpy(), label)


def test_real_patient_b_and_its_label_agree(examples):
    """The liver of patient B is soft tissue of one density, if label and DICOM series lie on each other."""
    example = examples["B"]
    result = build_preprocessing(example.task, labels=True)(example.case)
    low, high = example.task.window
    hu = result["image"][0] * (high - low) + low
    liver = hu[result["label"][0] == example.task.classes.index("liver")]
    assert len(liver) == 366708  # voxels of id 5 in the file
    assert 60 < float(liver.median()) < 140
    assert float((liver < -50).float().mean()) < 0.01


def test_the_result_can_be_inverted_by_monai(tmp_path):
    preprocessing = build_preprocessing(TASK, labels=False)
    path = save(tmp_path / "a.nii.gz", numbered(), AFFINES["permuted"])
    result = preprocessing({"image": path})
    assert result["image"].shape[1:] != SHAPE
    result["pred"] = result["image"].clone()
    inverted = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=True)(result)["pred"]
    np.testing.assert_allclose(inverted[0].numpy(), (numbered() + 100) / 839, atol=1e-6)
    np.testing.assert_allclose(inverted.affine.numpy(), AFFINES["permuted"], atol=1e-5)


def test_picture_and_its_mask(tmp_path):
    task = Task(modality="image", percentiles=(0, 100), labels={"foreground": 255}, spacing=1.0, image_size=16)
    picture = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    mask = np.zeros((8, 12), np.uint8)
    mask[1, 2:5] = 255  # second row from the top
    for name, array in (("a.png", picture), ("m.png", mask)):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    result = build_preprocessing(task, labels=True)(
        {"image": str(tmp_path / "a.png"), "label": str(tmp_path / "m.png")}
    )
    grid = SliceGrid.from_volume(result["image"], result["image"].affine, task)
    found = grid.extract(result["image"], 0)[0, 0, 4:12, 2:14]
    np.testing.assert_allclose(found.numpy(), picture / 95, atol=1e-6)
    np.testing.assert_array_equal(grid.extract_labels(result["label"], 0)[0, 4:12, 2:14].numpy(), mask / 255)
    restored = grid.restore(torch.stack([1.0 - mask_on(grid, mask), mask_on(grid, mask)], 1)).argmax(0)
    np.testing.assert_array_equal(restored.numpy(), result["label"][0].numpy())


def mask_on(grid: SliceGrid, mask: np.ndarray) -> torch.Tensor:
    canvas = torch.zeros((1, *grid.canvas))
    canvas[0, 4:12, 2:14] = torch.tensor(mask / 255)
    return canvas


def test_channels(tmp_path):
    colors = Task(classes=("background", "a"), modality="image", in_channels=3)
    path = save(tmp_path / "a.nii.gz", numbered((10, 14, 6, 3)), AFFINES["ras"])
    result = build_preprocessing(colors, labels=False)({"image": path})
    assert result["image"].shape == (3, 10, 14, 6)
    order = result["image"][:, 1, 0, 0]
    assert (order[1:] > order[:-1]).all()
    with pytest.raises(InputError, match="in_channels"):
        build_preprocessing(TASK, labels=False)({"image": path})


@pytest.mark.parametrize(
    ("shift", "size", "message"),
    [(0.05, SHAPE, None), (0.3, SHAPE, "0.30 mm from its image"), (0.0, (10, 14, 5), "10 x 14 x 5 voxels")],
)
def test_labels_beside_their_image_are_refused(tmp_path, shift, size, message):
    affine = AFFINES["ras"].copy()
    affine[0, 3] += shift  # the smallest side is 0.7 mm, so 0.07 mm pass
    paths = {
        "image": save(tmp_path / "image.nii", numbered(), AFFINES["ras"]),
        "label": save(tmp_path / "label.nii", np.zeros(size, np.uint8), affine),
    }
    preprocessing = build_preprocessing(TASK, labels=True)
    if message is None:
        preprocessing(paths)
        return
    with pytest.raises(InputError, match=message):
        preprocessing(paths)


def test_missing_keys_and_lossy_labels(tmp_path):
    preprocessing = build_preprocessing(TASK, labels=True)
    image = save(tmp_path / "a.nii.gz", numbered(), AFFINES["ras"])
    with pytest.raises(InputError, match="case 'p1' has no label"):
        preprocessing({"id": "p1", "image": image})
    with pytest.raises(InputError, match="did you mean 'lable'"):
        preprocessing({"id": "p1", "image": image, "lable": image})
    with pytest.raises(InputError, match="JPEG"):
        preprocessing({"image": image, "label": "mask.jpg"})


def test_errors_pass_through_monai(tmp_path):
    """As they are from the preprocessing and a Dataset; behind the RuntimeErrors of other MONAI code they are found."""
    (tmp_path / "a.nii.gz").write_text("no scan")
    with pytest.raises(InputError, match="cannot be read as a scan"):
        build_preprocessing(TASK, labels=False)({"image": str(tmp_path / "a.nii.gz")})
    data = Dataset([{"image": str(tmp_path / "a.nii.gz")}], build_preprocessing(TASK, labels=False))
    with pytest.raises(InputError, match="cannot be read as a scan"):
        data[0]
    with pytest.raises(RuntimeError) as caught:
        apply_transform(data.transform.transforms[0], data.data[0])
    assert "cannot be read as a scan" in str(cause_of(caught.value))
    assert cause_of(ValueError("else")) is None


def test_other_readers_of_monai_are_not_tried(tmp_path):
    np.save(tmp_path / "a.npy", numbered())  # MONAI's own readers would take it
    with pytest.raises(InputError, match="cannot be read as a scan"):
        build_preprocessing(TASK, labels=False)({"image": str(tmp_path / "a.npy")})


def test_names_of_the_data_set_reach_the_labels(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[0, 0, 0] = 7
    paths = case(tmp_path, AFFINES["ras"], label=label)
    names = {"liver": (7,), "spleen": (2,)}
    result = build_preprocessing(TASK, labels=True, dataset_labels=names)(paths)
    assert result["label"][0, 0, 0, 0] == 1
    assert result["label"][(0, *MARKED)] == 2
    with pytest.raises(InputError, match="does not name: 7"):
        build_preprocessing(TASK, labels=True)(paths)


# --------------------------------------------------------------------------------------------------------- augmentation


def item(seed: int = 0) -> dict[str, torch.Tensor]:
    """A slice whose label is where the image is bright: alignment can be read off."""
    label = torch.zeros((1, 64, 64), dtype=torch.uint8)
    label[0, 12:30, 20:50] = 1
    label[0, 40:52, 30:44] = 2
    levels = torch.tensor([0.2, 0.55, 0.9])
    noise = torch.randn((1, 64, 64), generator=torch.Generator().manual_seed(seed)) * 0.01
    return {"image": levels[label.long()] + noise, "label": label}


def test_strength_zero_changes_nothing():
    found = build_augmentation(TASK, 0)(item())
    assert torch.equal(found["image"], item()["image"])
    assert torch.equal(found["label"], item()["label"])


def test_negative_strength_is_refused():
    with pytest.raises(UsageError, match="must not be negative, got -1"):
        build_augmentation(TASK, -1)


def test_the_same_seed_gives_the_same_slices():
    first, second = build_augmentation(TASK), build_augmentation(TASK)
    first.set_random_state(seed=5)
    second.set_random_state(seed=5)
    runs = [[augmentation(item()) for _ in range(4)] for augmentation in (first, second)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
    assert not torch.equal(runs[0][0]["image"], runs[0][1]["image"])
    second.set_random_state(seed=6)
    assert not torch.equal(second(item())["image"], runs[0][0]["image"])


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    augmentation = build_augmentation(TASK, 2.0)
    augmentation.set_random_state(seed=1)
    for _ in range(10):
        augmentation(item())
    assert torch.equal(before[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_label_stays_on_the_image():
    """After the augmentation, the pixels of each class still are of one kind, and the classes keep their order."""
    augmentation = build_augmentation(dataclasses.replace(TASK, image_size=64), 1.0)
    moved = 0
    for seed in range(40):
        augmentation.set_random_state(seed=seed)
        original = item(seed)
        found = augmentation(dict(original))
        image, label = found["image"][0], found["label"][0]
        assert image.dtype == torch.float32
        assert label.dtype == torch.uint8
        assert image.min() >= 0
        assert image.max() <= 1
        assert set(label.unique().tolist()) <= {0, 1, 2}
        assert type(found["image"]) is torch.Tensor
        moved += not torch.equal(label, original["label"][0])
        # the bright blob, located by its intensity, has its center where the label says
        center = torch.nonzero(label == 2).float().mean(0)
        inner = image[label == 2].median()
        if inner - image[label == 0].median() < 0.25:
            continue  # a strong gray value map; its place cannot be read off
        bright = torch.nonzero((image - inner).abs() < 0.08).float()
        near = bright[(bright - center).norm(dim=1) < 14]
        assert (near.mean(0) - center).norm() < 1.5
        assert torch.equal(original["image"], item(seed)["image"])  # the input is left alone
    assert moved > 20


def test_no_flips():
    """Left stays left: the larger blob is always above the smaller one."""
    augmentation = build_augmentation(TASK, 1.0)
    augmentation.set_random_state(seed=0)
    for _ in range(30):
        label = augmentation(item())["label"][0]
        assert torch.nonzero(label == 1)[:, 0].float().mean() < torch.nonzero(label == 2)[:, 0].float().mean()


def test_intensities_change_a_lot():
    """The gap between two tissues varies over the range that scanners and contrast media span."""
    augmentation = build_augmentation(TASK, 1.0)
    augmentation.set_random_state(seed=0)
    gaps = []
    for _ in range(60):
        found = augmentation(item())
        gaps.append(float(found["image"][found["label"] == 1].median() - found["image"][found["label"] == 0].median()))
    assert min(gaps) < 0.2  # 0.35 without augmentation
    assert max(gaps) > 0.45
    assert np.std(gaps) > 0.05


def test_it_works_in_a_data_loader():
    augmentation = build_augmentation(TASK, 1.0)
    loader = DataLoader(Dataset([item(i) for i in range(4)], augmentation), batch_size=4)
    batch = next(iter(loader))
    assert batch["image"].shape == batch["label"].shape == (4, 1, 64, 64)


CT = Task(window=(-160.0, 240.0))
MR = dataclasses.replace(CT, modality="MR", percentiles=(1.0, 99.0))
PICTURE = dataclasses.replace(CT, modality="image", in_channels=3)


def scale(array, task, spacing=(1.0, 1.0, 1.0)) -> MetaTensor:
    image = MetaTensor(torch.as_tensor(array), affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))
    image.meta["filename_or_obj"] = "scan.nii.gz"
    return ScaleBodyIntensityd("image", task)({"image": image})["image"]


def body(margin: int) -> np.ndarray:
    """MR: a cube of 16 x 18 x 20 voxels with intensities 100..500, in air of -3..3 that is `margin` voxels wide."""
    rng = np.random.default_rng(0)
    shape = (16 + 2 * margin, 18 + 2 * margin, 20)
    volume = rng.uniform(-3, 3, shape)
    volume[margin : margin + 16, margin : margin + 18] = rng.uniform(100, 500, (16, 18, 20))
    return volume[None]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32])
def test_ct_window(dtype):
    array = torch.tensor([-1000, -160, -60, 40, 240, 3000], dtype=dtype).reshape(1, 1, 2, 3)
    result = scale(array, CT)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.flatten().numpy(), [0, 0, 0.25, 0.5, 1, 1], atol=1e-7)
    assert result.meta["filename_or_obj"] == "scan.nii.gz"


def test_input_is_left_alone():
    array = torch.arange(-100, 140, dtype=torch.float32).reshape(1, 4, 5, 12)
    scale(array, CT)
    assert torch.equal(array, torch.arange(-100, 140, dtype=torch.float32).reshape(1, 4, 5, 12))


@pytest.mark.parametrize("margin", [2, 8, 40])
def test_the_amount_of_air_does_not_decide(margin):
    low, high = intensity_range(body(margin), np.array([4.0, 4.0, 4.0]), MR)
    assert low == pytest.approx(104, abs=3)  # percentiles 1 and 99 of a uniform distribution from 100 to 500
    assert high == pytest.approx(496, abs=3)
    assert np.percentile(body(40), 99) < 450  # the whole volume's would differ


def test_mr_scaling_is_linear_between_the_percentiles():
    volume = body(8)
    low, high = intensity_range(volume, np.array([4.0, 4.0, 4.0]), MR)
    result = scale(volume, MR, (4.0, 4.0, 4.0)).numpy()
    np.testing.assert_allclose(result, np.clip((volume - low) / (high - low), 0, 1), atol=1e-6)


def test_pictures_keep_their_colors():
    rng = np.random.default_rng(0)
    picture = np.stack([rng.uniform(0, top, (20, 30, 1)) for top in (255, 120, 60)])
    low, high = intensity_range(picture, np.ones(3), dataclasses.replace(PICTURE, percentiles=(0.0, 100.0)))
    assert (low, high) == (picture.min(), picture.max())  # of all channels together
    result = scale(picture, dataclasses.replace(PICTURE, percentiles=(0.0, 100.0)))
    np.testing.assert_allclose(result.numpy(), (picture - low) / (high - low), atol=1e-6)


def test_every_mr_sequence_has_its_own_scale():
    volume = np.concatenate([body(8), 1000 * body(8) + 7])
    two = dataclasses.replace(MR, in_channels=2)
    result = scale(volume, two, (4.0, 4.0, 4.0)).numpy()
    np.testing.assert_allclose(result[0], scale(body(8), MR, (4.0, 4.0, 4.0)).numpy()[0])
    np.testing.assert_allclose(result[1], result[0], atol=1e-4)
    volume[1] = 3
    with pytest.raises(InputError, match=r"channel 1 of scan.nii.gz is constant"):
        scale(volume, two)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad):
    volume = body(2)
    volume[0, 3, 4, 5] = bad
    with pytest.raises(InputError, match=r"scan.nii.gz contains NaN or infinite values"):
        scale(volume, MR)


def test_constant_scan_is_refused():
    with pytest.raises(InputError, match=r"constant \(7 everywhere"):
        scale(np.full((1, 4, 5, 6), 7.0), MR)


@pytest.mark.parametrize("values", [(-1000, -500), (300, 900)])
def test_ct_outside_its_window_is_refused(values):
    with pytest.raises(InputError, match="window -160 to 240 HU"):
        scale(np.linspace(*values, 24).reshape(1, 2, 3, 4), CT)


def test_mr_whose_percentiles_meet_is_refused():
    volume = np.zeros((1, 20, 20, 5))
    volume[0, 3, 3, 3] = 1
    with pytest.raises(InputError, match=r"percentiles \(1.0, 99.0\)"):
        scale(volume, MR)


def test_ct_without_negative_values_warns():
    with pytest.warns(UserWarning, match="Hounsfield"):
        scale(np.linspace(0, 2000, 24).reshape(1, 2, 3, 4), CT)


def slice_of(*organs: float) -> dict[str, torch.Tensor]:
    """Air, tissue at 0.5, and organs of these values, 12 pixels wide each."""
    image, label = torch.zeros(1, 40, 60), torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 8:32, 4:56] = 0.5
    for k, value in enumerate(organs, 1):
        where = (slice(None), slice(12, 28), slice(8 + 20 * (k - 1), 24 + 20 * (k - 1)))
        image[where], label[where] = value, k
    return {"image": image, "label": label}


def changed(seed: int, curve: float, offset: float, *organs: float) -> np.ndarray:
    transform = RandTissueContrastd(1.0, curve, offset).set_random_state(seed=seed)
    return transform(slice_of(*organs))["image"].numpy()[0]


def test_organs_shift_independently_and_by_no_more_than_the_offset() -> None:
    shifts = np.array([[x[20, 16] - 0.6, x[20, 36] - 0.6] for x in (changed(s, 0.0, 0.2, 0.6, 0.6) for s in range(40))])
    assert np.abs(shifts).max() <= 0.2 + 1e-6
    assert np.abs(shifts).max() > 0.15, "the range is used"
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.5
    assert (shifts.min(0) < 0).all() and (shifts.max(0) > 0).all()


def test_air_stays_air_and_tissue_far_from_organs_follows_the_curve_alone() -> None:
    for seed in range(20):
        x = changed(seed, 1.0, 0.25, 0.6)
        assert np.abs(x[:4]).max() == 0.0
        away = x[9:31, 50:55]  # further than the offsets' soft border
        assert np.ptp(away) < 1e-6, "one gray value stays one gray value"


def test_curves_may_invert_contrast_and_stay_in_range() -> None:
    differences = [x[20, 16] - x[20, 53] for x in (changed(s, 1.0, 0.0, 0.8) for s in range(60))]
    assert min(differences) < -0.1 and max(differences) > 0.1
    assert all(0.0 <= changed(s, 1.0, 0.5, 0.9).min() <= changed(s, 1.0, 0.5, 0.9).max() <= 1.0 for s in range(5))


def test_the_seed_decides_and_probability_zero_changes_nothing() -> None:
    assert np.array_equal(changed(3, 1.0, 0.2, 0.6), changed(3, 1.0, 0.2, 0.6))
    assert not np.array_equal(changed(3, 1.0, 0.2, 0.6), changed(4, 1.0, 0.2, 0.6))
    item = slice_of(0.6)
    assert RandTissueContrastd(0.0, 1.0, 0.2)(item)["image"] is item["image"]
    assert AIR < 0.1
