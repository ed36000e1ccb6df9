# SPDX-License-Identifier: Apache-2.0
"""Reports: a self-contained HTML file without external resources.

Functions return pieces of HTML; a page is a list of sections, a section a list of pieces. All text is escaped. Callers
choose real names or pseudonyms of cases.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import EnsureChannelFirstd, Orientationd

from samda.data.labels import OPEN, MapLabelsd
from samda.data.slices import SliceGrid
from samda.data.transforms import RAS_LABELS, CheckSameGridd, LoadScand, Preprocessing, build_preprocessing
from samda.errors import InputError
from samda.io import Image, write_text
from samda.task import Task
from samda.version import __version__

PURPOSE = "Research use only. Not for diagnosis, treatment or any other clinical decision."

COLORS = (  # suitable for color-blind readers (after Okabe and Ito)
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
GAINED, LOST, SWAPPED = (0, 158, 115), (213, 94, 0), (240, 228, 66)  # colors of differences

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
.purpose { background: #fff3cd; border: 1px solid #e0c36a; padding: .5rem .8rem; font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; image-rendering: auto; } figcaption { color: #444; }
.row { display: flex; gap: .5rem; } .row div { flex: 0 1 22rem; } .row img { width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; color: #444; padding: .3rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.legend span { display: inline-block; margin-right: 1rem; } .legend i { display: inline-block; width: .9em;
       height: .9em; margin-right: .35em; border: 1px solid #666; vertical-align: -.1em; }
footer { margin-top: 3rem; color: #555; border-top: 1px solid #ccc; padding-top: .5rem; }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser must not load anything


# --------------------------------------------------------------------------------------------------------------- page


def page(title: str, sections: Iterable[str], about: Mapping[str, Any] | None = None) -> str:
    """An HTML document of sections; `about` contains facts for the footer, for example versions and seed."""
    facts = ", ".join(f"{_text(key)}: {_text(value)}" for key, value in (about or {}).items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{_text(title)}</title>\n<style>{STYLE}</style>\n'
        f'</head>\n<body>\n<h1>{_text(title)}</h1>\n<p class="purpose">{PURPOSE}</p>\n'
        + "\n".join(sections)
        + f"\n<footer>samda {_text(__version__)}. {PURPOSE}{' ' + facts if facts else ''}</footer>\n</body>\n</html>\n"
    )


def write_page(path: str | Path, document: str) -> Path:
    """Write a document in one step."""
    write_text(path, document)
    return Path(path)


def section(title: str, pieces: Iterable[str]) -> str:
    """A heading with content."""
    return f"<section>\n<h2>{_text(title)}</h2>\n" + "\n".join(pieces) + "\n</section>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{_text(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table; numbers are rounded, None and NaN are shown as a dash."""
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(_cell(v))}</td>" for v in row) + "</tr>" for row in rows)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f"<table>{title}\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


# ------------------------------------------------------------------------------------------------------------ pictures


def class_color(k: int) -> tuple[int, int, int]:
    """Red, green, blue (0 to 255) of class k; background is black."""
    if k == 0:
        return (0, 0, 0)
    if k <= len(COLORS):
        return COLORS[k - 1]
    red, green, blue = colorsys.hsv_to_rgb((k * 0.618034) % 1.0, 0.65, 0.95)  # golden ratio: neighbors differ
    return (round(255 * red), round(255 * green), round(255 * blue))


def legend(classes: Sequence[str]) -> str:
    """The color of each foreground class; `classes` are names, background first."""
    return _legend({name: class_color(k) for k, name in enumerate(classes) if k})


def paint(image: np.ndarray, labels: np.ndarray | None = None, opacity: float = 0.5) -> np.ndarray:
    """A slice (H, W) or (C, H, W) in [0, 1] as colors (H, W, 3) uint8, with an overlay of class indices (H, W)."""
    colors = _gray(image)
    if labels is not None:
        _check_size(colors, labels)
        for k in np.unique(labels[labels > 0]):
            _blend(colors, labels == k, class_color(int(k)), opacity)
    return colors.round().astype(np.uint8)


