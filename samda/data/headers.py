# SPDX-License-Identifier: Apache-2.0
"""What a file asks for, before anything is allocated: its header against its length and the free memory.

Headers of a few hundred bytes may claim any size, and readers allocate first. ITK also ends the process on some headers
of MetaImages and on names that are not UTF-8, so these are looked at here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from samda.data.formats import PICTURE_SUFFIXES, any_size, not_a_scan
from samda.errors import InputError
from samda.io import free_memory

INFLATION = 1100  # packed by gzip or as PNG, data are at most about 1030 times as long when unpacked
WORKING_BYTES = 8  # per value, of a scan at work: the image in float32, and a copy of it in another order
LARGEST_HEADER = 1 << 16  # bytes of a text header
LONGEST_LINE, LONGEST_NAME = 500, 250  # of a NRRD, of the field Name of a MetaImage; ITK ends the process above
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
    if name.endswith(METAIMAGE):
        _check_text_header(path, *_metaimage(path))
    elif name.endswith(NRRD):
        _check_text_header(path, *_nrrd(path))
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


def _check_text_header(path: Path, shape: Sequence[int], kind: str, data: Path) -> None:
    if data.exists() and not data.is_file():
        raise InputError(f"{path}: its data file {data} is no regular file; give a complete scan")
    value_bytes = next(
        (size for word, size in VALUE_BYTES.items() if word in kind.lower().replace("longlong", "64")), 4
    )
    # lists and patterns of data files are not looked up: only the memory is checked
    check_request(data if data.is_file() else path, shape, value_bytes, INFLATION if data.is_file() else math.inf)


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


def _numbers(text: str, path: Path, what: str) -> list[int]:
    try:
        return [int(float(word)) for word in text.split()]
    except (ValueError, OverflowError):
        raise not_a_scan(path, ValueError(f"{what} of its header is {text!r:.80}")) from None


def _metaimage(path: Path) -> tuple[list[int], str, Path]:
    """Shape, type of a value, and data file of a MetaImage."""
    fields = text_fields(path)
    dimension = _numbers(fields.get("ndims", ""), path, "NDims")
    shape = _numbers(fields.get("dimsize", ""), path, "DimSize")
    channels = _numbers(fields.get("elementnumberofchannels", "1"), path, "ElementNumberOfChannels")
    if len(dimension) != 1 or not 1 <= dimension[0] <= LARGEST_DIMENSION or len(shape) != dimension[0]:
        raise not_a_scan(path, ValueError(f"its header has NDims {dimension} and {len(shape)} sizes"))
    if len(channels) != 1 or min(*shape, *channels) < 1:
        raise not_a_scan(path, ValueError(f"its header states sizes of {shape} and {channels} channels"))
    data = fields.get("elementdatafile", "LOCAL")
    own = data.upper() == "LOCAL"
    return [*shape, *channels], fields.get("elementtype", ""), path if own else path.parent / data


def _nrrd(path: Path) -> tuple[list[int], str, Path]:
    """Shape, type of a value, and data file of a NRRD."""
    fields = text_fields(path)
    shape = _numbers(fields.get("sizes", ""), path, "sizes")
    if not shape or min(shape) < 1:
        raise not_a_scan(path, ValueError(f"its header states sizes of {shape}"))
    data = fields.get("data file", fields.get("datafile", ""))
    return shape, fields.get("type", ""), path.parent / data if data else path


def _check_picture(path: Path) -> None:
    try:
        with any_size(), warnings.catch_warnings(action="ignore"), PIL.Image.open(path) as picture:
            shape = (*picture.size, len(picture.getbands()))
            value_bytes = {"1": 1 / 8, "I": 4, "F": 4}.get(picture.mode, 2 if "16" in picture.mode else 1)
    except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, EOFError):
        return  # its reader says more
    # JPEG, and some compressions of TIFF, pack plain areas more densely
    check_request(path, shape, value_bytes, INFLATION * (1 if path.name.lower().endswith((".png", ".bmp")) else 10))
