# SPDX-License-Identifier: Apache-2.0
"""A segmentation task: classes, label ids, geometry and intensities."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from samda.errors import UsageError, from_mapping, nearest, one_line, printable
from samda.io import load_yaml, plain

LARGEST_IMAGE = 4096  # pixels; limits the memory of a slice
LATER = ("axes", "codes", "context", "keep_largest", "mirror", "picture_size")  # keys that samda 0.1 did not have
NAMED, LAST_NAMED = 1 << 16, 1 << 20  # ids that stand for names, see `name_id`
CODE_LENGTHS = (16, 16, 64)  # characters of value, scheme and meaning of a code in DICOM
SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}  # words of a class's name -> those of its mirror image
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # slice axis -> axis of a volume in RAS order


@dataclasses.dataclass(frozen=True)
class Task:
    """Classes and preprocessing, shared by training, prediction and adaptation and saved with the model.

    The field of view of a slice is `spacing` x `image_size` mm: a scan is resampled once, to `spacing`, then padded,
    cropped around the body or tiled.
    """

    name: str = "segmentation"
    classes: tuple[str, ...] = ("background", "foreground")  # network channel k is classes[k]; background first
    labels: Mapping[str, tuple[int, ...]] | None = None  # class -> ids (of DICOM: names); None: dataset.json's, else k;
    # a class without ids is in no label, "ignore" are ids of voxels without a label
    modality: str = "CT"  # "CT" (window in HU), "MR" (percentiles) or "image" (2-D images, percentiles)
    window: tuple[float, float] = (-160.0, 240.0)  # HU, mapped to [0, 1]; CT only
    percentiles: tuple[float, float] = (1.0, 99.0)  # of the body (MR) or of all pixels (image), to [0, 1]
    spacing: float = 1.5  # mm per pixel of a slice in both directions
    picture_size: float | None = None  # mm of the shorter side of every 2-D image, whatever its pixels; None: 1 a pixel
    image_size: int = 256  # pixels of a slice in both directions; a multiple of 16
    axis: str = "axial"  # slices are perpendicular to it: "axial", "coronal" or "sagittal"
    axes: str = "one"  # "all": slices along the other two axes, too, and the mean of the three predictions
    mirror: bool = False  # do scans mirrored left to right look like others? The mean of a slice and its mirror image
    in_channels: int = 1  # of the scan, up to 3: files (or channels) of a case; 3 for RGB images
    context: int = 0  # 1: the three input channels are a slice and its two neighbors
    keep_largest: bool | tuple[str, ...] = False  # classes of which only the largest 3-D component is kept; True: all
    nsd_tolerance: float = 3.0  # mm, of the normalized surface distance
    codes: Mapping[str, tuple[str, ...]] | None = None  # class -> [code, scheme, meaning] in DICOM output; None: known

    def __post_init__(self) -> None:
        for key, convert in _CONVERSIONS.items():
            object.__setattr__(self, key, convert(key, getattr(self, key)))
        for holds, message in self._rules():
            if not holds:
                raise UsageError(f"task {self.name!r}: {message}")

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Conditions and messages for their violation; a rule may rely on previous rules."""
        names = list(self.classes)
        for name in (self.name, *names):
            plain_text = isinstance(name, str) and printable(name) == name and not {"\n", "\t"} & {*name}
            yield plain_text, f"a name must be text in one line without control characters, got {name!r}"
        yield 1 < len(names) == len(set(names)), f"classes must be background and others, all different; got {names}"
        yield names[0] == "background", f"the first class must be 'background', got {names[0]!r}; put it first"
        owners: dict[int, str] = {}
        for name, ids in (self.labels or {}).items():
            yield name in (*names, "ignore"), f"labels names the unknown class {name!r}; {nearest(name, names)}"
            for i in ids:
                yield i not in owners, f"labels gives id {i} to both {owners.get(i)!r} and {name!r}; give each its own"
                owners[i] = name
        for name, code in (self.codes or {}).items():
            near = nearest(name, names[1:])
            yield name in names[1:], f"codes names {name!r}, which is not a foreground class; {near}"
            fits = len(code) == 3 and all(map(fits_dicom, code, CODE_LENGTHS))
            yield fits, f"codes of {name!r} must be as [10200004, SCT, Liver], got {list(code)}"
        missing = [name for name in names[1:] if self.labels is not None and name not in self.labels]
        yield not missing, f"labels gives no ids for {', '.join(missing)}; add them or drop the class"
        for name in self.keep_largest if isinstance(self.keep_largest, tuple) else ():
            near = nearest(name, names[1:])
            yield name in names[1:], f"keep_largest names {name!r}, which is not a foreground class; {near}"
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            yield value in choices, f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}"
        fits = 16 <= self.image_size <= LARGEST_IMAGE and self.image_size % 16 == 0
        yield fits, f"image_size must be a multiple of 16 from 16 to {LARGEST_IMAGE}, got {self.image_size}"
        if self.picture_size is not None:
            size = self.picture_size
            yield 0 < size < math.inf, f"picture_size must be positive or null, got {size}"
            yield self.modality == "image", "picture_size is for 2-D images, scans know their spacing; leave it out"
        for key in ("spacing", "nsd_tolerance"):
            yield 0 < getattr(self, key) < math.inf, f"{key} must be positive (mm), got {getattr(self, key)}"
        for key, lowest, highest in (("window", -math.inf, math.inf), ("percentiles", 0, 100)):
            pair = getattr(self, key)
            rises = len(pair) == 2 and -math.inf < pair[0] < pair[1] < math.inf
            yield rises, f"{key} must be (low, high) with low < high, got {pair}"
            yield lowest <= pair[0] and pair[1] <= highest, f"{key} must lie between {lowest} and {highest}, got {pair}"
        if self.context:
            yield self.in_channels == 1, "context 1 needs in_channels 1, as SAM takes three channels; set context to 0"
            yield self.modality != "image", "context 1 needs a volume, a 2-D image has no neighbors; set context to 0"
        if self.mirror:
            yield self.axis != "sagittal", "mirror needs slices that show left and right; set mirror to false"
            sided = next((name for name in names if names_side(name)), None)
            yield sided is None, f"mirror does not suit the class {sided!r}, which names a side; set mirror to false"
        volume = self.axes == "one" or self.modality != "image"
        yield volume, "axes 'all' needs a volume, a picture has one axis; set axes to one"

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    @property
    def slice_axis(self) -> int:
        """Axis across the slices of a volume in RAS order."""
        return AXES[self.axis]

    @property
    def network_channels(self) -> int:
        """Input channels of the network: those of the scan, or 3 with `context`."""
        return 1 + 2 * self.context if self.context else self.in_channels

    @property
    def largest_only(self) -> tuple[int, ...]:
        """Indices of the classes of which only the largest connected component is kept."""
        if isinstance(self.keep_largest, bool):
            return tuple(range(1, self.num_classes)) if self.keep_largest else ()
        return tuple(k for k, name in enumerate(self.classes) if name in self.keep_largest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], like: Task | None = None) -> Task:
        """Build a Task from JSON or YAML values; unknown keys and values of a wrong type raise UsageError.

        What the values leave out is that of `like`; its label ids go with its classes.
        """
        if like is not None:
            own = like.to_dict()
            if "classes" in values:
                del own["labels"]
            values = own | dict(values)
        try:
            return from_mapping(cls, values, "task")
        except ValueError as error:  # a text instead of a number
            raise UsageError(f"task: {error}") from error

    @classmethod
    def from_file(cls, path: str | Path, like: Task | None = None) -> Task:
        """Read a Task from a YAML or JSON file: the mapping itself, or its entry `task`; see :meth:`from_dict`."""
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"task file {path} cannot be read ({error.strerror}); give a YAML or JSON file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not YAML or JSON ({one_line(error)}); repair it") from error
        if not isinstance(values, Mapping):
            raise UsageError(f"{path}: expected a mapping of task keys, got {type(values).__name__}")
        return cls.from_dict(values.get("task", values), like)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = plain(dataclasses.asdict(self))
        for key in LATER:  # omitted if unused, as in files of older models
            if values[key] == getattr(Task, key):
                del values[key]
        return values


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{key} must be a list of names, background first; got {value!r}")
    return tuple(str(name) for name in value)


