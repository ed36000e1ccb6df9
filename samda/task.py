# SPDX-License-Identifier: Apache-2.0
"""A segmentation task: classes, the labels they come from, and the geometry and intensities the network sees."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from samda.errors import UsageError, from_mapping, nearest
from samda.io import load_yaml

LARGEST_IMAGE = 4096  # pixels; beyond it a single slice would fill a machine
AXES = ("axial", "coronal", "sagittal")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is segmented, and how a scan becomes slices. Train, predict and adapt share one Task, saved with the model.

    The field of view of a slice is `spacing` x `image_size` mm: a scan is resampled once, to `spacing`, then padded,
    cropped around the body or tiled, and never resized again.
    """

    name: str = "segmentation"
    classes: tuple[str, ...] = ("background", "foreground")  # network channel k is classes[k]; background first
    labels: Mapping[str, tuple[int, ...]] | None = None  # class -> ids in the label files; None: dataset.json's, else k
    modality: str = "CT"  # "CT" (window in HU), "MR" (percentiles) or "image" (2D pictures, percentiles)
    window: tuple[float, float] = (-160.0, 240.0)  # HU, mapped to [0, 1]; CT only
    percentiles: tuple[float, float] = (1.0, 99.0)  # of the body (MR) or of all pixels (image), to [0, 1]
    spacing: float = 1.5  # mm per pixel of a slice, both directions
    image_size: int = 256  # pixels of a slice, both directions; a multiple of 16
    axis: str = "axial"  # slices are perpendicular to it: "axial", "coronal" or "sagittal"
    in_channels: int = 1  # of the scan, up to 3: files (or channels) of a case; 3 for RGB pictures
    context: int = 0  # 1: the slices above and below join a slice, as the network's three input channels
    keep_largest: bool | tuple[str, ...] = False  # classes of which only the largest 3-D piece stays; True: all of them
    nsd_tolerance: float = 3.0  # mm, of the normalized surface distance

    def __post_init__(self) -> None:
        if not isinstance(self.classes, list | tuple):
            raise TypeError(f"classes must be a list of names, background first; got {self.classes!r}")
        object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))
        if self.labels is not None:
            if not isinstance(self.labels, Mapping):
                raise TypeError(f"labels must be class names with their ids, got {self.labels!r}")
            object.__setattr__(self, "labels", {str(name): _ids(name, value) for name, value in self.labels.items()})
        for key in ("window", "percentiles"):
            try:
                object.__setattr__(self, key, tuple(float(v) for v in getattr(self, key)))
            except (TypeError, ValueError):
                raise TypeError(f"{key} must be (low, high), got {getattr(self, key)!r}") from None
        numbers = {"spacing": float, "nsd_tolerance": float, "image_size": int, "in_channels": int, "context": int}
        for key, kind in numbers.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{key} must be a number, got {value!r}")
            if kind is int and not float(value).is_integer():  # nor infinite
                raise TypeError(f"{key} must be a whole number, got {value!r}")
            object.__setattr__(self, key, kind(value))
        if not isinstance(self.keep_largest, bool):
            if not isinstance(self.keep_largest, str | list | tuple | None):
                raise TypeError(f"keep_largest must be true, false or names of classes, got {self.keep_largest!r}")
            names = [self.keep_largest] if isinstance(self.keep_largest, str) else self.keep_largest or ()
            object.__setattr__(self, "keep_largest", tuple(str(name) for name in names) or False)
        self._check()

    def _check(self) -> None:
        def refuse(what: str) -> None:
            raise UsageError(f"task {self.name!r}: {what}")

        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            refuse(f"classes must be background and at least one more, all different; got {list(self.classes)}")
        if self.classes[0] != "background":
            refuse(f"the first class must be 'background', got {self.classes[0]!r}; put it before the others")
        for name in self.labels or {}:
            if name not in self.classes:
                refuse(f"labels names the unknown class {name!r}; {nearest(name, self.classes)}")
        if self.labels is not None:
            missing = [name for name in self.classes[1:] if name not in self.labels]
            if missing:
                refuse(f"labels gives no ids for {', '.join(missing)}; add them or drop the class")
            every = [(i, name) for name, ids in self.labels.items() for i in ids]
            for position, (i, name) in enumerate(every):
                for other, owner in every[:position]:
                    if i == other:
                        refuse(f"labels gives id {i} to both {owner!r} and {name!r}; an id belongs to one class")
        if self.axis not in AXES:
            refuse(f"axis {self.axis!r} is unknown; {nearest(str(self.axis), AXES)}")
        if self.modality not in ("CT", "MR", "image"):
            refuse(f"modality {self.modality!r} is unknown; choose from CT, MR, image")
        if not 16 <= self.image_size <= LARGEST_IMAGE or self.image_size % 16:
            refuse(f"image_size must be a multiple of 16 from 16 to {LARGEST_IMAGE}, got {self.image_size}")
        for key in ("spacing", "nsd_tolerance"):
            if not 0 < getattr(self, key) < math.inf:  # nor NaN
                refuse(f"{key} must be positive (mm), got {getattr(self, key)}")
        if self.in_channels not in (1, 2, 3):
            refuse(f"in_channels must be 1, 2 or 3, got {self.in_channels}")
        if self.context not in (0, 1):
            refuse(f"context must be 0 or 1 (SAM takes three channels: a slice and two neighbors), got {self.context}")
        if self.context and self.in_channels != 1:
            refuse("context 1 needs in_channels 1: the channels already fill SAM's three; set context to 0")
        if self.context and self.modality == "image":
            refuse("context 1 needs a volume, and a picture has no neighboring slices; set context to 0")
        for name in self.keep_largest if isinstance(self.keep_largest, tuple) else ():
            if name not in self.classes[1:]:
                refuse(f"keep_largest names {name!r}, which is no foreground class; {nearest(name, self.classes[1:])}")
        for key in ("window", "percentiles"):
            pair = getattr(self, key)
            if len(pair) != 2 or not -math.inf < pair[0] < pair[1] < math.inf:
                refuse(f"{key} must be (low, high) with low < high, got {pair}")
        if self.percentiles[0] < 0 or self.percentiles[1] > 100:
            refuse(f"percentiles must lie between 0 and 100, got {self.percentiles}")

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    @property
    def network_channels(self) -> int:
        """Channels of a slice as the network sees it: those of the scan, or the slice between its two neighbors."""
        return 1 + 2 * self.context if self.context else self.in_channels

    @property
    def largest_only(self) -> tuple[int, ...]:
        """Indices of the classes of which only the largest connected piece stays."""
        if isinstance(self.keep_largest, bool):
            return tuple(range(1, self.num_classes)) if self.keep_largest else ()
        return tuple(k for k, name in enumerate(self.classes) if name in self.keep_largest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Build a Task from plain JSON or YAML values, refusing unknown keys and values of a wrong type."""
        try:
            return from_mapping(cls, values, "task")
        except ValueError as error:  # a text where a number belongs
            raise UsageError(f"task: {error}") from error

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """Read a Task from a YAML or JSON file (JSON is YAML): the mapping itself, or its entry `task`.

        Raises:
            UsageError: there is no such file, it is no YAML, or it states no valid task.
        """
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"there is no task file {path} ({error.strerror}); give a YAML or JSON file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is no YAML or JSON ({' '.join(str(error).split())}); repair it") from error
        if not isinstance(values, Mapping):
            raise UsageError(f"{path}: expected a mapping of task keys, got {type(values).__name__}")
        return cls.from_dict(values.get("task", values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["classes"] = list(self.classes)
        values["labels"] = None if self.labels is None else {k: list(v) for k, v in self.labels.items()}
        for key in ("window", "percentiles"):
            values[key] = list(getattr(self, key))
        if isinstance(self.keep_largest, tuple):
            values["keep_largest"] = list(self.keep_largest)
        for key in ("context", "keep_largest"):  # left out where unused: files of models without them stay as they were
            if not values[key]:
                del values[key]
        return values


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids of a class in the label files, stated as one number or a list of them."""
    ids = value if isinstance(value, list | tuple) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, Real) or not float(i).is_integer():
            raise TypeError(f"labels of {name!r} must be whole numbers, got {i!r}")
    return tuple(int(i) for i in ids)
