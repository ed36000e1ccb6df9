# SPDX-License-Identifier: Apache-2.0
"""The parts of `samda erf`; tests/cli/test_commands.py runs the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samda.adapters import attach
from samda.cli.erf import print_fields, unadapted
from samda.errors import UsageError
from samda.networks.segmenter import SamSegmenter
from samda.receptive_field import ErfMap, ModelField, draw_fields, write_fields


@pytest.fixture
def fields(tiny_segmenter: SamSegmenter) -> list[ModelField]:
    """Two models with maps that are known: one spread evenly, one concentrated."""
    spread, middle = np.ones((101, 101)), np.zeros((101, 101))
    middle[50, 50] = 4.0
    first = {"block": ErfMap(spread, 3, 1), "neck": ErfMap(middle, 4, 0)}
    second = {"block": ErfMap(middle, 4, 0), "neck": ErfMap(1e-6 * spread, 4, 0)}
    name = "a folder with a name of $ more than thirty-six/letters"
    return [
        ModelField.of(tiny_segmenter, first, name, "source"),
        ModelField.of(tiny_segmenter, second, "base", None),
    ]


def test_the_baseline_is_the_base_even_where_a_training_changed_it(
    make_segmenter: Callable[..., SamSegmenter],
) -> None:
    network, original = make_segmenter(in_channels=2), make_segmenter(in_channels=2)
    attach(network, "full")
    with torch.no_grad():
        network.image_encoder.blocks[0].mlp.lin1.weight.mul_(1.5)
    image = torch.rand(1, 2, 64, 64)
    expected = original.encode(image)["embedding"]
    assert not torch.allclose(network.encode(image)["embedding"], expected, atol=1e-3)
    assert torch.equal(unadapted(network).encode(image)["embedding"], expected)


def test_table(fields: list[ModelField], capsys: pytest.CaptureFixture) -> None:
    print_fields(fields)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-8:] == ["20", "%", "30", "%", "50", "%", "99", "%"]
    assert rows[0].split("log")[1].split() == ["47", "(21.65", "%)", "57", "(31.85", "%)", "73", "(52.24", "%)", "-"]
    assert rows[4].startswith(f"{fields[0].name}, neck, mass") and rows[4].count(" 3 (0.09 %)") == 4
    assert len(rows) == 2 * 2 * 3


def test_what_is_written(fields: list[ModelField], tmp_path: Path) -> None:
    values = fields[0].to_dict()
    assert values["taps"]["block"]["areas"]["mass"]["0.99"] == {"side": None, "ratio": None}
    assert (values["taps"]["block"]["images"], values["taps"]["block"]["skipped"]) == (3, 1)
    write_fields(tmp_path / "fields", fields, {"images": 4})
    with pytest.raises(UsageError, match="fields"):
        write_fields(tmp_path / "fields", fields, {"images": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["fields"]  # nothing half done lies beside it


def test_panels_share_one_scale(fields: list[ModelField]) -> None:
    panels = [axes for axes in draw_fields(fields).axes if axes.images]
    assert len(panels) == 4
    limits = {axes.images[0].get_clim() for axes in panels}
    assert limits == {(0, np.log10(1001))}
    flat = [axes.images[0].get_array() for axes in (panels[0], panels[3])]
    assert np.allclose(flat[0], flat[1]) and np.allclose(flat[0], np.log10(1001))  # each over its own largest
    assert panels[0].get_title().startswith("...") and panels[0].get_title().endswith("half within 73 px")
