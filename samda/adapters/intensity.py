# SPDX-License-Identifier: Apache-2.0
"""Gray values of the network's input: tone, a curve, inversion and sharpness.

Another scanner, exposure or display shows the same anatomy in other gray values. A small module in front of a frozen
network that maps them back is what adapts in Karani et al. (arXiv 2004.04668); here it is a few numbers. With the
intensities x in [0, 1] and their 3 x 3 mean m(x),

    x -> x + t(x)                       per channel; t is linear between its values at seven knots, 0 at 0 and 1
    x -> x + curve x (1 - x)            twice, as in Zero-DCE (arXiv 2001.06826)
    x -> x + invert (1 + AIR - 2 x)     where x > AIR: air and padding stay dark
    x -> x + detail (x - m(x))          -1 smooths, 1 sharpens

clipped to [0, 1]. All are 0 at the start. `curve` from -1 to 1 is monotone and close to a gamma of 4 to 0.3. `tone`
holds the knots and t there; :func:`matching_tone` brings the quantiles of a scan's body, all or half of the way, to
those of the training slices, as histogram matching does (Nyul and Udupa 1999, for MR; Reinhard et al. 2001, for color).

The values that suit a scan are searched without gradients. Their merit is the predicted Dice
(:mod:`samda.expected_dice`), whose calibration has seen such changes of the input. Two rounds: one change alone; then a
finer curve, and another change beside the best one. In the search, `match` stands for the tone: the share of the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from samda.adapters.base import Adapter, AdapterConfig, zeros
from samda.adapters.sites import Site

AIR = 0.03  # intensity up to which a pixel counts as air or padding
STEP = 0.5  # of `curve`; half of it in the second round of the search
KNOTS = 7  # of the tone, as many as quantiles of a body's intensities are kept
STEEPEST = 1e-5  # width of a piece of the tone

Values = dict[str, float]  # of `match`, `curve`, `invert` and `detail`; those left out are 0
ALONE: tuple[Values, ...] = (
    {"curve": STEP},
    {"curve": -STEP},
    {"match": 1.0},
    {"match": 0.5},
    {"invert": 1.0},
    {"detail": 1.0},
    {"detail": -1.0},
)
WITHOUT_UNIT = {"match", "invert"}  # changes of intensities that have no unit, as those of CT do


class IntensityAdapter(Adapter):
    """Images (B, C, H, W) in [0, 1] -> the same with other gray values.

    Parameters: `tone` (C, 2, KNOTS), knots in ascending order and t there; the others are scalars.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.tone = zeros(channels, 2, KNOTS)
        self.curve, self.invert, self.detail = zeros(), zeros(), zeros()

    @classmethod
    @torch.no_grad()
    def of(cls, values: Mapping[str, float], tone: torch.Tensor | None = None) -> IntensityAdapter:
        """With values of its parameters, by name, and a tone (C, 2, KNOTS); those left out are 0."""
        adapter = cls(1 if tone is None else len(tone))
        for name, value in values.items():
            if name != "match":
                adapter.get_parameter(name).fill_(value)
        if tone is not None:
            adapter.tone.copy_(tone)
        return adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._rise(x)
        for _ in range(2):
            x = x + self.curve * x * (1 - x)
        x = x + self.invert * (1 + AIR - 2 * x) * (x > AIR)
        x = x + self.detail * (x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return x.clamp(0, 1)

    def _rise(self, x: torch.Tensor) -> torch.Tensor:
        """t(x), as a sum over the pieces between the knots, which also exporters understand."""
        knots, rises = (F.pad(part, (1, 1)).T[:, None, :, None, None] for part in self.tone.unbind(1))
        knots = torch.cat([knots[:-1], torch.ones_like(knots[:1])])
        widths = (knots[1:] - knots[:-1]).clamp_min(STEEPEST)
        found = torch.zeros_like(x)
        for knot, width, rise in zip(knots, widths, rises[1:] - rises[:-1], strict=False):
            found = found + ((x - knot) / width).clamp(0, 1) * rise
        return found

    def scope_params(self) -> dict[str, list[str]]:
        return {"intensity": self.adapter_params()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntensityConfig(AdapterConfig):
    """Settings of the intensity adapter; it has none but the seed."""

    name: ClassVar[str] = "intensity"
    roles: ClassVar[tuple[str, ...]] = ("input",)

    def build(self, site: Site, generator: torch.Generator) -> IntensityAdapter:
        return IntensityAdapter(site.info.dim)


def matching_tone(
    found: torch.Tensor, reference: Sequence[Sequence[float]], values: Mapping[str, float]
) -> torch.Tensor:
    """The tone (C, 2, KNOTS) of some values: `match` of the way from the scan's quantiles to the training's.

    Where `invert` follows, to quantiles that the inversion brings to the training's.

    Args:
        found: (C, KNOTS) quantiles of the scan's body.
        reference: those of the training slices, a row per channel of the task; C is a multiple of their number.
        values: of the search.
    """
    wanted = torch.tensor(reference, dtype=found.dtype).repeat(len(found) // len(reference), 1)
    if values.get("invert"):
        wanted = (1 + AIR - wanted).clamp(0, 1).flip(1)
    match = values.get("match", 0.0)
    return torch.stack([found, wanted - found], 1) * torch.tensor([float(match > 0), match])[:, None]


def alone(unit: bool) -> list[Values]:
    """The changes of the first round, without those of :data:`WITHOUT_UNIT` where intensities have a `unit`."""
    return [values for values in ALONE if not (unit and WITHOUT_UNIT & set(values))]


def beside(best: Mapping[str, float]) -> list[Values]:
    """The changes of the second round."""
    step = STEP / 2 if "curve" in best else STEP
    found: list[Values] = [{**best, "curve": best.get("curve", 0.0) + sign * step} for sign in (1, -1)]
    if "invert" in best:
        found.append({**best, "match": 1.0})
    return found if "detail" in best else found + [{**best, "detail": sign} for sign in (1.0, -1.0)]


def tried(unit: bool) -> list[Values]:
    """All changes that :func:`search` may try, but for the sharpness beside another one."""
    first = alone(unit)
    second = [values for best in first if "detail" not in best for values in beside(best)]
    return first + [values for values in second if "detail" not in values]


def search(gain: Callable[[Values], float], unit: bool, margin: float) -> Values:
    """The values of highest gain, if it is above `margin`; else {}.

    Args:
        gain: how much higher the predicted Dice is with some values than without a change.
        unit: have the intensities one, as those of CT?
        margin: that of the calibration.
    """
    best: Values = {}
    highest = 0.0
    changes = alone(unit)
    for _ in range(2):
        for values in changes:
            found = gain(values)
            if found > highest:
                best, highest = values, found
        changes = beside(best) if best else []
    return best if highest > margin else {}
