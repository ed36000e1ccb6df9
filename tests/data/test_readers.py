# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk
from volumes import AFFINES, SHAPE, numbered, save

from samda.data.formats import stem
from samda.data.readers import Scan, read_geometry, read_label, read_scan, uncropped
from samda.errors import InputError


def refusal(path, channels=1, named=None) -> str:
    with pytest.raises(InputError) as caught:
        read_scan(path, channels)
    message = str(caught.value)
    assert "\n" not in message
    assert str(named or path) in message
    return message


# -------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", AFFINES)
def test_nifti_keeps_values_and_nibabels_affine(tmp_path, name, ending):
    path = save(tmp_path / f"a{ending}", numbered(), AFFINES[name])
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array, numbered())
    assert scan.array.dtype == np.int16
    np.testing.assert_allclose(scan.affine, nib.load(path).affine, atol=1e-6)
    np.testing.assert_allclose(scan.affine, AFFINES[name], atol=1e-4)


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 2), (2, 4)])
def test_form_codes_that_agree_give_one_affine_without_a_warning(tmp_path, recwarn, sform, qform):
    path = save(tmp_path / "a.nii", numbered(), AFFINES["oblique"], sform, qform)
    np.testing.assert_allclose(read_scan(path).affine, AFFINES["oblique"], atol=1e-4)
    assert not [w for w in recwarn if "form" in str(w.message)]


def test_sform_wins_over_a_qform_that_differs_and_this_is_said(tmp_path):
    image = nib.Nifti1Image(numbered(), AFFINES["ras"])
    image.set_sform(AFFINES["ras"], 2)
    image.set_qform(AFFINES["lps"], 1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="sform and qform differ by up to 36.0 mm"):  # 2 * (10 - 1) * 2 mm along x
        scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_allclose(scan.affine, AFFINES["ras"])


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (1.005, False), (1.1, True)])
def test_pixdim_that_contradicts_the_only_form_is_said(tmp_path, recwarn, scale, warns):
    path = Path(save(tmp_path / "a.nii", numbered(), AFFINES["oblique"], 1, 0))
    content = bytearray(path.read_bytes())
    content[80:92] = np.array([1.5, 0.8, 4.0 * scale], "<f4").tobytes()
    path.write_bytes(content)
    np.testing.assert_allclose(read_scan(path).affine, AFFINES["oblique"], atol=1e-4)
    assert [str(path) in str(w.message) and "4.4 mm by pixdim" in str(w.message) for w in recwarn] == [True] * warns


FIELDS = [  # place, type, value, what is named
    *[(108, "<f4", 0.0, "vox_offset 0"), (108, "<f4", 100.0, "vox offset 100")],
    *[(112, "<f4", np.inf, "scl_slope inf"), (112, "<f4", -np.inf, "scl_slope -inf")],
    (123, "u1", 6, "xyzt_units of its header is 6"),
]


