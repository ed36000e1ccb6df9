# SPDX-License-Identifier: Apache-2.0
"""One case through the engine: what moves, what stays, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def test_smoke(make_adaptation, scans: Path) -> None:
    import time
    t=time.time()
    a = make_adaptation(guard={"skip_agreement": 2.0})
    r = a.adapt(scans / "images" / "case2.nii.gz")
    import json
    print(json.dumps(r.record, indent=1)); print(time.time()-t, np.bincount(r.labels.ravel()))
    assert 0
