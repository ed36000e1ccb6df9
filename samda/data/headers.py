# SPDX-License-Identifier: Apache-2.0
"""What a file asks for, before anything is allocated: its header against its length and the free memory.

Headers of a few hundred bytes may claim any size, and readers allocate first. ITK also ends the process on some headers
of MetaImages and on names that are not UTF-8, so these are looked at here.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from samda.data.formats import PICTURE_SUFFIXES, any_size, not_a_scan
from samda.errors import InputError
from samda.io import free_memory

INFLATION = 1100  # packed by gzip or as PNG, data are at most about 1030 times as long when unpacked
WORKING_BYTES = 8  # per value, of a scan at work: the image in float32, and a copy of it in another order
SEGMENT = re.compile(r"segment(\d+)_labelvalue")  # a field of 3D Slicer
LARGEST_HEADER = 1 << 16  # bytes of a text header
LONGEST_LINE, LONGEST_NAME = 500, 250  # of a NRRD, of the field Name of a MetaImage; ITK ends the process above
LARGEST_LIST, MOST_FILES = 1 << 22, 1 << 16  # bytes of a text header with a list of data files; files of a pattern
LONGEST_PATH = 4096
PATTERN = re.compile(r"([^%]*%0?\d{0,2}d[^%]*?)((?:\s+-?\d{1,9})*)")  # of names, with numbers
LIST_LINE = re.compile(rb"(?i)\s*(elementdatafile|data ?file)\s*[:=]\s*LIST")
OTHER_UNIT = re.compile(r"(?:[kdcun]|[^ -~]+|centi|micro|nano)?(?:m|met(?:er|re)s?)|microns?|in|inch(?:es)?")
SCALES = {"elementtointensityfunctionslope": 1, "elementtointensityfunctionoffset": 0}
SPATIAL = ("", "???", "none", "domain", "space", "time")  # kinds of axes that ITK takes for those of a volume
MIRRORED_SPACES = ("right anterior superior time", "rast", "left anterior superior time", "last")
TRUE = ("T", "t", "1")
LARGEST_DIMENSION = 10  # of a MetaImage; ITK aborts above
FIELDS = ("ndims", "dimsize", "elementnumberofchannels", "sizes")
METAIMAGE = (".mha", ".mhd")
NRRD = (".nrrd", ".nhdr")
VALUE_BYTES = {"char": 1, "int8": 1, "short": 2, "int16": 2, "double": 8, "64": 8, "longlong": 8, "long long": 8}


def check_file(path: Path) -> None:
    """Refuse what must not reach a reader: pipes and devices, headers that ask for too much.

    Raises:
        InputError: with the file and the finding. Whatever else is wrong, the reader of the format says.
    """
    if not path.is_file():
        if path.is_dir():
            return
        raise InputError(f"{path} is no regular file; give a scan")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} has a name that is not UTF-8; rename it") from None
    name = path.name.lower()
    if name.endswith((*METAIMAGE, *NRRD)):
        shape, fields, files = (_nrrd if name.endswith(NRRD) else _metaimage)(path)
        _check_text_header(path, shape, fields, files)
        _check_meaning(path, fields, len(shape))
    elif name.endswith(PICTURE_SUFFIXES):
        _check_picture(path)


def check_request(path: Path, shape: Sequence[int], value_bytes: float, inflation: float = INFLATION) -> None:
    """Refuse a shape that the file cannot hold, or that does not fit into the free memory.

    Args:
        shape: all axes, channels included.
        value_bytes: of a value in the file.
        inflation: how many times longer the data may be than the file; 1 if not packed, infinity without limit.
    """
    size = " x ".join(map(str, shape))
    if any(n < 0 for n in shape):
        raise not_a_scan(path, ValueError(f"its header states {size} voxels"))
    values, length = math.prod(map(int, shape)), path.stat().st_size if inflation < math.inf else math.inf
    if values * value_bytes > length * inflation:
        raise not_a_scan(path, ValueError(f"{length:,} bytes are too few for {size} voxels"))
    needed, free = values * (value_bytes + WORKING_BYTES), free_memory()
    if needed > free:
        raise InputError(
            f"{path} ({size}) needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; crop or "
            "resample it, or use a machine with more"
        )


def _check_text_header(path: Path, shape: Sequence[int], fields: dict[str, str], files: Sequence[Path]) -> None:
    kind = fields.get("type", fields.get("elementtype", "")).lower().replace("longlong", "64")
    value_bytes = next((size for word, size in VALUE_BYTES.items() if word in kind), 4)
    plain = fields.get("encoding", "raw").lower() == "raw" and fields.get("binarydata", "T")[:1] in TRUE
    plain = plain and fields.get("compresseddata", "F")[:1] not in TRUE
    size, needed = " x ".join(map(str, shape)), math.prod(shape) * value_bytes / len(files)
    for data in files:
        if not os.path.isfile(data):  # of names that are too long, too
            what = "no regular file" if os.path.exists(data) else "missing"
            raise InputError(f"{path}: its data file {data} is {what}; give a complete scan")
        length = data.stat().st_size
        if needed > length * (1 if plain else INFLATION):
            part = "" if len(files) == 1 else f" (in {len(files)} files)"
            reason = f"{data.name} is cut short: {length:,} bytes, not {needed:,.0f}, for {size} voxels{part}"
            raise not_a_scan(path, ValueError(reason))
    check_request(path, shape, value_bytes, math.inf)


def _check_meaning(path: Path, fields: dict[str, str], dimension: int) -> None:
    """Refuse what ITK passes over: units, scales of values, axes without size, and spaces with time."""
    nrrd = path.name.lower().endswith(NRRD)
    stated = " ".join(fields.get(name, "") for name in (("space units", "units") if nrrd else ("distanceunits",)))
    other = [word for word in re.split(r'[\s"]+', stated[:LONGEST_LINE]) if OTHER_UNIT.fullmatch(word.lower())]
    if other:
        raise InputError(f"{path} has voxel sizes in {other[0]!a:.40}; convert the header to mm")
    for name, neutral in () if nrrd else SCALES.items():
        if name in fields and _number(fields[name]) != neutral:
            raise InputError(f"{path} states {name} {fields[name]!a:.40}; apply it to the voxels and remove it")
    space = fields.get("space", "").lower().replace("-", " ")
    if nrrd and space in MIRRORED_SPACES:
        raise InputError(f"{path} states the space {space}, of which ITK ignores the directions; state it without time")
    kinds = (fields.get("kinds", "").lower().split() + [""] * dimension)[: dimension if nrrd else 0]
    for name in ("space directions", "spacings"):
        sizes = re.findall(r"\([^)]*\)|[^\s(]+", fields.get(name, "").lower())
        axes = [n for n, kind in enumerate(kinds[: len(sizes)]) if kind in SPATIAL]
        unknown = [n for n in axes[:3] if sizes[n] == "none" or "nan" in sizes[n]]
        if unknown:
            raise InputError(f"{path} states no size of axis {unknown[0] + 1} in its {name}; repair its header")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _data_files(path: Path, data: str, sizes: Sequence[int]) -> list[Path]:
    """The files that a text header names: one, a LIST with a line for each, or a pattern with numbers.

    ITK does not count those of a MetaImage: voxels without a name would be whatever is in the memory.
    """
    nrrd = path.name.lower().endswith(NRRD)
    pattern = PATTERN.fullmatch(data) if len(data) < LONGEST_PATH else None
    if data.startswith("LIST"):
        names, rest = _listed(path, b"\r\n" if nrrd else b"\r\n\t "), data[4:]
    elif pattern or ("%" in data and not nrrd):
        names, rest = _numbered(pattern, nrrd, sizes) if pattern else ([], "")
    else:
        files = [path.parent / f"{os.fsdecode(data.encode('latin-1'))}{packed}" for packed in ("", ".gz", ".Z")]
        return [next((file for file in files if os.path.exists(file)), files[0])]  # ITK looks for these, too
    axes = int(rest[:9]) if rest[:9].strip().isdecimal() else 0  # of one file
    axes = axes if 0 < axes <= len(sizes) else len(sizes) - 1
    count = math.prod(sizes[axes:])
    if not names or (len(names) != count and not (nrrd and axes == len(sizes))):
        reason = (
            f"its header names {len(names)} data files by {data!r:.80} where {count} are needed, each in a whole line"
        )
        raise not_a_scan(path, ValueError(reason))
    return [path.parent / name for name in names]


def _listed(path: Path, blank: bytes) -> list[str]:
    """The lines behind that of the LIST; like ITK without a last one that does not end."""
    with path.open("rb") as file:
        lines = file.read(LARGEST_LIST).splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines, 1) if LIST_LINE.match(line)), len(lines))
    names = [os.fsdecode(line.rstrip(blank)) for line in lines[start:] if line.endswith(b"\n")]
    while names and not names[-1] and b" " in blank:  # of a MetaImage, lines behind the names do not count
        names.pop()
    return names


def _numbered(pattern: re.Match[str], nrrd: bool, sizes: Sequence[int]) -> tuple[list[str], str]:
    """The names of a pattern and its numbers (first, last, step), and what follows these; none where ITK guesses."""
    words = pattern[2].split()
    if len(words) < 2 and not nrrd:
        first = int(words[0]) if words else 1
        words = [str(first), str(first + sizes[-1] - 1), "1"]
    if len(words) != 3 and not (nrrd and len(words) == 4):
        return [], ""
    first, last, step = map(int, words[:3])
    numbers = range(first, last + (step > 0) - (step < 0), step) if step > 0 or (nrrd and step) else range(0)
    names = [os.fsdecode((pattern[1] % number).encode("latin-1")) for number in numbers[:MOST_FILES]]
    return names, "".join(words[3:])


def text_fields(path: Path) -> dict[str, str]:
    """The fields of a text header, names in lower case."""
    with path.open("rb") as file:
        head = file.read(LARGEST_HEADER)
    nrrd = path.name.lower().endswith(NRRD)
    if nrrd:  # an empty line is the end
        head = head.replace(b"\r\n", b"\n").split(b"\n\n")[0]
    fields: dict[str, str] = {}
    for line in head.splitlines():
        text = line.decode("latin-1")
        name, mark, value = text.replace(":", "=", 1).partition("=")
        key = name.strip().lower()
        if mark and fields.setdefault(key, value.strip()) != value.strip() and key in FIELDS:
            raise not_a_scan(path, ValueError(f"its header states {key!r} twice"))
        free = text.startswith("#") or ":=" in text or key in ("content", "labels")  # of any length
        if len(line) > LONGEST_LINE if nrrd and not free else key == "name" and len(value) > LONGEST_NAME:
            raise not_a_scan(path, ValueError(f"the line {text[:40]!r}... of its header is too long"))
        if key == "elementdatafile":  # the last line of a MetaImage
            break
    return fields


def segment_names(path: str | Path) -> dict[int, str]:
    """Id -> name of the segments of 3D Slicer (.seg.nrrd), which numbers them anew in each file; else empty."""
    if not str(path).lower().endswith(".seg.nrrd"):
        return {}
    fields = {key: value.removeprefix("=").strip() for key, value in text_fields(Path(path)).items()}
    names = {}
    for key, value in fields.items():
        number = SEGMENT.fullmatch(key)
        name = fields.get(f"segment{number[1]}_name") if number else ""
        if name and value.isdecimal():
            names[int(value)] = name.encode("latin-1").decode(errors="replace")
    return names


def _numbers(text: str, path: Path, what: str) -> list[int]:
    try:
        return [int(float(word)) for word in text.split()]
    except (ValueError, OverflowError):
        raise not_a_scan(path, ValueError(f"{what} of its header is {text!r:.80}")) from None


def _metaimage(path: Path) -> tuple[list[int], dict[str, str], list[Path]]:
    """Shape, fields, and data files of a MetaImage."""
    fields = text_fields(path)
    dimension = _numbers(fields.get("ndims", ""), path, "NDims")
    shape = _numbers(fields.get("dimsize", ""), path, "DimSize")
    channels = _numbers(fields.get("elementnumberofchannels", "1"), path, "ElementNumberOfChannels")
    if len(dimension) != 1 or not 1 <= dimension[0] <= LARGEST_DIMENSION or len(shape) != dimension[0]:
        raise not_a_scan(path, ValueError(f"its header has NDims {dimension} and {len(shape)} sizes"))
    if len(channels) != 1 or min(*shape, *channels) < 1:
        raise not_a_scan(path, ValueError(f"its header states sizes of {shape} and {channels} channels"))
    data = fields.get("elementdatafile", "LOCAL")
    return [*shape, *channels], fields, [path] if data.upper() == "LOCAL" else _data_files(path, data, shape)


def _nrrd(path: Path) -> tuple[list[int], dict[str, str], list[Path]]:
    """Shape, fields, and data files of a NRRD."""
    fields = text_fields(path)
    shape = _numbers(fields.get("sizes", ""), path, "sizes")
    if not shape or min(shape) < 1:
        raise not_a_scan(path, ValueError(f"its header states sizes of {shape}"))
    data = fields.get("data file", fields.get("datafile", ""))
    return shape, fields, _data_files(path, data, shape) if data else [path]


def _check_picture(path: Path) -> None:
    try:
        with any_size(), warnings.catch_warnings(action="ignore"), PIL.Image.open(path) as picture:
            shape = (*picture.size, len(picture.getbands()))
            value_bytes = {"1": 1 / 8, "I": 4, "F": 4}.get(picture.mode, 2 if "16" in picture.mode else 1)
    except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, EOFError):
        return  # its reader says more
    # JPEG, and some compressions of TIFF, pack plain areas more densely
    check_request(path, shape, value_bytes, INFLATION * (1 if path.name.lower().endswith((".png", ".bmp")) else 10))