@pytest.mark.parametrize(("place", "kind", "value", "named"), FIELDS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_fields_of_nifti_that_cannot_be_meant(tmp_path, place, kind, value, named, ending):
    content = bytearray(Path(save(tmp_path / "b.nii", numbered(), AFFINES["ras"])).read_bytes())
    data = np.array([value], kind).tobytes()
    content[place : place + len(data)] = data
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    assert named in refusal(path)
    with pytest.raises(InputError, match=named.split()[0]):
        read_geometry(path)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_a_slope_that_the_format_defines_as_none_is_none(tmp_path, slope):
    path = Path(save(tmp_path / "a.nii", numbered(), AFFINES["ras"]))
    content = bytearray(path.read_bytes())
    content[112:116] = np.array([slope], "<f4").tobytes()
    path.write_bytes(content)
    np.testing.assert_array_equal(read_scan(path).array, numbered())


def test_nifti_without_any_form_code_warns(tmp_path):
    path = save(tmp_path / "a.nii", numbered(), AFFINES["ras"], 0, 0)
    with pytest.warns(UserWarning, match="neither sform nor qform"):
        read_scan(path)


def test_sheared_affine_that_itk_refuses_is_kept(tmp_path):
    affine = AFFINES["ras"].copy()
    affine[1, 2] = 0.8  # a tilted gantry
    path = save(tmp_path / "a.nii.gz", numbered(), affine, 1, 0)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(path)
    scan = read_scan(path)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(scan.array, numbered())


@pytest.mark.parametrize("what", ["flat", "nan"])
def test_unusable_affines_are_refused(tmp_path, what):
    affine = AFFINES["ras"].copy()
    if what == "flat":
        affine[:3, 2] = affine[:3, 1]  # two axes in one direction
    else:
        affine[0, 3] = np.nan
    assert "unusable affine" in refusal(save(tmp_path / "a.nii", numbered(), affine, 1, 0))


def test_scaled_nifti_is_float32_with_slope_and_intercept(tmp_path):
    image = nib.Nifti1Image(numbered(), AFFINES["ras"])
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "a.nii.gz")
    stored = nib.load(tmp_path / "a.nii.gz")  # nibabel stores (value - intercept) / slope
    scan = read_scan(tmp_path / "a.nii.gz")
    assert scan.array.dtype == np.float32
    np.testing.assert_allclose(scan.array, stored.get_fdata(), atol=1e-3)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("uint8", "uint8"), ("uint16", "int32"), (">i2", "int16"), ("uint32", "int64"), ("float64", "float32")],
)
def test_number_types_that_torch_lacks_are_widened_or_narrowed(tmp_path, given, kept):
    array = (numbered() + 100).clip(0, 250).astype(given)
    header = nib.Nifti1Header(endianness=">" if given.startswith(">") else "<")
    header.set_data_dtype(array.dtype)
    image = nib.Nifti1Image(array, AFFINES["ras"], header)
    nib.save(image, tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    assert scan.array.dtype == np.dtype(kept)
    np.testing.assert_array_equal(scan.array, array)


def test_complex_voxels_are_refused(tmp_path):
    path = save(tmp_path / "a.nii", numbered().astype(np.complex64), AFFINES["ras"])
    assert "complex64" in refusal(path)


@pytest.mark.parametrize("shape", [(10, 14), (10, 14, 1), (10, 14, 2), (10, 14, 6, 1), (10, 14, 6, 1, 1)])
def test_few_or_trailing_dimensions(tmp_path, shape):
    array = numbered(shape)
    scan = read_scan(save(tmp_path / "a.nii", array, AFFINES["ras"]))
    expected = array.reshape((*shape, 1)[:3])
    np.testing.assert_array_equal(scan.array, expected)
    assert read_geometry(tmp_path / "a.nii")[0] == expected.shape


@pytest.mark.parametrize("shape", [(*SHAPE, 3), (*SHAPE, 1, 3)])
def test_4d_needs_declared_channels(tmp_path, shape):
    array = numbered(shape)
    path = save(tmp_path / "a.nii.gz", array, AFFINES["ras"])
    assert "10 x 14 x 6 x 3" in refusal(path)
    np.testing.assert_array_equal(read_scan(path, channels=3).array, array.reshape(*SHAPE, 3))


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_three_equal_channels_of_a_volume_are_three(tmp_path, ending):
    """Three time points may be equal; only a picture is gray because its colors are."""
    array = np.repeat(numbered()[..., None], 3, axis=3)
    path = save(tmp_path / "a.nii.gz", array, AFFINES["ras"])
    if ending == ".nrrd":
        path = tmp_path / "a.nrrd"
        sitk.WriteImage(sitk.GetImageFromArray(array.transpose(2, 1, 0, 3), isVector=True), str(path))
    assert "has 3 channel(s) or time points where one channel is declared" in refusal(path)
    np.testing.assert_array_equal(read_scan(path, channels=3).array, array)
    np.testing.assert_array_equal(read_scan(path, channels=None).array, array)


def test_one_file_a_channel(tmp_path):
    paths = [save(tmp_path / f"a_{c}.nii.gz", numbered() + 1000 * c, AFFINES["oblique"]) for c in range(3)]
    for count in (2, 3):
        scan = read_scan(paths[:count], channels=count)
        expected = np.stack([numbered() + 1000 * c for c in range(count)], axis=-1)
        np.testing.assert_array_equal(scan.array, expected)
        np.testing.assert_allclose(scan.affine, AFFINES["oblique"], atol=1e-5)
    assert read_geometry(paths)[0] == SHAPE
    np.testing.assert_array_equal(read_scan(paths[:1]).array, numbered())
    assert "a_0.nii.gz comes with 3 channel files" in refusal(paths, channels=2, named=Path(paths[0]))


def test_channels_on_other_grids_are_refused(tmp_path):
    first = save(tmp_path / "a_0.nii.gz", numbered(), AFFINES["ras"])
    shifted = AFFINES["ras"].copy()
    shifted[0, 3] += 0.5
    moved = save(tmp_path / "a_1.nii.gz", numbered(), shifted)
    cut = save(tmp_path / "a_2.nii.gz", numbered()[1:], AFFINES["ras"])
    assert "0.50 mm from a_0.nii.gz" in refusal([first, moved], 2, named=Path(moved))
    assert "9 x 14 x 6 voxels but a_0.nii.gz 10 x 14 x 6" in refusal([first, cut], 2, named=Path(cut))


def test_gray_scan_is_refused_where_colors_are_declared(tmp_path):
    path = save(tmp_path / "a.nii.gz", numbered(), AFFINES["ras"])
    assert "in_channels" in refusal(path, channels=3)


# -------------------------------------------------------------------------------------------------- NRRD and MetaImage


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_have_ras_affines(tmp_path, ending):
    image = sitk.GetImageFromArray(numbered().transpose(2, 1, 0))  # ITK's arrays are (z, y, x)
    image.SetSpacing((2.0, 0.7, 3.0))
    image.SetOrigin((4.0, -6.0, 11.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(image, str(path))
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array, numbered())
    # LPS columns: x runs along +y (2 mm), y along -x (0.7 mm); then x and y change sign
    expected = [[0, 0.7, 0, -4], [-2, 0, 0, 6], [0, 0, 3, 11], [0, 0, 0, 1]]
    np.testing.assert_allclose(scan.affine, expected, atol=1e-9)
    lps = np.array(image.TransformIndexToPhysicalPoint((3, 5, 2)))
    np.testing.assert_allclose((scan.affine @ [3, 5, 2, 1])[:3], lps * [-1, -1, 1])
    assert read_geometry(path)[0] == SHAPE
    np.testing.assert_allclose(read_geometry(path)[1], expected, atol=1e-9)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_itk_vector_images_have_channels_last(tmp_path, ending):
    array = numbered((*SHAPE, 3))
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0, 3), isVector=True)
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
    np.testing.assert_array_equal(read_scan(tmp_path / f"a{ending}", channels=3).array, array)
    assert "10 x 14 x 6 x 3" in refusal(tmp_path / f"a{ending}")


