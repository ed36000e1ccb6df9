# SPDX-License-Identifier: Apache-2.0
"""Files that ask for more than there is, and special files: refused in one line before memory is taken."""

from __future__ import annotations

import gzip
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samda.data.readers import read_geometry, read_scan
from samda.errors import InputError


def nifti(path: Path, shape: tuple[int, ...] = (2000, 2000, 2000), content: bytes = b"", **fields: object) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["magic"], header["vox_offset"] = b"n+1", 352
    header.set_sform(np.diag([2, 2, 2, 1]), code=1)
    for key, value in fields.items():
        header[key] = value
    data = header.binaryblock + bytes(4) + content
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def text(lines: str, content: bytes = bytes(100)) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(lines.encode() + content) and None


def meta(**fields: object) -> Callable[[Path], None]:
    values = {"ObjectType": "Image", "NDims": 3, "DimSize": "4 5 5", "ElementType": "MET_UCHAR"} | fields
    values["ElementDataFile"] = values.pop("ElementDataFile", "LOCAL")
    return text("".join(f"{key} = {value}\n" for key, value in values.items()))


def nrrd(**fields: object) -> Callable[[Path], None]:
    values = {"type": "short", "dimension": 3, "sizes": "4 5 5", "encoding": "raw"} | fields
    return text("NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in values.items()) + "\n")


def png(width: int, height: int) -> Callable[[Path], None]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return text("", b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def bmp(width: int, height: int) -> Callable[[Path], None]:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return text("", b"BM" + struct.pack("<IHHI", 200, 0, 0, 54) + head + bytes(100))


ASKING = {
    "a.nii": nifti,
    "b.nii.gz": nifti,
    "c.nii": lambda path: nifti(path, (-3, 4, 5)),
    "d.mha": meta(DimSize="2000 2000 2000"),
    "e.mha": meta(DimSize="200 200 200", ElementNumberOfChannels=1000),
    "f.mha": meta(NDims=-1),
    "g.mha": meta(NDims=300, DimSize=" ".join(["1"] * 300)),
    "h.mha": meta(DimSize="4 5"),
    "i.mha": meta(DimSize="4 x 5"),
    "j.mha": meta(DimSize="4 -5 5"),
    "k.mha": meta(NDims="1e400"),
    "k2.mha": text("NDims = 3\nNDims: 300\nDimSize = 4 5 5\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"),
    "k3.mha": meta(Name="x" * 400),
    "p2.nrrd": nrrd(**{"space origin": "[" * 3000}),
    "p3.nrrd": nrrd(unknown="x" * 3000),
    "l.mhd": meta(ElementDataFile="/dev/zero"),
    "l2.mhd": meta(ElementDataFile="x" * 5000),
    "l3.mhd": meta(ElementDataFile="%d" + " 1" * 20_000 + "x"),
    "l4.mhd": meta(ElementDataFile="LIST " + "9" * 9000),
    "l5.mhd": meta(ElementDataFile="s%d 0 999999999 1", DimSize="1000 1000 1000"),
    "m.nrrd": nrrd(sizes="2000 2000 2000"),
    "n.nrrd": nrrd(sizes="99999999999 99999999999 99999999999"),
    "o.nrrd": nrrd(sizes="-1 5 5"),
    "p.nrrd": nrrd(sizes=""),
    "q.nhdr": nrrd(**{"data file": "/dev/zero"}),
    "r.png": png(40_000, 40_000),
    "s.bmp": bmp(40_000, 40_000),
    "t.bmp": bmp(2**31 - 1, 2**31 - 1),
    "u.nii": lambda path: nifti(path, (4, 5, 5), bytes(200), vox_offset=np.inf),
    "v.nii": lambda path: nifti(path, (4, 5, 5), bytes(200), vox_offset=np.nan),
    "w.nii": lambda path: nifti(path, (4, 5, 5), bytes(200), xyzt_units=7),
    "x.nii": lambda path: nifti(path, (4, 5, 5), bytes(200), datatype=9999),
    "y.nii": lambda path: nifti(path, (4, 5, 5), bytes(200), srow_x=[1e-30, 0, 0, 0], srow_y=[0, 1e-30, 0, 0]),
    "z.nii.gz": lambda path: nifti(path, (4, 5, 5), bytes(66 << 20)),
}


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("read", [read_scan, read_geometry])
def test_a_header_that_asks_for_too_much_is_refused_before_memory_is_taken(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    ASKING[name](tmp_path / name)
    if read is read_geometry and name in ("y.nii", "z.nii.gz"):  # only the header is looked at, and it is readable
        return
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.monotonic() - start < 2


def test_a_scan_larger_than_the_free_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.nii.gz", "b.nrrd", "c.png"):
        image = np.zeros((100, 100, 1 if name.endswith("png") else 40), np.uint8)
        if name.endswith("gz"):
            nib.save(nib.Nifti1Image(image, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / name)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(np.squeeze(image)), str(tmp_path / name))
        assert read_scan(tmp_path / name).array.size == image.size
        with monkeypatch.context() as patch:
            patch.setattr("samda.data.headers.free_memory", lambda: 80_000.0)
            with pytest.raises(InputError, match=r"GB of memory, 0\.0 GB are free"):
                read_scan(tmp_path / name)


def test_the_memory_of_a_process_is_what_its_limit_leaves() -> None:
    from samda.io import free_memory

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, before[1]))
        assert 200e6 < free_memory() <= 300e6
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


SLICES = np.arange(4 * 5 * 6, dtype="<i2").reshape(6, 5, 4)  # z, y, x


def sliced(folder: Path, name: str, data: str, names: str = "") -> Path:
    """A header with the six files s0.raw to s5.raw."""
    for k, plane in enumerate(SLICES):
        (folder / f"s{k}.raw").write_bytes(plane.tobytes())
    (folder / "half.raw").write_bytes(SLICES[0].tobytes()[:20])
    os.mkfifo(folder / "pipe")
    head = "ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\nElementType = MET_SHORT\nElementDataFile = "
    if name.endswith("nhdr"):
        head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 6\nencoding: raw\nendian: little\ndata file: "
    (folder / name).write_text(f"{head}{data}\n{names}")
    return folder / name


NAMES = [f"s{k}.raw" for k in range(6)]
LISTS = {
    "five": ("LIST", NAMES[:5], "5 data files"),
    "seven": ("LIST", [*NAMES, "s0.raw"], "7 data files"),
    "missing": ("LIST", [*NAMES[:5], "no.raw"], "no.raw is missing"),
    "short": ("LIST", [*NAMES[:5], "half.raw"], "half.raw is cut short: 20 bytes, not 40"),
    "device": ("LIST", [*NAMES[:5], "/dev/zero"], "/dev/zero is no regular file"),
    "pipe": ("LIST", [*NAMES[:5], "pipe"], "pipe is no regular file"),
    "pattern of five": ("s%d.raw 0 4 1", [], "5 data files"),
    "pattern without end": ("s%d.raw 0 5 0", [], "0 data files"),
    "pattern without step": ("s%d.raw 0 5", [], "0 data files"),
    "pattern beyond": ("s%d.raw 1 6 1", [], "s6.raw is missing"),
}


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("read", [read_scan, read_geometry])
def test_lists_of_data_files_are_looked_up(
    tmp_path: Path, ending: str, case: str, read: Callable[[Path], object]
) -> None:
    data, names, finding = LISTS[case]
    path = sliced(tmp_path, f"a.{ending}", data, "".join(f"{name}\n" for name in names))
    with pytest.raises(InputError) as error:
        read(path)
    assert str(path) in str(error.value) and finding in str(error.value) and "\n" not in str(error.value)


def test_a_last_name_without_an_end_of_its_line_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 data files"):  # ITK passes over it
        read_scan(sliced(tmp_path, "a.mhd", "LIST", "\n".join(NAMES)))


@pytest.mark.parametrize(
    ("name", "data", "end"),
    [
        *[
            (f"a.{ending}", data, end)
            for ending in ("mhd", "nhdr")
            for data in ("LIST", "LIST 2")
            for end in ["\n", "\r\n"]
        ],
        *[(f"a.{ending}", "s%d.raw 0 5 1", "") for ending in ("mhd", "nhdr")],
        *[("a.mhd", "s%d.raw 0", ""), ("a.nhdr", "s%d.raw 0 5 1 2", "")],
    ],
)
def test_complete_lists_of_data_files_are_read(tmp_path: Path, name: str, data: str, end: str) -> None:
    names = [*NAMES[:5], str(tmp_path / "s5.raw")]
    path = sliced(tmp_path, name, data, end.join([*names, ""]) if end else "")
    np.testing.assert_array_equal(read_scan(path).array, SLICES.T)


def test_a_data_file_that_is_cut_short_is_said_to_be(tmp_path: Path) -> None:
    for name in ("a.mha", "b.mhd", "c.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(SLICES), str(tmp_path / name))
        data = tmp_path / name.replace("mhd", "raw")
        content = data.read_bytes()
        for cut in (100, 1):  # more and less than the header is long
            data.write_bytes(content[:-cut])
            with pytest.raises(InputError) as error:
                read_scan(tmp_path / name)
            assert name[0] in str(error.value) and "No such file" not in str(error.value)
            if name != "c.nrrd":
                assert "cut short" in str(error.value)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.png", "a.dcm", "folder"])
def test_pipes_and_devices_are_no_scans(tmp_path: Path, name: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / name)
        with pytest.raises(InputError, match="no regular file"):
            read_scan(tmp_path / name)
        (tmp_path / name).unlink()


def test_a_link_to_a_scan_is_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    nifti(tmp_path / "store" / "object.nii", (4, 5, 5), bytes(200))
    (tmp_path / "a.nii").symlink_to(tmp_path / "store" / "object.nii")
    assert read_scan(tmp_path / "a.nii").array.shape == (4, 5, 5)


def directed(size: str = "(0,0,3)", space: str = "left-posterior-superior", **fields: object) -> Callable[[Path], None]:
    stated = {"type": "uchar", "space": space, "space directions": f"(2,0,0) (0,2,0) {size}"} | fields
    return nrrd(**{key.replace("_", " "): value for key, value in stated.items()})


SCALE, OFFSET = "ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset"
MISREAD = {
    "a.nrrd": (directed(space_units='"cm" "cm" "cm"'), "voxel sizes in 'cm'"),
    "b.nrrd": (directed(space_units='"mm" "mm" "m"'), "voxel sizes in 'm'"),
    "c.nrrd": (directed(space_units='"µm" "µm" "µm"'), "voxel sizes in"),
    "d.nrrd": (nrrd(type="uchar", spacings="2 2 3", units='"mm" "mm" "micron"'), "voxel sizes in 'micron'"),
    "e.nrrd": (directed("none"), "axis 3"),
    "f.nrrd": (nrrd(type="uchar", spacings="nan 2 3"), "axis 1"),
    "g.nrrd": (directed("(0,0,3,0) (0,0,0,1)", "right-anterior-superior-time", dimension=4, sizes="4 5 5 1"), "time"),
    "h.mha": (meta(DistanceUnits="um", ElementSpacing="2000 2000 3000"), "voxel sizes in 'um'"),
    "i.mha": (meta(**{SCALE: "2"}), "'2'"),
    "j.mha": (meta(**{OFFSET: "-1024"}), "'-1024'"),
}


@pytest.mark.parametrize("name", MISREAD)
@pytest.mark.parametrize("read", [read_scan, read_geometry])
def test_fields_that_itk_passes_over_are_refused(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    write, finding = MISREAD[name]
    write(tmp_path / name)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and finding in str(error.value) and "\n" not in str(error.value)


PLAIN = {
    "a.nrrd": directed(space_units='"mm" "mm" "mm"'),
    "b.nrrd": nrrd(type="uchar", spacings="2 2 3", units='"mm" "" "millimeter"', kinds="domain domain domain"),
    "c.nrrd": nrrd(type="uchar", sizes="2 5 5 2", dimension=4, spacings="nan 2 2 3", kinds="vector space space space"),
    "d.nrrd": nrrd(type="uchar", sizes="5 5 2 2", dimension=4, spacings="2 2 3 nan", units='"mm" "mm" "mm" "s"'),
    "e.mha": meta(DistanceUnits="mm", **{SCALE: "1.0", OFFSET: "0"}),
    "f.mha": meta(DistanceUnits="?", Units="cm"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_fields_without_effect_are_accepted(tmp_path: Path, name: str) -> None:
    PLAIN[name](tmp_path / name)
    assert read_scan(tmp_path / name, None).array.size == 100
    read_geometry(tmp_path / name)


def test_a_space_with_time_is_an_orientation(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    directions = "(2,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,0,1)"
    fields = {"space": "left-posterior-superior-time", "space directions": directions, "sizes": "4 5 5 1"}
    nrrd(type="uchar", dimension=4, **fields)(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.nrrd").affine, np.diag([-2, -2, 3, 1]))
    assert not recwarn.list