def changed(image: np.ndarray, before: np.ndarray, after: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """A slice as in :func:`paint` with the difference of two label maps (H, W): gained, lost, class changed."""
    colors = _gray(image)
    for labels in (before, after):
        _check_size(colors, labels)
    _blend(colors, (before == 0) & (after > 0), GAINED, opacity)
    _blend(colors, (before > 0) & (after == 0), LOST, opacity)
    _blend(colors, (before > 0) & (after > 0) & (before != after), SWAPPED, opacity)
    return colors.round().astype(np.uint8)


def changed_legend() -> str:
    """The colors of :func:`changed`."""
    return _legend({"gained": GAINED, "lost": LOST, "another class": SWAPPED})


def pictures(columns: Mapping[str, np.ndarray], caption: str = "") -> str:
    """Pictures, title -> (H, W, 3) uint8, in a row with titles and a caption."""
    cells = "".join(f"<div>{_text(title)}<br>{_image(_png(colors), title)}</div>" for title, colors in columns.items())
    return f'<figure><div class="row">{cells}</div>{_below(caption)}</figure>'


def curve(history: Sequence[Mapping[str, Any]], keys: Sequence[str], x: str = "epoch", caption: str = "") -> str:
    """A curve over `x` for each key of rows such as {"epoch": 1, "loss": 0.9}; missing values are skipped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(keys), 3.0), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        points = [(row[x], row[key]) for row in history if not _missing(row.get(key))]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker=".", color="#0072b2")
        axes.set_xlabel(_literal(x))
        axes.set_ylabel(_literal(key))
        axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    shown = _image(data.getvalue(), f"{', '.join(keys)} by {x}")
    return f"<figure>{shown}{_below(caption)}</figure>"


def scan_slices(
    image: Image,
    maps: Mapping[str, str | Path],
    task: Task,
    mapping: MapLabelsd | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Slices (n, C, H, W) of a scan as the network sees them, and (n, H, W) of label maps on its grid.

    Args:
        image: the scan.
        maps: name -> file; their values are class indices.
        task: geometry and intensities.
        mapping: of ids of a data set to class indices, for the maps of its keys; open voxels are shown as background.
    """
    keys = list(maps)
    data = build_preprocessing(task, labels=False)({"image": image} | {key: str(path) for key, path in maps.items()})
    steps: list[Any] = [
        LoadScand(keys, labels=True, wanted=mapping.map.wanted if mapping else None),
        EnsureChannelFirstd(keys),
    ]
    steps += [Orientationd(keys, axcodes="RAS", labels=RAS_LABELS), CheckSameGridd(keys)]
    data = Preprocessing([*steps, mapping] if mapping else steps)(data)
    grid = SliceGrid.from_volume(data["image"], data["image"].affine, task)
    every = range(grid.num_slices)
    labels = {key: grid.extract_labels(data[key], every).numpy() for key in keys}
    for key in map(str, mapping.keys) if mapping else ():
        labels[key][labels[key] >= OPEN] = 0
    return grid.extract(data["image"], every).numpy(), labels


def pick_slices(labels: np.ndarray, count: int = 3) -> list[int]:
    """At most `count` slices of (n, H, W) class indices, evenly spaced over those with foreground, else over all."""
    shown = np.flatnonzero(labels.reshape(len(labels), -1).any(1))
    shown = shown if len(shown) else np.arange(len(labels))
    places = (np.arange(min(count, len(shown))) + 0.5) * len(shown) / min(count, len(shown))
    return [int(shown[int(p)]) for p in places]


# ------------------------------------------------------------------------------------------------------------- helpers


def _png(colors: np.ndarray) -> bytes:
    from matplotlib.image import imsave

    data = io.BytesIO()
    imsave(data, np.ascontiguousarray(colors), format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return data.getvalue()


def _image(png: bytes, description: str) -> str:
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _below(caption: str) -> str:
    return f"<figcaption>{_text(caption)}</figcaption>" if caption else ""


def _legend(colors: Mapping[str, tuple[int, int, int]]) -> str:
    entries = (f'<span><i style="background: rgb{color}"></i>{_text(name)}</span>' for name, color in colors.items())
    return f'<p class="legend">{"".join(entries)}</p>'


def _gray(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) float in 0 ... 255."""
    image = np.asarray(image, float)
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or len(image) not in (1, 3):
        raise InputError(f"a picture is (H, W), (1, H, W) or (3, H, W), got {image.shape}")
    return 255 * np.clip(np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, -1), 0, 1)


def _blend(colors: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], opacity: float) -> None:
    colors[mask] = (1 - opacity) * colors[mask] + opacity * np.asarray(color, float)


def _check_size(colors: np.ndarray, labels: np.ndarray) -> None:
    if labels.shape != colors.shape[:2]:
        raise InputError(f"image ({colors.shape[0]} x {colors.shape[1]}) and labels {labels.shape} differ in size")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _literal(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(value: Any) -> str:
    if _missing(value):
        return "\u2013"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
