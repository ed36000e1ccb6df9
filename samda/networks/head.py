# SPDX-License-Identifier: Apache-2.0
"""The contract of class heads: from levels of a feature pyramid to class logits.

A pyramid maps names of levels to maps (B, C, H / stride, W / stride):

============== ============================================================= =====================
level          content                                                       stride
============== ============================================================= =====================
`image`        the image itself, in [0, 1]                                   1
`embedding`    output of the encoder's neck, which SAM's decoder takes       16
`upscaled`     SAM's decoder: upscaled image features, seen by SAM-DA        4
others         inner maps of the encoder, see `BackboneConfig.levels`        the backbone's
============== ============================================================= =====================

A head names the levels that it reads (`reads`); only these are computed and cached. All its parameters but those of
adapters at its sites are trained: counting, freezing and saving derive from `named_parameters` and its buffers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn

from samda.errors import UsageError
from samda.io import plain

IMAGE, EMBEDDING, UPSCALED = "image", "embedding", "upscaled"
TOKENS = "tokens"  # (B, K, C) of SAM's decoder, beside the level `upscaled`

Pyramid = dict[str, torch.Tensor]


class Level(NamedTuple):
    """Size of a level."""

    channels: int
    stride: int  # pixels of the image per place


def map_levels(function: Callable[..., torch.Tensor], *pyramids: Mapping[str, torch.Tensor]) -> Pyramid:
    """`function` of each level, or of the same level of several pyramids."""
    return {name: function(*(pyramid[name] for pyramid in pyramids)) for name in pyramids[0]}


def cat_levels(pyramids: Iterable[Mapping[str, torch.Tensor]]) -> Pyramid:
    """Several batches as one."""
    return map_levels(lambda *maps: torch.cat(maps), *pyramids)


def split_levels(pyramid: Mapping[str, torch.Tensor], size: int) -> list[Pyramid]:
    """Batches of at most `size` images."""
    count = len(next(iter(pyramid.values())))
    return [map_levels(lambda maps, at=at: maps[at : at + size], pyramid) for at in range(0, count, size)]


class ClassHead(nn.Module):
    """A class head: `forward` maps a pyramid with its levels to logits (B, K, H / stride, W / stride).

    Attributes:
        name: of the kind of head.
        reads: names of the levels.
        stride: of the logits.
        feature_stride: of the features by which adaptation aligns scans (:meth:`feature_modules`).
        gradient_cost: memory of a slice in a pass with gradients, relative to the `sam` head.
        has_closed_form: can it start without gradient steps (:meth:`closed_form`)?
        kept: so many of the first classes have trained parameters, of the model that a training starts from.
    """

    name: ClassVar[str]
    gradient_cost: ClassVar[int] = 1
    has_closed_form: ClassVar[bool] = False
    kept: int = 0
    reads: tuple[str, ...]
    stride: int
    feature_stride: int

    @property
    @abstractmethod
    def trained(self) -> bool:
        """Has the head left its initial state? An untrained one predicts nothing useful."""

    def closed_form(self, class_counts: torch.Tensor, possible: torch.Tensor | None = None) -> Any:
        """Collector of the statistics for a start without gradient steps: `add(pyramid, labels)`, then `finish()`.

        Args:
            class_counts: (K,) pixels of each class in the training labels.
            possible: of partial labels, see :class:`samda.networks.closed_form.RidgeStatistics`.

        Raises:
            UsageError: this head has no such start.
        """
        raise UsageError(f"head {self.name!r} has no closed-form start; choose head 'pyramid', or train it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassHeadConfig(ABC):
    """Settings of a class head; `type` names its kind."""

    type: ClassVar[str]
    learning_rate: ClassVar[float]  # suits the head in supervised training

    @property
    @abstractmethod
    def reads_decoder(self) -> bool:
        """Does the head read SAM's mask decoder? Without one, adapters find no decoder sites."""

    @abstractmethod
    def complete(self, levels: Mapping[str, Level], names: tuple[str, str, str], decoder: bool) -> ClassHeadConfig:
        """All settings that are None filled in.

        Args:
            levels: of the backbone.
            names: levels that the backbone recommends, fine to coarse.
            decoder: will something in SAM's decoder be trained?
        """

    @abstractmethod
    def build(self, num_classes: int, levels: Mapping[str, Level]) -> ClassHead:
        """The head with fresh weights; `levels` include `image` and `upscaled`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values: `type` and every setting."""
        return {"type": self.type} | plain(dataclasses.asdict(self))
