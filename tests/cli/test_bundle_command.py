# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from samda.cli.main import main
from samda.io import packaged


def test_the_bundle_is_found_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = packaged("bundles", "sam_segmentation")
    assert main(["bundle", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == source
    copy = tmp_path / "a" / "copy"
    assert main(["bundle", "-o", str(copy)]) == 0
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".py"]
    assert len(files) == 9 and all((copy / file).read_bytes() == (source / file).read_bytes() for file in files)
    assert main(["bundle", "-o", str(copy)]) == 2
