# SPDX-License-Identifier: Apache-2.0
"""Settings of an adaptation, from which options of `samda adapt`, keys of adapt.json and `config` of records derive.

This module does not import PyTorch, to keep `samda adapt --help` fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from samda.adaptation.guard import GuardSettings
from samda.errors import UsageError, check_keys, from_mapping, is_finite, nearest

METHODS = (  # of samda.adaptation.objectives
    "none",
    "tent",
    "memo",
    "sam_da",
    "class_entropy",
    "consistency",
    "default",
)
REMOVED = ("tpt", "pseudo_label", "anchored")  # objectives of samda 0.1
VIEWS = {False: 6, True: 3}  # of each slice; does the predicted Dice choose, or their agreement?
SCOPES = ("intensity", "ssf", "gate", "decoder", "norm", "encoder")  # of samda.adapters.attach


def _whole(default: int | None, least: int, text: str = "", **option: Any) -> Any:
    return dataclasses.field(default=default, metadata={"least": least, "type": int, "help": text, **option})


def _number(default: float | None, text: str = "", **option: Any) -> Any:
    """`most` allows 0 to that number; without it the number must be above 0."""
    return dataclasses.field(default=default, metadata={"type": float, "help": text, **option})


def _value(default: Any, text: str = "", **option: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **option})


@dataclasses.dataclass(frozen=True)
class AdaptationSettings:
    """Settings of :class:`samda.adaptation.engine.Adaptation`.

    Fields with a `flag` are options of `samda adapt` and explained there; the others are keys of its `--set`.

    Args:
        families: kinds of views, or one of them, see :mod:`samda.views`; None takes all.
        flips: mirror every second view; off by default, because organs are lateralized.
        strength: factor of the changes of the views, 0 to 10.
        guard: thresholds of the guard, see :class:`samda.adaptation.guard.GuardSettings`.
        objective: further settings of the objective.
        keep: "best" keeps the first iterate with at least 95 % of the highest merit, "last" the last one.
        time_limit_s: seconds after which a case falls back; None sets no limit.
        batch_size: slices in one call of the encoder.
        memory_mb: memory for kept embeddings (MB); others lie in temporary files.
        modality: "CT" or "MR" where the scans are of another kind than those of the training; it decides how
            intensities are mapped to [0, 1].
        keep_largest: instead of the task's, see :func:`samda.inference.postprocessing.override`.
    """

    method: str = _value(
        "default",
        f"objective to minimize: {', '.join(METHODS)}; the last is the default",
        flag="--method",
        metavar="NAME",
    )
    scope: str | None = _value(
        None,
        f"parameters to adapt: {', '.join(SCOPES)}; join several by +; default: intensity, ssf and decoder, as the "
        "model has them",
        flag="--scope",
        metavar="NAME[+NAME]",
    )
    steps: int | None = _whole(None, 0, "optimizer steps; default: the objective's", flag="--steps")
    lr: float | None = _number(
        None,
        "learning rate, of ssf 10 times as high; default: the objective's",
        flag="--learning-rate",
        words="the learning rate (lr)",
    )
    views: int | None = _whole(
        None, 1, "views of each slice; default 6, or 3 where a predicted Dice chooses", flag="--views"
    )
    slices: int = _whole(8, 1, "slices to adapt on; default 8", flag="--slices")
    seed: int = _whole(0, 0, "random seed of the views; default 0", flag="--seed")
    families: str | Sequence[str] | None = None
    flips: bool = False
    strength: float = _number(1.0, most=10.0)  # stronger views overflow
    guard: Mapping[str, Any] | None = None
    objective: Mapping[str, Any] | None = None
    keep: str = "best"
    time_limit_s: float | None = _number(None)
    batch_size: int = _whole(8, 1)
    memory_mb: float = _number(64.0, most=math.inf)
    modality: str | None = None
    keep_largest: bool | str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.method in REMOVED:
            raise UsageError(f"method {self.method!r} was removed after samda 0.1; choose from {', '.join(METHODS)}")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; {nearest(str(self.method), METHODS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check(field, value)
        if not isinstance(self.flips, bool):
            raise UsageError(f"flips must be true or false, got {self.flips!r}")
        if self.keep not in ("best", "last"):
            raise UsageError(f"keep must be best or last, got {self.keep!r}")
        object.__setattr__(self, "families", _families(self.families, self.views))
        _ = self.thresholds  # validates them

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> AdaptationSettings:
        """Settings of a command line, a config or a record; None takes the default, unknown keys are refused."""
        check_keys(values, [field.name for field in dataclasses.fields(cls)], "settings of the adaptation")
        return cls(**{key: value for key, value in values.items() if value is not None})

    @property
    def thresholds(self) -> GuardSettings:
        """Thresholds of the guard."""
        return from_mapping(GuardSettings, {} if self.guard is None else self.guard, "guard")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record; without `memory_mb`, which does not change the result."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["memory_mb"]
        return values | {"families": list(self.families or ()), "guard": self.thresholds.to_dict()}


def _check(field: dataclasses.Field, value: Any) -> None:
    """Refuse a number of the wrong type or out of the range in the field's metadata."""
    rule, name = field.metadata, field.name
    if rule.get("type") is int:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < rule["least"]:
            raise UsageError(f"{name} must be at least {rule['least']} and whole, got {value!r}")
    elif "most" in rule:
        if not is_finite(value) or not 0 <= value <= rule["most"]:
            limit = "at least 0" if rule["most"] == math.inf else f"from 0 to {rule['most']:g}"
            raise UsageError(f"{name} must be a number {limit}, got {value!r}")
    elif rule.get("type") is float and (not is_finite(value) or value <= 0):
        raise UsageError(f"{rule.get('words', name)} must be positive, got {value!r}")


def _families(value: Any, views: int | None) -> tuple[str, ...]:
    """The families of views, given as a list or a single name."""
    from samda.views import FAMILIES  # imports PyTorch, which `samda adapt --help` must not

    families = FAMILIES if value is None else [value] if isinstance(value, str) else value
    if not isinstance(families, Sequence) or not all(isinstance(family, str) for family in families):
        raise UsageError(f"families must be a list of {', '.join(FAMILIES)}, got {value!r}")
    for family in families:
        if family not in FAMILIES:
            raise UsageError(f"unknown view family {family!r}; {nearest(family, FAMILIES)}")
    if views != 1 and not families:
        raise UsageError(f"{views or VIEWS[False]} views need at least one family of {', '.join(FAMILIES)}")
    return tuple(families)