def test_itk_time_series_is_refused(tmp_path):
    volume = sitk.GetImageFromArray(numbered().transpose(2, 1, 0))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(tmp_path / "a.mha"))
    assert "10 x 14 x 6 x 2" in refusal(tmp_path / "a.mha")


# ----------------------------------------------------------------------------------------------------------- pictures


def picture(path: Path, array: np.ndarray) -> Path:
    """Write rows x columns[, channels] uint8."""
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(path))
    return path


def test_png_keeps_its_orientation(tmp_path):
    array = np.zeros((5, 8), np.uint8)
    array[1, 6] = 200  # second row from the top, second column from the right
    scan = read_scan(picture(tmp_path / "a.png", array))
    assert scan.array.shape == (8, 5, 1)
    assert scan.array[6, 1, 0] == 200
    np.testing.assert_array_equal(scan.affine, np.diag([-1.0, -1.0, 1.0, 1.0]))


def test_pixel_size_of_a_picture_is_one_whatever_the_file_says(tmp_path):
    image = sitk.GetImageFromArray(np.eye(6, dtype=np.uint8))
    image.SetSpacing((0.25, 0.25))
    sitk.WriteImage(image, str(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_scan(tmp_path / "a.png").affine, np.diag([-1.0, -1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(read_geometry(tmp_path / "a.png")[1], np.diag([-1.0, -1.0, 1.0, 1.0]))


def test_jpeg_is_read(tmp_path):
    scan = read_scan(picture(tmp_path / "a.jpg", np.full((6, 9), 77, np.uint8)))
    np.testing.assert_allclose(scan.array, np.full((9, 6, 1), 77), atol=2)  # lossy


def test_colors_and_alpha(tmp_path):
    colors = np.random.default_rng(0).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    opaque = np.concatenate([colors, np.full((5, 8, 1), 255, np.uint8)], axis=2)
    expected = colors.transpose(1, 0, 2)[:, :, None]
    np.testing.assert_array_equal(read_scan(picture(tmp_path / "rgb.png", colors), 3).array, expected)
    np.testing.assert_array_equal(read_scan(picture(tmp_path / "rgba.png", opaque), 3).array, expected)
    assert "channel" in refusal(tmp_path / "rgb.png")
    opaque[0, 0, 3] = 0
    assert "transparent" in refusal(picture(tmp_path / "clear.png", opaque), 3)


@pytest.mark.parametrize("ending", [".tif", ".bmp"])
def test_other_pictures(tmp_path, ending):
    array = np.random.default_rng(0).integers(0, 255, (5, 8), dtype=np.uint8)
    scan = read_scan(picture(tmp_path / f"a{ending}", array))
    np.testing.assert_array_equal(scan.array[:, :, 0], array.T)
    np.testing.assert_array_equal(scan.affine, np.diag([-1.0, -1.0, 1.0, 1.0]))


def test_tiff_of_several_pages_is_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 8), np.uint8)), str(tmp_path / "a.tif"))
    assert "4 pages" in refusal(tmp_path / "a.tif")


