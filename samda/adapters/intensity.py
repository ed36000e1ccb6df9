# SPDX-License-Identifier: Apache-2.0
"""Gray values of the network's input: a curve, inversion and sharpness, three numbers.

Another scanner, exposure or display shows the same anatomy in other gray values. A small module in front of a frozen
network that maps them back is what adapts in Karani et al. (arXiv 2004.04668); here it is three numbers. With the
intensities x in [0, 1] and their 3 x 3 mean m(x),

    x -> x + curve x (1 - x)            twice, as in Zero-DCE (arXiv 2001.06826)
    x -> x + invert (1 + AIR - 2 x)     where x > AIR: air and padding stay dark
    x -> x + detail (x - m(x))          -1 smooths, 1 sharpens

clipped to [0, 1]. All are 0 at the start. `curve` from -1 to 1 is monotone and close to a gamma of 4 to 0.3.

The values that suit a scan are searched without gradients. Their merit is the predicted Dice
(:mod:`samda.expected_dice`), whose calibration has seen such changes of the input. Two rounds: one change alone, each
of the three numbers in turn; then a finer curve, and another change beside the best one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F

from samda.adapters.base import Adapter, AdapterConfig, zeros
from samda.adapters.sites import Site

AIR = 0.03  # intensity up to which a pixel counts as air or padding
STEP = 0.5  # of `curve`; half of it in the second round of the search

Values = dict[str, float]  # of `curve`, `invert` and `detail`; those left out are 0
ALONE: tuple[Values, ...] = ({"curve": STEP}, {"curve": -STEP}, {"invert": 1.0}, {"detail": 1.0}, {"detail": -1.0})


class IntensityAdapter(Adapter):
    """Images (B, C, H, W) in [0, 1] -> the same with other gray values; the parameters are scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.curve, self.invert, self.detail = zeros(), zeros(), zeros()

    @classmethod
    @torch.no_grad()
    def of(cls, values: Mapping[str, float]) -> IntensityAdapter:
        """With values of its parameters, by name; those left out are 0."""
        adapter = cls()
        for name, value in values.items():
            adapter.get_parameter(name).fill_(value)
        return adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.curve * x * (1 - x)
        x = x + self.invert * (1 + AIR - 2 * x) * (x > AIR)
        x = x + self.detail * (x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return x.clamp(0, 1)

    def scope_params(self) -> dict[str, list[str]]:
        return {"intensity": self.adapter_params()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntensityConfig(AdapterConfig):
    """Settings of the intensity adapter; it has none but the seed."""

    name: ClassVar[str] = "intensity"
    roles: ClassVar[tuple[str, ...]] = ("input",)

    def build(self, site: Site, generator: torch.Generator) -> IntensityAdapter:
        return IntensityAdapter()


def alone(inversion: bool) -> list[Values]:
    """The changes of the first round; without `inversion` where intensities have a unit."""
    return [values for values in ALONE if inversion or "invert" not in values]


def beside(best: Mapping[str, float]) -> list[Values]:
    """The changes of the second round."""
    step = STEP / 2 if "curve" in best else STEP
    found: list[Values] = [{**best, "curve": best.get("curve", 0.0) + sign * step} for sign in (1, -1)]
    return found if "detail" in best else found + [{**best, "detail": sign} for sign in (1.0, -1.0)]


def tried(inversion: bool) -> list[Values]:
    """All changes that :func:`search` may try, but for the sharpness beside another one."""
    first = alone(inversion)
    second = [values for best in first if "detail" not in best for values in beside(best)]
    return first + [values for values in second if "detail" not in values]


def search(gain: Callable[[Values], float], inversion: bool, margin: float) -> Values:
    """The values of highest gain, if it is above `margin`; else {}.

    Args:
        gain: how much higher the predicted Dice is with some values than without a change.
        inversion: may dark be bright?
        margin: that of the calibration.
    """
    best: Values = {}
    highest = 0.0
    changes = alone(inversion)
    for _ in range(2):
        for values in changes:
            found = gain(values)
            if found > highest:
                best, highest = values, found
        changes = beside(best) if best else []
    return best if highest > margin else {}
