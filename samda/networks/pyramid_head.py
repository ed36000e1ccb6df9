# SPDX-License-Identifier: Apache-2.0
"""The head `pyramid`: several levels of the frozen encoder, top-down, with fine maps from the image itself.

    coarse (16) -> stage 16 -> up -> + middle -> stage 8 -> up -> + fine + stem [+ SAM's decoder] -> stage 4
                                                                 -> up -> + stem -> stage 2 -> class logits

Levels are standardized channel by channel with moments of the training slices. Fine stages are narrow: on a CPU the
number of gradient steps matters more than width. A linear path from the levels to the logits, found in closed form
(:mod:`samda.networks.closed_form`), makes a usable model before the first gradient step; the stages start at zero
beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from samda.adapters.sites import LevelSite, SiteInfo
from samda.data.labels import IGNORED
from samda.errors import UsageError, nearest
from samda.networks.closed_form import RidgeSolution, RidgeStatistics
from samda.networks.head import IMAGE, UPSCALED, ClassHead, ClassHeadConfig, Level, Pyramid

GROUPS = 8  # of the group norms
WIDEST = 2048  # channels of a stage
OUTLIER = 8.0  # standard deviations at which levels are clipped
SCORE_SCALE = 8.0  # logits of a closed-form score of 1
RARE = 4.0  # logit of "none of them" in a branch that has learned nothing
LINEAR_RATE = 0.05  # the linear path learns so much more slowly than the rest: its start is good

Maps = Sequence[torch.Tensor]  # (B, C, h, w), one of each level, fine to coarse
Size = tuple[int, ...]  # rows, columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidHeadConfig(ClassHeadConfig):
    """Settings of :class:`PyramidHead`."""

    type: ClassVar[str] = "pyramid"
    learning_rate: ClassVar[float] = 2e-3

    levels: tuple[str, ...] | None = None  # three of the encoder's, fine to coarse; null: those of the backbone
    widths: tuple[int, ...] = (96, 64, 48, 16)  # channels at strides 16, 8, 4 and 2; multiples of 8
    stride: int = 2  # of the logits, 2 or 4
    decoder: bool | None = None  # read SAM's decoder, too; null: where something in it is trained
    added: tuple[int, ...] = ()  # classes of branches beside the head, the last of all; see `PyramidHead.branches`

    def __post_init__(self) -> None:
        for key in ("levels", "widths", "added"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        widths = self.widths
        self._require("widths", isinstance(widths, tuple) and len(widths) == 4, "four numbers of channels")
        fits = all(isinstance(width, int) and width in range(GROUPS, WIDEST + 1, GROUPS) for width in widths)
        self._require("widths", fits, f"multiples of {GROUPS} up to {WIDEST}")
        self._require("stride", self.stride in (2, 4), "2 or 4")
        self._require("decoder", self.decoder in (None, True, False), "true, false or null")
        numbers = isinstance(self.added, tuple) and all(type(n) is int and n > 0 for n in self.added)
        self._require("added", numbers, "numbers of classes")
        levels = self.levels
        self._require("levels", levels is None or (isinstance(levels, tuple) and len(levels) == 3), "three names")

    def _require(self, key: str, valid: bool, what: str) -> None:
        if not valid:
            raise UsageError(f"head 'pyramid': {key} must be {what}, got {getattr(self, key)!r}")

    @property
    def reads_decoder(self) -> bool:
        return bool(self.decoder)

    def complete(self, levels: Mapping[str, Level], names: tuple[str, str, str], decoder: bool) -> PyramidHeadConfig:
        for name in self.levels or ():
            if name not in levels:
                raise UsageError(f"head 'pyramid': there is no level {name!r}; {nearest(str(name), levels)}")
        reads_decoder = decoder if self.decoder is None else self.decoder
        return dataclasses.replace(self, levels=self.levels or names, decoder=reads_decoder)

    def build(self, num_classes: int, levels: Mapping[str, Level]) -> PyramidHead:
        self._require("added", sum(self.added) < num_classes - 1, f"less than the {num_classes - 1} classes in all")
        return PyramidHead(self, num_classes - sum(self.added), levels)

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        return values if self.added else {key: value for key, value in values.items() if key != "added"}


class PyramidHead(ClassHead):
    """See the module.

    A branch adds n classes without touching the others: it is a head of n + 1 classes, "none of them" first, on the
    same levels. With the logits z of the classes before it and its own b, the logits of its classes are
    logsumexp(z) + b_j - b_0, so that p_j = softmax(b)_j and the others keep their logits, and what is left of 1.

    Args:
        config: with all settings, see :meth:`PyramidHeadConfig.complete`.
        num_classes: K without those of branches.
        levels: channels and strides by name.
        is_branch: levels arrive standardized, through the sites of the head.

    Attributes:
        branches: heads of `config.added` classes each.
        linear_gain: factor of the linear path; a training may lower it from 1 to 0, or leave the path out by 0.
    """

    linear_gain: torch.Tensor

    name = "pyramid"
    gradient_cost = 4
    has_closed_form = True
    feature_stride = 8

    def __init__(
        self, config: PyramidHeadConfig, num_classes: int, levels: Mapping[str, Level], is_branch: bool = False
    ) -> None:
        super().__init__()
        assert config.levels is not None
        self.levels, self.stride = config.levels, config.stride  # fine, middle, coarse
        self.reads = (IMAGE, *self.levels) + ((UPSCALED,) if config.decoder else ())
        fine, middle, coarse = (levels[name].channels for name in self.levels)
        w16, w8, w4, w2 = config.widths
        own = () if is_branch else self.levels
        self.standardize = nn.ModuleList(Standardize(levels[name].channels) for name in own)
        self.sites = nn.ModuleList(
            LevelSite(SiteInfo(f"head.{index}.level", "level", "level", index, levels[name].channels))
            for index, name in enumerate(own)
        )
        self.stem = nn.Sequential(conv_block(levels[IMAGE].channels, w2, stride=2), conv_block(w2, w2))
        self.stem4 = conv_block(w2, w4, stride=2)
        self.lateral16, self.stage16 = nn.Conv2d(coarse, w16, 1), Stage(w16)
        self.lateral8, self.down8, self.stage8 = nn.Conv2d(middle, w8, 1), project(w16, w8), Stage(w8)
        self.lateral4, self.down4, self.stage4 = nn.Conv2d(fine, w4, 1), project(w8, w4), Stage(w4, blocks=2)
        self.lateral_decoder = None
        if config.decoder:
            channels = levels[UPSCALED].channels
            self.lateral_decoder = nn.Sequential(nn.GroupNorm(GROUPS, channels), project(channels, w4))
        if self.stride == 2:
            self.down2, self.stage2 = project(w4, w2), Stage(w2)
        self.features = nn.Identity()  # the last hidden maps pass here
        self.read = nn.Conv2d(w2 if self.stride == 2 else w4, num_classes, 1)
        self.linear = nn.ModuleList(project(levels[name].channels, num_classes) for name in self.levels)
        self.linear_bias = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("linear_gain", torch.ones(()))
        for layer in (self.read, *self.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        single = dataclasses.replace(config, added=())
        self.branches = nn.ModuleList(PyramidHead(single, n + 1, levels, is_branch=True) for n in config.added)
        for branch in self.branches:
            nn.init.constant_(branch.linear_bias[:1], RARE / LINEAR_RATE)  # type: ignore[index]

    def forward(self, pyramid: Pyramid) -> torch.Tensor:
        """Levels -> class logits (B, K, H / stride, W / stride)."""
        levels = self.standardized(pyramid)
        parts: tuple[Any, ...] = (self, *self.branches)
        return _joined([part._logits(pyramid, levels, self.sites) for part in parts])

    def _logits(self, pyramid: Pyramid, levels: Maps, sites: Iterable[Any]) -> torch.Tensor:
        """The logits of this head or branch from standardized levels."""
        image = pyramid[IMAGE]
        s16, s8, s4, s2 = ((image.shape[-2] // s, image.shape[-1] // s) for s in (16, 8, 4, 2))
        fine, middle, coarse = self._each_read(self._laterals, levels, sites)
        stem = self.stem((image - 0.5) * 4)
        x = self.stage16(resize(coarse, s16))
        x = self.stage8(resize(middle, s8), resize(self.down8(x), s8))
        maps = [resize(fine, s4), resize(self.down4(x), s4), self.stem4(stem)]
        if self.lateral_decoder is not None:
            maps.append(resize(self.lateral_decoder(pyramid[UPSCALED]), s4))
        x = self.stage4(*maps)
        if self.stride == 2:
            x = self.stage2(resize(self.down2(x), s2), stem)
        logits = self.read(self.features(x))
        return logits + self.linear_gain * self._linear(levels, s4, logits.shape[-2:], sites)

    def linear_logits(self, levels: Maps, stride4: Size, size: Size) -> torch.Tensor:
        """Logits of the linear path from standardized levels, summed at stride 4, interpolated to `size`."""
        parts: tuple[Any, ...] = (self, *self.branches)
        return _joined([part._linear(levels, stride4, size, self.sites) for part in parts])

    def _linear(self, levels: Maps, stride4: Size, size: Size, sites: Iterable[Any]) -> torch.Tensor:
        linear = self.linear_bias.view(1, -1, 1, 1)
        for part in self._each_read(self.linear, levels, sites):
            linear = linear + resize(part, stride4)
        return LINEAR_RATE * resize(linear, size)

    @property
    def _laterals(self) -> tuple[nn.Conv2d, ...]:
        """What the stages read of the levels, fine to coarse."""
        return self.lateral4, self.lateral8, self.lateral16

    def _each_read(self, layers: Iterable[Any], levels: Maps, sites: Iterable[Any]) -> list[torch.Tensor]:
        return [site.read(layer, maps) for site, layer, maps in zip(sites, layers, levels, strict=True)]

    @torch.no_grad()
    def fold_sites(self) -> None:
        """Multiply the adapters of the levels into the layers that read them, and remove them; for export."""
        parts: list[Any] = [self, *self.branches]
        for index, site in enumerate(self.sites):
            if not site.adapted:
                continue
            for part in parts:
                lateral, linear = part._laterals[index], part.linear[index]
                for layer, bias in ((lateral, lateral.bias), (linear, part.linear_bias)):
                    weight, added = site.folded(layer.weight)  # type: ignore[operator]
                    layer.weight.data = weight
                    bias += added
            site.adapters.clear()  # type: ignore[operator,union-attr]

    def standardized(self, pyramid: Pyramid) -> list[torch.Tensor]:
        """The encoder's levels, fine to coarse."""
        return [layer(pyramid[name]) for layer, name in zip(self.standardize, self.levels, strict=True)]

    @property
    def trained(self) -> bool:
        return any(bool(layer.weight.any()) for layer in (self.read, *self.linear))  # type: ignore[union-attr,operator]

    def closed_form(self, class_counts: torch.Tensor, possible: torch.Tensor | None = None) -> ClosedForm | None:
        if self.kept:
            return GrowingForm(self, class_counts, possible) if self.kept < len(class_counts) else None
        return ClosedForm(self, class_counts, possible)

    @torch.no_grad()
    def start(self, solution: RidgeSolution) -> None:
        """Begin at a solution for the levels, fine to coarse: the linear path is the solution, the stages give zero."""
        layers: list[Any] = list(self.linear)
        widths = [layer.in_channels for layer in layers]
        parts = [part.split(widths) for part in (solution.mean, solution.std, solution.weight)]
        frames: list[Any] = list(self.standardize)
        for standardize, layer, mean, std, weight in zip(frames, layers, *parts, strict=True):
            standardize.mean.copy_(mean.view(1, -1, 1, 1))
            standardize.std.copy_(std.view(1, -1, 1, 1))
            layer.weight.copy_(weight.T[:, :, None, None] * SCORE_SCALE / LINEAR_RATE)
        self.linear_bias.copy_(solution.bias * SCORE_SCALE / LINEAR_RATE)
        for parameter in self.read.parameters():
            parameter.zero_()