def test_gray_picture_saved_with_three_equal_channels_is_gray(tmp_path):
    gray = np.random.default_rng(0).integers(0, 255, (5, 8), dtype=np.uint8)
    path = picture(tmp_path / "a.png", np.stack([gray] * 3, axis=2))
    np.testing.assert_array_equal(read_scan(path).array[:, :, 0], gray.T)


# -------------------------------------------------------------------------------------------------------------- DICOM


def dicom(folder: Path, positions, series="1.2.3", name="made up", start=0) -> Path:
    """A series of slices at z = positions (mm); every slice has its own value."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, z in enumerate(positions):
        position = z if isinstance(z, tuple) else (-4.0, -6.0, z)
        image = sitk.GetImageFromArray(np.full((1, 7, 5), 10 * number, np.int16))
        image.SetSpacing((0.5, 0.25, 1.0))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{number + 1}",
            "0008|0060": "CT",
            "0008|103e": name,
            "0018|0050": "2.5",
            "0020|000d": "1.2.9",
            "0020|000e": series,
            "0020|0013": str(number),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{start + 90 - number}.dcm"))  # names against the order of positions
        writer.Execute(image)
    return folder


def test_dicom_series_is_ordered_by_position(tmp_path):
    folder = dicom(tmp_path / "series", [100.0, 102.5, 105.0])
    scan = read_scan(folder)
    assert scan.array.shape == (5, 7, 3)
    np.testing.assert_array_equal(scan.array[2, 3], [0, 10, 20])
    expected = [[-0.5, 0, 0, 4], [0, -0.25, 0, 6], [0, 0, 2.5, 100], [0, 0, 0, 1]]
    np.testing.assert_allclose(scan.affine, expected, atol=1e-6)
    shape, affine = read_geometry(folder)
    assert shape == (5, 7, 3)
    np.testing.assert_allclose(affine, expected, atol=1e-6)


def test_single_dicom_file_is_one_slice(tmp_path):
    folder = dicom(tmp_path / "series", [100.0, 102.5])
    np.testing.assert_array_equal(read_scan(folder / "89.dcm").array, np.full((5, 7, 1), 10))


def test_several_series_are_refused_by_name(tmp_path):
    dicom(tmp_path / "both", [0.0, 2.0, 4.0], series="1.2.3", name="arterial")
    dicom(tmp_path / "both", [0.0, 2.0], series="1.2.4", name="venous", start=500)
    message = refusal(tmp_path / "both")
    assert "'arterial' (3 files, UID 1.2.3)" in message
    assert "'venous' (2 files, UID 1.2.4)" in message


def test_a_missing_slice_is_refused(tmp_path):
    assert "unevenly spaced (2.00 to 4.00 mm)" in refusal(dicom(tmp_path / "gap", [0.0, 2.0, 6.0, 8.0]))


def test_tilted_gantry_gives_a_sheared_affine(tmp_path):
    scan = read_scan(dicom(tmp_path / "tilt", [(-4.0, -6.0 + 0.5 * i, 2.0 * i) for i in range(4)]))
    np.testing.assert_allclose(scan.affine[:3, 2], [0, -0.5, 2.0], atol=1e-6)  # LPS +y is RAS -y


def test_real_series_equals_its_own_values(examples):
    """Each file of patient B, read alone, is one slice of the volume at the place its header states."""
    scan = read_scan(examples["B"].image)
    assert scan.array.shape == (512, 512, 20)
    files = sorted(examples["B"].image.iterdir())
    heights = []
    for file in files:
        single = sitk.ReadImage(str(file))
        z = float(single.GetMetaData("0020|0032").split("\\")[2])
        heights.append(z)
        index = round((z - scan.affine[2, 3]) / 2.0)
        assert scan.affine[2, 3] + 2.0 * index == pytest.approx(z, abs=1e-4)
        np.testing.assert_array_equal(scan.array[:, :, index], sitk.GetArrayFromImage(single)[0].T)
    assert len(set(heights)) == 20
    # the label file of the same scan lies in another orientation of the same grid
    label = nib.load(examples["B"].label)
    assert nib.aff2axcodes(label.affine) == ("L", "A", "S")
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    np.testing.assert_allclose((scan.affine @ [0, 511, 0, 1])[:3], label.affine[:3, 3], atol=1e-3)


# -------------------------------------------------------------------------------------------------------- wrong inputs


def test_missing_file(tmp_path):
    assert "nothing.nii.gz" in refusal(tmp_path / "nothing.nii.gz")


@pytest.mark.parametrize("name", ["notes.txt", "a.nrrd", "a.mha", "a.png", "a.nii", "a.nii.gz", "a.dcm"])
def test_what_is_no_image(tmp_path, name):
    (tmp_path / name).write_text("dear colleague, thank you for the scans")
    assert "cannot be read as a scan" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files(tmp_path, name, share):
    array = np.random.default_rng(0).integers(-1000, 1000, (30, 20, 25)).astype(np.int16)
    if ".nii" in name:
        save(tmp_path / name, array, AFFINES["ras"])
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    assert "cannot be read as a scan" in refusal(tmp_path / name)


def test_gzip_with_a_flipped_byte(tmp_path):
    path = Path(save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((30, 20, 25)), AFFINES["ras"]))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "cannot be read as a scan" in refusal(path)


def test_folder_without_dicom(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert "no DICOM series" in refusal(tmp_path / "empty")
    assert capfd.readouterr() == ("", "")  # ITK would say it a second time, in four lines


def test_damaged_dicom_series(tmp_path):
    folder = dicom(tmp_path / "series", [0.0, 2.0, 4.0])
    file = folder / "88.dcm"  # the last slice: its loss would leave no gap
    file.write_bytes(file.read_bytes()[:-40])
    assert "damaged DICOM file" in refusal(folder, named=file)


@pytest.mark.parametrize(
    ("name", "expected"), [("x/liver_0.nii.gz", "liver_0"), ("a.b.nrrd", "a.b"), ("CT.1.3.12", "CT.1.3.12")]
)
def test_stem(name, expected):
    assert stem(name) == expected


@pytest.mark.parametrize("unit", ["meter", "micron"])
def test_voxel_sizes_in_another_unit_are_refused(tmp_path, unit):
    image = nib.Nifti1Image(numbered(), np.eye(4))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    assert f"in {unit}" in refusal(tmp_path / "a.nii.gz")


def test_a_scan_without_voxels_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((0, 5, 6), np.int16), np.eye(4)), tmp_path / "a.nii")
    assert "voxels: it is empty" in refusal(tmp_path / "a.nii")


# --------------------------------------------------------------------------------------------- damage and lost geometry


@pytest.mark.parametrize("ending", [".jpg", ".bmp", ".png", ".tif"])
def test_pictures_that_are_cut_short(tmp_path, ending):
    path = picture(tmp_path / f"a{ending}", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "cannot be read as a scan" in refusal(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("ending", "settings"), [(".png", {}), (".tif", {}), (".tif", {"compression": "tiff_lzw"})])
def test_pictures_stand_as_they_are_seen(tmp_path, orientation, ending, settings):
    seen = np.random.default_rng(0).integers(0, 255, (6, 8), dtype=np.uint8)
    undo = {  # what a camera stores for each orientation of EXIF, written independently of the reader
        1: seen,
        2: np.fliplr(seen),
        3: np.rot90(seen, 2),
        4: np.flipud(seen),
        5: seen.T,
        6: np.rot90(seen, 1),
        7: np.rot90(seen.T, 2),
        8: np.rot90(seen, -1),
    }
    exif = PIL.Image.Exif()
    exif[274] = orientation
    settings |= {"tiffinfo": {274: orientation}} if ending == ".tif" else {"exif": exif}
    PIL.Image.fromarray(np.ascontiguousarray(undo[orientation])).save(tmp_path / f"a{ending}", **settings)
    np.testing.assert_array_equal(read_scan(tmp_path / f"a{ending}").array[:, :, 0], seen.T)
    np.testing.assert_array_equal(read_label(tmp_path / f"a{ending}").array[:, :, 0], seen.T)
    assert read_geometry(tmp_path / f"a{ending}")[0] == (8, 6, 1)


@pytest.mark.parametrize("ending", [".tif", ".png"])
def test_colors_of_16_bits(tmp_path, ending):
    colors = np.random.default_rng(0).integers(0, 60000, (5, 8, 3)).astype(np.uint16)
    path = picture(tmp_path / f"a{ending}", colors)
    np.testing.assert_array_equal(read_scan(path, 3).array[:, :, 0], colors.swapaxes(0, 1))


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_headers_without_geometry_warn(tmp_path, ending):
    voxels = numbered().astype("<i2").tobytes(order="F")
    x, y, z = SHAPE
    nrrd = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {x} {y} {z}\nencoding: raw\nendian: little\n\n"
    mha = f"ObjectType = Image\nNDims = 3\nDimSize = {x} {y} {z}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    path = tmp_path / f"a{ending}"
    path.write_bytes((nrrd if ending == ".nrrd" else mha).encode() + voxels)
    with pytest.warns(UserWarning) as caught:
        np.testing.assert_array_equal(read_scan(path).array, numbered())
    assert [str(w.message).partition(": ")[0] for w in caught] == [str(path)] * 2
    assert "voxel size" in str(caught[0].message) and "orientation" in str(caught[1].message)


def test_impossible_quaternion_beside_a_sound_sform(tmp_path):
    path = Path(save(tmp_path / "a.nii", numbered(), AFFINES["lps"], 1, 1))
    content = bytearray(path.read_bytes())
    content[256:268] = np.array([0.9, 0.9, 0.0], "<f4").tobytes()  # b, c, d of a quaternion of length 1
    path.write_bytes(content)
    np.testing.assert_allclose(read_scan(path).affine, AFFINES["lps"])
    content[254:256] = b"\0\0"  # no sform
    path.write_bytes(content)
    assert "cannot be read as a scan" in refusal(path)


def test_notes_of_nibabel_name_no_file_and_are_left_out(tmp_path, caplog):
    path = Path(save(tmp_path / "a.nii", numbered(), AFFINES["ras"], 0, 1))
    content = bytearray(path.read_bytes())
    content[80:92] = bytes(12)  # pixdim
    path.write_bytes(content)
    assert "states no voxel size" in refusal(path)
    assert not caplog.records


# --------------------------------------------------------------------------------------------------------------- labels


def test_a_palette_is_ids_for_a_label_and_colors_for_an_image(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (6, 8), dtype=np.uint8)
    image = PIL.Image.fromarray(ids, "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 64, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label(tmp_path / "a.png").array[:, :, 0], ids.T)
    colors = np.array([[0, 0, 0], [128, 0, 0], [0, 64, 0]])[ids].swapaxes(0, 1)
    np.testing.assert_array_equal(read_scan(tmp_path / "a.png", 3).array[:, :, 0], colors)


@pytest.mark.parametrize("ending", [".png", ".nii.gz", ".seg.nrrd"])
def test_labels_with_channels_get_advice_for_labels(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".png":
        picture(path, np.random.default_rng(0).integers(0, 255, (5, 8, 3), dtype=np.uint8))
    elif ending == ".nii.gz":
        save(path, (numbered((*SHAPE, 2)) > 0).astype(np.uint8), AFFINES["ras"])
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.eye(3, dtype=np.uint8)[None, None], isVector=True), str(path))
    with pytest.raises(InputError) as caught:
        read_label(path)
    assert str(path) in str(caught.value) and "one id per voxel" in str(caught.value)
    assert "in_channels" not in str(caught.value)


def test_ids_of_scaled_headers_are_rounded_with_a_line(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, SHAPE)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(ids.astype(np.float64), AFFINES["ras"], header), tmp_path / "a.nii.gz")
    assert (nib.load(tmp_path / "a.nii.gz").get_fdata() != ids).any()
    with pytest.warns(UserWarning, match=r"a.nii.gz: ids are up to .* off"):
        label = read_label(tmp_path / "a.nii.gz")
    assert label.array.dtype.kind == "i"
    np.testing.assert_array_equal(label.array, ids)
    with pytest.raises(InputError, match="fractions"):
        read_label(save(tmp_path / "b.nii", ids + 0.01, AFFINES["ras"]))


def test_a_segmentation_that_slicer_cropped_is_put_in_its_place():
    whole = np.zeros(SHAPE, np.uint8)
    whole[3:6, 2:9, 1:4] = 2
    corner = np.eye(4)
    corner[:3, 3] = 3, 2, 1
    cropped, affine = whole[3:6, 2:9, 1:4], AFFINES["oblique"] @ corner
    grid = SHAPE, AFFINES["oblique"]
    label = uncropped(Scan(cropped, affine), grid, "a.seg.nrrd")
    np.testing.assert_array_equal(label.array, whole)
    np.testing.assert_allclose(label.affine, grid[1])
    for name, place in (("a.nrrd", affine), ("a.seg.nrrd", AFFINES["ras"])):
        assert uncropped(Scan(cropped, place), grid, name).array.shape == cropped.shape


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh", "a.hdr", "a.img"])
def test_freesurfer_and_pairs_of_files(tmp_path, name):
    values = np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype(np.int16)
    affine = np.array([[0, 0, -2, 9], [1.5, 0, 0, -7], [0, 1, 0, 4], [0, 0, 0, 1.0]])
    kind = nib.MGHImage if "mg" in name else nib.Nifti1Pair
    nib.save(kind(values, affine), tmp_path / name)
    scan = read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.array, values)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    shape, stated = read_geometry(tmp_path / name)
    assert shape == (5, 6, 7)
    np.testing.assert_allclose(stated, affine, atol=1e-5)
    data = tmp_path / name.replace("hdr", "img")
    data.write_bytes(data.read_bytes()[:-40])  # cut short
    refusal(tmp_path / name, named=data)
    data.unlink()
    refusal(tmp_path / name)


def test_analyze_is_refused(tmp_path):
    nib.save(nib.AnalyzeImage(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.img")
    with pytest.raises(InputError, match=r"a\.hdr is an Analyze image"):
        read_scan(tmp_path / "a.hdr")