def _labels(key: str, value: Any) -> Mapping[str, tuple[int, ...]] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} must be class names with their ids, got {value!r}")
    return {str(name): _ids(name, ids) for name, ids in value.items()}


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids of a class in the label files, given as one number or a list."""
    ids = value if isinstance(value, list | tuple) else [value]
    return tuple(name_id(i) if _is_name(i) else _whole(f"labels of {name!r}", i) for i in ids)


def _is_name(value: Any) -> bool:
    """Is it the name of a segment? Digits in quotes are a mistake."""
    return isinstance(value, str) and re.search(r"[^\W\d_]", value) is not None


def mirrored_name(name: str) -> str:
    """Name of a class in the mirror: "kidney_left" for "kidney_right", else the same."""
    return re.sub(r"[^\W_]+", lambda word: SIDES.get(word[0].lower(), word[0]), name)


def names_side(name: str) -> bool:
    """Has the name of a class a word for left or right?"""
    return mirrored_name(name) != name


def name_id(name: str) -> int:
    """The id that stands for a name in DICOM labels, the same for `Kidney Left` and `kidney_left`."""
    letters = re.sub(r"[\W_]", "", name.casefold())
    return NAMED + zlib.crc32(letters.encode()) % (LAST_NAMED - NAMED)


def _codes(key: str, value: Any) -> Mapping[str, tuple[str, ...]] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(code, list | tuple) for code in value.values()):
        raise TypeError(f"{key} must be class names with [code, scheme, meaning], got {value!r}")
    return {str(name): tuple(str(part) for part in code) for name, code in value.items()}


def fits_dicom(text: str, length: int) -> bool:
    """Can a text be the value of a DICOM element of `length` characters?"""
    return 0 < len(text.strip()) <= length and "\\" not in text and text.isprintable()


def _pair(key: str, value: Any) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{key} must be (low, high), got {value!r}") from None


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{key} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise TypeError(f"{key} must be a number that fits a float, got {value!r:.20}...") from None


def _whole(key: str, value: Any) -> int:
    if not _number(key, value).is_integer():  # nor infinite
        raise TypeError(f"{key} must be a whole number, got {value!r}")
    return int(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{key} must be true or false, got {value!r}")
    return value


def _kept(key: str, value: Any) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | list | tuple | None):
        raise TypeError(f"{key} must be true, false or names of classes, got {value!r}")
    names = [value] if isinstance(value, str) else value or ()
    return tuple(str(name) for name in names) or False


_CONVERSIONS: dict[str, Callable[[str, Any], Any]] = {
    "classes": _names,
    "labels": _labels,
    "codes": _codes,
    "window": _pair,
    "percentiles": _pair,
    "spacing": _number,
    "nsd_tolerance": _number,
    "picture_size": lambda key, value: None if value is None else _number(key, value),
    "image_size": _whole,
    "in_channels": _whole,
    "context": _whole,
    "keep_largest": _kept,
    "mirror": _flag,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "axis": tuple(sorted(AXES)),
    "axes": ("one", "all"),
    "modality": ("CT", "MR", "image"),
    "in_channels": (1, 2, 3),
    "context": (0, 1),
}