class ClosedForm:
    """Collects the statistics for :meth:`PyramidHead.start`."""

    def __init__(self, head: PyramidHead, class_counts: torch.Tensor, possible: torch.Tensor | None = None) -> None:
        self.head, self.statistics = head, RidgeStatistics(class_counts, possible=possible)

    def add(self, pyramid: Pyramid, labels: torch.Tensor) -> None:
        """Add slices: their levels and labels (B, H, W) of class indices."""
        size = (labels.shape[-2] // 4, labels.shape[-1] // 4)
        self.statistics.add(torch.cat([resize(maps, size) for maps in self.features(pyramid)], 1), labels)

    def features(self, pyramid: Pyramid) -> list[torch.Tensor]:
        """The levels, fine to coarse."""
        return [pyramid[name].float() for name in self.head.levels]

    def finish(self) -> None:
        """Solve, and let the head begin there."""
        self.head.start(self.statistics.solve())


class GrowingForm(ClosedForm):
    """The start of the classes behind `head.kept`: on background's channel, or in the last branch, their ridge scores
    against all others are added to the linear path; the rest of the head is as it is.
    """

    def __init__(self, head: PyramidHead, class_counts: torch.Tensor, possible: torch.Tensor | None = None) -> None:
        kept, classes = head.kept, len(class_counts)
        table = torch.eye(256, classes, dtype=torch.bool) if possible is None else possible
        may = torch.cat([table[:, :kept].any(1, keepdim=True), table[:, kept:]], 1)
        self.values = torch.where(may.sum(1) == 1, may.long().argmax(1), IGNORED)  # of label maps, in these classes
        alone = torch.zeros(256, may.shape[1], dtype=torch.bool)
        alone[IGNORED] = True
        counts = torch.cat([class_counts[:kept].sum()[None], class_counts[kept:]])
        super().__init__(head, counts, alone)

    def features(self, pyramid: Pyramid) -> list[torch.Tensor]:
        """The levels as the layers of the head see them."""
        head = self.head
        return [_through(site, maps) for site, maps in zip(head.sites, head.standardized(pyramid), strict=True)]

    def add(self, pyramid: Pyramid, labels: torch.Tensor) -> None:
        super().add(pyramid, self.values.to(labels.device)[labels.long()])

    @torch.no_grad()
    def finish(self) -> None:
        solution = self.statistics.solve()
        weight = solution.weight / solution.std[:, None]
        bias = solution.bias - solution.mean @ weight
        part: Any = self.head.branches[-1] if self.head.branches else self.head
        first = 1 if self.head.branches else self.head.kept
        if part is self.head:
            for rows in part.read.parameters():
                rows[first:] = rows[:1]
        else:
            part.linear_bias.zero_()
        scale = SCORE_SCALE / LINEAR_RATE
        for layer, own in zip(part.linear, weight.split([layer.in_channels for layer in part.linear]), strict=True):
            layer.weight[first:] = layer.weight[:1] + (own[:, 1:] - own[:, :1]).T[:, :, None, None] * scale
        part.linear_bias[first:] = part.linear_bias[0] + (bias[1:] - bias[0]) * scale


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits of a head and of its branches as one, see :class:`PyramidHead`."""
    logits = parts[0]
    for own in parts[1:]:
        logits = torch.cat([logits, logits.logsumexp(1, keepdim=True) + own[:, 1:] - own[:, :1]], 1)
    return logits


def _through(site: Any, maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, C, h, w) as their site scales and shifts them."""
    if not site.adapted:
        return maps
    unit = torch.eye(maps.shape[1], device=maps.device, dtype=maps.dtype)[:, :, None, None]
    scale, shift = site.folded(unit)
    return maps * scale[:, :, 0, 0].diagonal().view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Standardize(nn.Module):
    """(x - mean) / std of each channel, outliers clipped."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.std).clamp(-OUTLIER, OUTLIER)


class Stage(nn.Module):
    """The sum of maps of one size, normalized, and residual blocks on it."""

    def __init__(self, width: int, blocks: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.blocks = nn.ModuleList(conv_block(width, width) for _ in range(blocks))

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm(sum(maps)))
        for block in self.blocks:
            x = x + block(x)
        return x


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, group norm, GELU."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, out_channels), nn.GELU())


def project(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A linear map of the channels, without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def resize(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """Bilinear interpolation of maps (B, C, h, w) to another grid; pixels are areas."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
