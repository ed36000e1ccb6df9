# SPDX-License-Identifier: Apache-2.0
"""Effective receptive fields of several models on disk: the numbers, and the maps beside each other.

========== ============================================================================================
file       holds
========== ============================================================================================
`erf.json` number and size of the images, and for each model: backbone, adapters, version, and for each
           tap sides and ratios of the areas (see :mod:`samda.inference.receptive_field`)
`erf.png`  one map per model and tap, all in one scale: influence over the largest of the map, in
           decades; the square holds half of the influence
========== ============================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samda.adapters.base import attached
from samda.errors import UsageError
from samda.files import new_folder, plain, write_json
from samda.inference.receptive_field import DECADES, Area, ErfMap, area_ratios, rescale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from samda.networks.segmenter import SamSegmenter

__all__ = ["ModelField", "draw_fields", "write_fields"]

HALF = 0.5  # share of the influence in the square that is drawn
LONGEST = 36  # letters of a name above a map; the end of a path tells models apart


@dataclasses.dataclass(frozen=True)
class ModelField:
    """The fields of one model.

    Attributes:
        name: of the model, for people.
        version: of the model folder; None for the base without adapters.
        backbone: as in `adapter.json`.
        adapters: adapter name -> settings; empty for the base.
        fields: tap -> map.
        areas: tap -> scale -> share -> area.
    """

    name: str
    version: str | None
    backbone: str | dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    fields: Mapping[str, ErfMap]
    areas: Mapping[str, Mapping[str, Mapping[float, Area]]]

    @classmethod
    def of(cls, network: SamSegmenter, fields: Mapping[str, ErfMap], name: str, version: str | None) -> ModelField:
        """The fields of a network, which says the rest of itself."""
        return cls(
            name=name,
            version=version,
            backbone=network.config.to_json(),
            adapters={key: config.to_dict() for key, config in attached(network).items()},
            fields=fields,
            areas={tap: area_ratios(field) for tap, field in fields.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the maps."""
        taps = {
            tap: {
                "images": field.images,
                "skipped": field.skipped,
                "largest": float(field.array.max()),
                "areas": {
                    scale: {str(share): dataclasses.asdict(area) for share, area in areas.items()}
                    for scale, areas in self.areas[tap].items()
                },
            }
            for tap, field in self.fields.items()
        }
        about = {"model": self.name, "version": self.version, "backbone": self.backbone, "adapters": self.adapters}
        return plain(about | {"taps": taps})


def write_fields(folder: str | Path, models: Sequence[ModelField], about: Mapping[str, Any]) -> None:
    """Write `erf.json` and `erf.png` into a new folder, which appears complete or not at all.

    Args:
        folder: a new or empty folder.
        models: what was measured.
        about: further plain values of `erf.json`.

    Raises:
        UsageError: the folder cannot be written, or holds something.
    """
    try:
        with new_folder(folder) as place:
            write_json(place / "erf.json", {**about, "models": [model.to_dict() for model in models]})
            draw_fields(models).savefig(place / "erf.png", dpi=110, metadata={"Software": None})
    except OSError as error:
        raise UsageError(
            f"nothing can be written to {folder} ({error.strerror or error}); choose another output folder"
        ) from error


def draw_fields(models: Sequence[ModelField]) -> Figure:
    """One row a model, one column a tap, one color scale for all.

    A color is a share of the map's largest influence; each map is divided by its own largest, because a scaled feature
    is no wider.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    taps = list(models[0].fields)
    side = 3.3  # inches
    figure = Figure(figsize=(side * len(taps) + 0.9, (side + 0.3) * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(taps), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, tap in zip(row, taps, strict=True):
            array, area = model.fields[tap].array, model.areas[tap]["mass"][HALF]
            image = axes.imshow(rescale(array, "normalized"), cmap="magma", vmin=0, vmax=np.log10(10**DECADES + 1))
            name = model.name if len(model.name) <= LONGEST else "..." + model.name[3 - LONGEST :]
            title = f"{name}, {tap}".replace("$", r"\$")  # no formula
            if area.side is not None:
                top, left = (n // 2 - area.side // 2 - 0.5 for n in array.shape)
                axes.add_patch(Rectangle((left, top), area.side, area.side, fill=False, color="cyan", linewidth=1))
                title += f"\nhalf within {area.side} px"
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    shares = [0.0, *(10.0**-k for k in range(DECADES, -1, -1))]
    bar = figure.colorbar(image, ax=panels, ticks=[float(np.log10(10**DECADES * s + 1)) for s in shares], shrink=0.8)
    bar.ax.set_yticklabels([f"{share:g}" for share in shares])
    bar.set_label("influence, share of the largest")
    return figure
