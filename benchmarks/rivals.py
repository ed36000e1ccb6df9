# SPDX-License-Identifier: Apache-2.0
"""The code that samda is measured against, built from the packages it came from."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from timm.models.tiny_vit import MBConv, PatchEmbed, PatchMerging, TinyVitBlock

from samda.models.sam_file import to_segment_anything
from samda.networks.tiny_vit import TinyViT


class OriginalTinyViT(nn.Module):
    """MobileSAM's encoder of timm's own blocks, with the weights of ours: NCHW maps, padded windows, batch norms apart.

    Args:
        ours: the encoder whose weights it takes.
        image_size: side in pixels of the images that SamPredictor makes.
    """

    def __init__(self, ours: TinyViT, image_size: int) -> None:
        super().__init__()
        self.img_size = image_size
        gelu = nn.GELU
        self.patch_embed = PatchEmbed(3, ours.patch_embed.conv2.conv.out_channels, gelu)
        width = self.patch_embed.conv2.conv.out_channels
        self.conv_blocks = nn.Sequential(*(MBConv(width, width, 4.0, gelu, 0.0) for _ in ours.conv_blocks))
        self.stages = nn.ModuleList()
        for stage in ours.stages:
            merging, blocks = stage.downsample, stage.blocks
            parts = nn.Module()
            parts.downsample = PatchMerging(merging.conv1.conv.in_channels, merging.conv1.conv.out_channels, gelu)
            parts.downsample.conv2.conv.stride = merging.conv2.conv.stride
            dim = merging.conv1.conv.out_channels
            parts.blocks = nn.ModuleList(TinyVitBlock(dim, b.attn.num_heads, b.attn.window) for b in blocks)
            self.stages.append(parts)
        self.neck = ours.neck
        self.load_state_dict(ours.state_dict())

    def train(self, mode: bool = True) -> OriginalTinyViT:
        self.training = mode
        for child in self.modules():  # not by `train`: that of timm's attention returns nothing
            child.training = False
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 256, H / 16, W / 16)."""
        x = self.conv_blocks(self.patch_embed(x))
        for stage in self.stages:
            x = stage.downsample(x).permute(0, 2, 3, 1)
            for block in stage.blocks:
                x = block(x)
            x = x.permute(0, 3, 1, 2)
        return self.neck(x)


def sam_with_original_encoder(image_size: int) -> Sam:
    """segment_anything's `Sam` with the original TinyViT and published weights, for images of `image_size` pixels."""
    sam = to_segment_anything("vit_t")
    sam.image_encoder = OriginalTinyViT(sam.image_encoder, image_size).train(False)
    # prompts are given in the frame that the encoder sees
    grid = image_size // 16
    sam.prompt_encoder.input_image_size = (image_size, image_size)
    sam.prompt_encoder.image_embedding_size = (grid, grid)
    sam.prompt_encoder.mask_input_size = (4 * grid, 4 * grid)
    return sam.requires_grad_(False)


class SliceBySlice:
    """A volume through `SamPredictor`, one slice at a time: the path that SAM's own code offers.

    As favorable to it as its interface allows: the encoder gets images of samda's size instead of 1024 pixels, all
    classes are asked for in one call (a box each, the same boxes in every slice: nobody clicks, and no time is spent on
    finding them), one mask per box instead of three, and masks stay soft maps until the largest is taken. What remains
    is the interface itself: one image at a time as 8-bit RGB, and a run of the mask decoder for each class.

    Args:
        sam: the model.
        classes: foreground classes.
        amp: "bf16" or None.
        device: of the model.
    """

    def __init__(self, sam: Sam, classes: int, amp: str | None = None, device: str = "cpu") -> None:
        self.predictor, self.classes, self.amp, self.device = SamPredictor(sam), classes, amp, device

    @torch.no_grad()
    def __call__(self, volume: torch.Tensor) -> torch.Tensor:
        """(X, Y, Z) in [0, 1] -> labels (X, Y, Z) uint8."""
        pixels = (volume * 255).round().to(torch.uint8).permute(2, 1, 0).flip(1, 2)  # as samda lays its slices
        labels = torch.empty(pixels.shape, dtype=torch.uint8)
        height, width = pixels.shape[1:]
        side = torch.tensor([width, height, width, height])
        shares = torch.linspace(0.1, 0.5, self.classes)[:, None]
        boxes = torch.cat([shares, shares, shares + 0.4, shares + 0.4], 1) * side
        boxes = self.predictor.transform.apply_boxes_torch(boxes, (height, width)).to(self.device)
        for k, plane in enumerate(pixels):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.amp == "bf16"):
                self.predictor.set_image(plane[..., None].expand(-1, -1, 3).numpy())
                maps, _, _ = self.predictor.predict_torch(None, None, boxes, multimask_output=False, return_logits=True)
            best = maps[:, 0].max(0)
            labels[k] = torch.where(best.values > 0, best.indices + 1, 0).to("cpu", torch.uint8)
        return labels.flip(1, 2).permute(2, 1, 0)


class RebuiltSalt(nn.Module):
    """SALT by the published formula: the weight is rebuilt from U, Sigma' and V in every forward.

    Args:
        salt: our adapter, whose values it takes.
        bias: of the layer, where the call gives none.
    """

    def __init__(self, salt: nn.Module, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.u, self.s, self.vt, self.bias, self.r = salt.u, salt.s, salt.vt, bias, salt.r
        self.alpha = nn.Parameter(1 + salt.scale.detach().clone())
        self.beta = nn.Parameter(salt.shift.detach().clone())
        self.left, self.right = (nn.Parameter(t.detach().clone()) for t in (salt.left, salt.right))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        top = torch.diag(self.alpha * self.s[: self.r] + self.beta)
        tail = torch.diag(self.s[self.r :]) + self.left @ self.right
        bias = self.bias if bias is None else bias
        return F.linear(x, self.u @ torch.block_diag(top, tail).relu() @ self.vt, bias)


def written_out_attention(q, k, v, table_h, table_w, formulation=None) -> torch.Tensor:
    """The full attention matrix in memory, as segment_anything computes it; arguments as `relative_attention`."""
    height, width = len(table_h), len(table_w)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    grid = q.unflatten(2, (height, width))
    rows = torch.einsum("nhyxc,ykc->nhyxk", grid, table_h.to(q.dtype))
    columns = torch.einsum("nhyxc,xkc->nhyxk", grid, table_w.to(q.dtype))
    bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
    return (weights + bias).softmax(-1) @ v
