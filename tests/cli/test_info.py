# SPDX-License-Identifier: Apache-2.0
"""`samda info`: parameter counts against the formulas of the papers, and against README and docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samda.cli import main as cli
from samda.cli.info import describe_package

ROOT = Path(__file__).resolve().parents[2]

# blocks, width of each group of equal encoder blocks; MLP is four times as wide
WIDTHS = {
    "vit_t": [(2, 128), (6, 160), (2, 320)],
    "vit_b": [(12, 768)],
    "vit_l": [(24, 1024)],
    "vit_h": [(32, 1280)],
}


def salt(d: int, rank: int) -> int:
    """Of a block: attention keeps all but 8 singular values (qkv, proj), the MLP 50 (fc1, fc2)."""
    return 2 * (2 * (d - 8) + 2 * rank * 8) + 2 * (2 * 50 + 2 * rank * (d - 50))


def lora(d: int, rank: int) -> int:
    """Of a block: qkv, proj, fc1, fc2."""
    return rank * ((d + 3 * d) + (d + d) + 2 * (d + 4 * d))


def lka(d: int, width: int, k: int) -> int:
    """Of a block: two modules with biases."""
    return 2 * (2 * d * width + width * k * k + 2 * width + d)


def dka(d: int, width: int) -> int:
    """Of a block: two modules without biases."""
    return 2 * (2 * d * width + width * (51 * 51 + 5 * 5))


SAM_DA = 2 * (3 * (256 * 128 + 128) + (128 * 256 + 256) + 256 * 256) + 2 * 2 * 256 + 2
FORMULAS = {
    "salt": lambda d: salt(d, 4),
    "salt_256": lambda d: salt(d, 256),
    "lora": lambda d: lora(d, 4),
    "lka": lambda d: lka(d, 8, 7),
    "dka": lambda d: dka(d, 16),
    "dka_192": lambda d: dka(d, 192),
}
PUBLISHED = {  # worked out by hand from the papers
    ("salt", "vit_b"): 178_272,
    ("salt", "vit_l"): 479_424,
    ("salt", "vit_h"): 803_072,
    ("salt", "vit_t"): 32_080,
    ("salt_256", "vit_b"): 8_959_968,
    ("lka", "vit_b"): 323_136,
    ("lka", "vit_t"): 71_264,
    ("lka", "vit_h"): 1_418_752,
    ("dka", "vit_b"): 1_598_208,
    ("dka", "vit_t"): 959_104,
    ("dka_192", "vit_b"): 19_178_496,
    ("sam_da", "vit_b"): 395_522,
    ("sam_da", "vit_h"): 395_522,
    ("flagship", "vit_b"): 178_272 + 1_598_208 + 395_522,
    ("head", "vit_b"): 0,
}


@pytest.fixture(scope="module")
def facts() -> dict:
    return describe_package()


@pytest.mark.parametrize(("adapter", "backbone"), PUBLISHED)
def test_published_counts(adapter: str, backbone: str, facts: dict) -> None:
    assert facts["adapters"][adapter]["parameters"][backbone] == PUBLISHED[adapter, backbone]


@pytest.mark.parametrize("adapter", FORMULAS)
def test_counts_follow_the_formulas(adapter: str, facts: dict) -> None:
    for backbone, groups in WIDTHS.items():
        expected = sum(blocks * FORMULAS[adapter](d) for blocks, d in groups)
        if (adapter, backbone) != ("salt_256", "vit_t"):  # there the MLP's rank is cut to fit
            assert facts["adapters"][adapter]["parameters"][backbone] == expected


def test_sam_da_and_head(facts: dict) -> None:
    assert set(facts["adapters"]["sam_da"]["parameters"].values()) == {SAM_DA}
    assert facts["head_per_class"] == 256 + 2 * (256 * 256 + 256) + (256 * 32 + 32)
    assert set(facts["pyramid_head"]) == set(facts["backbones"])
    assert all(100_000 < count < 500_000 for count in facts["pyramid_head"].values())
    once = {name for name, entry in facts["adapters"].items() if entry["encoded_once"]}
    assert once == {"ssf", "sam_da", "head", "decoder"}


def test_full_trains_everything(facts: dict) -> None:
    for backbone, entry in facts["backbones"].items():
        assert facts["adapters"]["full"]["parameters"][backbone] == entry["parameters"]


def test_json_and_table_say_the_same(facts: dict, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_readme_shows_these_counts(facts: dict) -> None:
    expected = markdown(facts)
    assert expected in (ROOT / "README.md").read_text(encoding="utf-8"), f"put this into README.md:\n{expected}"


def markdown(facts: dict) -> str:
    """The table of README.md."""
    backbones = list(facts["backbones"])
    baselines = ["bottleneck", "head", "decoder", "full"]
    names = [*(name for name in facts["adapters"] if name not in baselines), *baselines]
    rows = [[f"`{n}`", *(f"{facts['adapters'][n]['parameters'][b]:,}" for b in backbones)] for n in names]
    head = ["adapter", *(f"`{b}`" for b in backbones)]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---", *["--:"] * len(backbones)], *rows]]
    return "\n".join(lines)
