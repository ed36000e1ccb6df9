# SPDX-License-Identifier: Apache-2.0
"""segment_anything's own model around our encoders: the same masks, and a real scan segmented from boxes alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from segment_anything import SamPredictor

from samda.errors import WeightsError
from samda.models.sam_file import to_segment_anything
from samda.networks.backbones import ViTConfig

RIGHT_LUNG, LEFT_LUNG = 5, 6  # label ids of the scan's segmentation
WINDOW = (-1000.0, 400.0)  # HU


def test_the_same_masks_as_the_original(tiny_vit_config: ViTConfig, tiny_weights: Path, original_sam: Callable) -> None:
    original = original_sam(tiny_vit_config)
    original.load_state_dict(torch.load(tiny_weights, weights_only=True))
    ours = to_segment_anything(tiny_vit_config, tiny_weights)
    generator = torch.Generator().manual_seed(0)
    record = {"image": torch.rand(3, 48, 64, generator=generator) * 255, "original_size": (96, 128)}
    record["boxes"] = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    first, second = (sam([record], multimask_output=True)[0] for sam in (ours, original))
    for key in ("low_res_logits", "iou_predictions"):
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-4 * second[key].abs().max().item())
    assert first["masks"].shape == second["masks"].shape == (1, 3, 96, 128)


def test_weights_that_do_not_fit_are_refused(tiny_vit_config: ViTConfig, tiny_tinyvit_weights: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit test_vit"):
        to_segment_anything(tiny_vit_config, tiny_tinyvit_weights)


def test_boxes_alone_find_the_lungs_of_a_real_scan(vit_t_weights: Path) -> None:
    folder = Path(importlib.util.find_spec("slicerio").origin).parent / "data"
    scan, labels = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name)))
        for name in ("CTChest4.nrrd", "Segmentation.seg.nrrd")
    )
    index = int(np.isin(labels, (RIGHT_LUNG, LEFT_LUNG)).sum((1, 2)).argmax())
    gray = np.clip((scan[index] - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1) * 255
    predictor = SamPredictor(to_segment_anything("vit_t", vit_t_weights))
    predictor.set_image(np.repeat(gray.astype(np.uint8)[..., None], 3, -1))
    for label in (RIGHT_LUNG, LEFT_LUNG):
        truth = labels[index] == label
        rows, columns = np.nonzero(truth)
        box = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
        mask = predictor.predict(box=box, multimask_output=False)[0][0]
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
