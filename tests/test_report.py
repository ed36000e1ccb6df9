# SPDX-License-Identifier: Apache-2.0
"""Reports: what is shown, what is escaped, and that nothing is loaded or given away."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from samda import report
from samda.errors import InputError

VOID = {"meta", "img", "br", "i"}


class Document(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures_of(piece: str) -> list[np.ndarray]:
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', piece)
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(source)), format="png") for source in sources]


def whole_page() -> str:
    image = np.linspace(0, 1, 48 * 32).reshape(48, 32)
    label = np.zeros((48, 32), np.uint8)
    label[10:20, 5:15], label[30:40, 20:30] = 1, 2
    after = np.roll(label, 2, axis=0)
    painted = [report.paint(image, over) for over in (None, label, after)]
    columns = dict(zip(("image", "label", "prediction"), painted, strict=True))
    changes = {"before": painted[1], "after": painted[2], "changed": report.changed(image, label, after)}
    history = [{"epoch": e, "loss": 1 / e, "mean_dice": 0.5 if e > 1 else None} for e in (1, 2, 3)]
    sections = [
        report.section("Curve", [report.curve(history, ["loss", "mean_dice"], caption="loss & Dice")]),
        report.section(
            "Case 1", [report.legend(["background", "liver", "aorta"]), report.pictures(columns, "slice 7")]
        ),
        report.section("Changes", [report.changed_legend(), report.pictures(changes)]),
        report.section("Scores", [report.paragraph("per case"), report.table(["class", "Dice"], [["liver", 0.5]])]),
    ]
    return report.page("Liver", sections, {"seed": 3})


def test_a_page_is_whole_and_loads_nothing() -> None:
    text = whole_page()
    document = Document(text)
    names = [tag for tag, _ in document.tags]
    assert names.count("img") == 1 + 3 + 3 and names.count("section") == 4
    assert not {"script", "link", "iframe", "object"} & set(names)
    for tag, attributes in document.tags:
        assert not {"href", "onload", "onerror"} & set(attributes), tag
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    policy = [a["content"] for _, a in document.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert document.text.count("Research use only") == 2
    for word in ("loss & Dice", "slice 7", "per case", "seed: 3", "gained", "liver", "aorta"):
        assert word in document.text
    assert len(text) < 400_000


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & $\\frac{"


def test_all_text_is_escaped() -> None:
    colors = report.paint(np.zeros((8, 8)))
    text = report.page(
        EVIL,
        [
            report.section(EVIL, [report.paragraph(EVIL), report.table([EVIL], [[EVIL]], EVIL)]),
            report.pictures({EVIL: colors}, EVIL),
            report.curve([{EVIL: 1, "epoch": 1}], [EVIL], caption=EVIL),
            report.legend(["background", EVIL]),
        ],
        {EVIL: EVIL},
    )
    document = Document(text)
    names = [tag for tag, _ in document.tags]
    assert "script" not in names
    assert names.count("img") == 2
    assert document.text.count("<script>alert('x')</script>") == 13  # title and heading, ..., both in the footer
    assert all("onerror" not in attributes for _, attributes in document.tags)


def test_tables_shorten_numbers_and_mark_what_is_missing() -> None:
    text = report.table(["a"], [[0.123456, math.nan, None, 12, "x"]], "all")
    assert re.findall(r"<td>(.*?)</td>", text) == ["0.1235", "\u2013", "\u2013", "12", "x"]
    assert "<caption>all</caption>" in text


def test_paint() -> None:
    image = np.array([[0.0, 0.5, 1.0, 2.0]])
    assert report.paint(image)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3, [255] * 3]
    painted = report.paint(image, np.array([[1, 0, 2, 0]]))[0].tolist()
    # half of the class color, half of the image; (230, 159, 0) is class 1, (86, 180, 233) class 2
    assert painted == [[115, 80, 0], [128] * 3, [170, 218, 244], [255] * 3]
    colors = np.stack([np.full((2, 2), v) for v in (0.2, 0.4, 0.6)])
    assert report.paint(colors)[1, 1].tolist() == [51, 102, 153]


def test_changed() -> None:
    before, after = np.array([[0, 0, 1, 1, 2]]), np.array([[0, 1, 0, 1, 1]])
    marks = report.changed(np.zeros((1, 5)), before, after, opacity=1.0)[0].tolist()
    black = [0, 0, 0]
    assert marks == [black, [0, 158, 115], [213, 94, 0], black, [240, 228, 66]]
    for name, color in (("gained", marks[1]), ("lost", marks[2]), ("another class", marks[4])):
        assert f'rgb({", ".join(map(str, color))})"></i>{name}' in report.changed_legend()


def test_colors_of_many_classes_differ() -> None:
    colors = [report.class_color(k) for k in range(60)]
    assert len(set(colors)) == 60
    assert all(0 <= value <= 255 for color in colors for value in color)


def test_pictures_hold_what_was_painted() -> None:
    colors = np.zeros((20, 40, 3), np.uint8)
    colors[:, 20:] = (255, 0, 0)
    piece = report.pictures({"one": colors, "two": colors[::-1]})
    for found, expected in zip(pictures_of(piece), (colors, colors[::-1]), strict=True):
        assert np.array_equal((255 * found[..., :3]).round(), expected)
    assert piece.index("one") < piece.index("two")


def test_curves_are_drawn() -> None:
    (rising,) = pictures_of(report.curve([{"epoch": e, "loss": float(e)} for e in range(5)], ["loss"]))
    (falling,) = pictures_of(report.curve([{"epoch": e, "loss": float(-e)} for e in range(5)], ["loss"]))
    assert rising.shape == falling.shape
    assert not np.array_equal(rising, falling)


def test_slices_worth_showing() -> None:
    labels = np.zeros((20, 4, 4), np.uint8)
    labels[6:15, 1, 1] = 1
    assert report.pick_slices(labels, 3) == [7, 10, 13]
    assert report.pick_slices(labels[:8], 3) == [6, 7]
    assert report.pick_slices(np.zeros((9, 4, 4), np.uint8), 3) == [1, 4, 7]


def test_pages_are_written_in_one_step(tmp_path: Path) -> None:
    path = report.write_page(tmp_path / "report.html", report.page("t", []))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_refuses() -> None:
    with pytest.raises(InputError, match=r"\(2, 4, 4\)"):
        report.paint(np.zeros((2, 4, 4)))
    with pytest.raises(InputError, match="differ in size"):
        report.paint(np.zeros((4, 4)), np.zeros((4, 5), int))
