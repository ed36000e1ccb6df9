# SPDX-License-Identifier: Apache-2.0
"""SamSegmenter: images to class logits, on a frozen pre-trained SAM with a class head and adapters.

Its state dict holds only what is trained, and loads strictly: the frozen base is neither saved nor missed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from monai.data import MetaTensor
from segment_anything.modeling import PromptEncoder

from samda.adapters.adapter_file import load_adapters
from samda.adapters.attach import Adapters, attach, build_configs
from samda.adapters.base import changes_encoder, freeze, sites, trainable_parameters
from samda.adapters.sites import ChainSite, Site, SiteInfo
from samda.errors import UsageError, WeightsError, from_mapping, nearest
from samda.networks.attention import DerivedTensors
from samda.networks.backbones import BackboneConfig, backbone_config
from samda.networks.decoder import ClassDecoder, SamHeadConfig, grid_positions
from samda.networks.fingerprint import compute_fingerprint, response_of, same_response
from samda.networks.head import (
    EMBEDDING,
    IMAGE,
    TOKENS,
    UPSCALED,
    ClassHead,
    ClassHeadConfig,
    Level,
    Pyramid,
    map_levels,
)
from samda.networks.ops import upsample
from samda.networks.pyramid_head import PyramidHead, PyramidHeadConfig
from samda.networks.weights import BaseReport, check_published, fetch_weights, read_base
from samda.progress import phase

BASE_RESPONSE = "_extra_state"  # PyTorch's key
STRIDE = 16  # pixels of the image per embedding pixel
ADAPTERS = ".adapters."  # in names of tensors that belong to adapters
MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # SAM's, for intensities in [0, 1]
STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


class SamSegmenter(nn.Module):
    """Multi-class segmentation on SAM without prompts.

    `forward` maps images (B, C, H, W) in [0, 1] to class logits (B, K, H, W), background first. H and W are multiples
    of 16 and may differ. Stacks (B, C, H, W, D) are D such images each. Modules carry the names of SAM's files.

    The class head reads levels of the encoder's feature pyramid (`head="pyramid"`, :mod:`samda.networks.pyramid_head`),
    or is SAM's own (`head="sam"`): K mask tokens and hypernetworks that start as copies of SAM's first. SAM's decoder
    is part of the network only where the head reads it.

    Args:
        backbone: "vit_t", "vit_b", "vit_l", "vit_h", or the sizes of another encoder.
        num_classes: K, background included.
        in_channels: 1 (repeated to three), 2 (the third is their mean) or 3 (colors, or a slice between its neighbors,
            see `Task.context`).
        weights: "pretrained" fetches the published weights of the backbone, a path reads that file (an official SAM,
            MobileSAM or MedSAM file), None keeps random weights.
        adapters: names, or adapter name -> settings, see :func:`samda.adapters.build_configs`; attached after the base
            weights were loaded.
        adapter_file: an `adapter.safetensors` to load into the adapters and the class head.
        head: "sam", "pyramid", or a mapping {"type": one of these, settings}; see
            :class:`samda.networks.pyramid_head.PyramidHeadConfig`. The default is that of samda 0.1, whose configs and
            model folders do not name a head; `samda train` chooses "pyramid".
        checkpointing: training keeps what enters each block of the encoder and computes the rest again in the backward
            pass: less memory, more time, the same gradients.

    Raises:
        UsageError: an argument is out of range.
        WeightsError: the base weights are missing, damaged or of another backbone.
        AdapterError: an adapter cannot be attached or loaded.

    Example:
        >>> network = SamSegmenter("vit_t", num_classes=3, weights=None)
        >>> network(torch.zeros(1, 1, 64, 96)).shape
        torch.Size([1, 3, 64, 96])
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | BackboneConfig = "vit_t",
        num_classes: int = 2,
        in_channels: int = 1,
        weights: str | Path | None = "pretrained",
        adapters: Adapters | None = None,
        adapter_file: str | Path | None = None,
        checkpointing: bool = False,
        head: str | Mapping[str, Any] | ClassHeadConfig = "sam",
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 2:
            raise UsageError(f"num_classes must be at least 2 (background and one more), got {num_classes!r}")
        if in_channels not in (1, 2, 3):
            raise UsageError(f"in_channels must be 1, 2 or 3, got {in_channels!r}")
        self.config = backbone_config(backbone)
        if weights == "pretrained":
            check_published(self.config)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.full_state_dict = False  # True: `state_dict` holds the base, too
        self.base_report: BaseReport | None = None  # which file the base came from
        self._fingerprint: dict[str, Any] | None = None
        levels = self.config.levels()
        decoded = bool(adapters) and trains_decoder(adapters)  # type: ignore[arg-type]
        self.head_config = head_config(head).complete(levels, self.config.head_levels, decoded)
        # what a file fills needs no initialization: built without memory, and no random number is drawn
        with torch.device("meta") if weights is not None else contextlib.nullcontext():
            self.image_encoder = self.config.build()
            self.image_encoder.input = ChainSite(SiteInfo("encoder.input", "input", "input", 0, in_channels))
            self.prompt_encoder: PromptEncoder | None = None
            self.mask_decoder: ClassDecoder | None = None
            if self.head_config.reads_decoder:
                self.prompt_encoder, self.mask_decoder = self._build_decoder()
        if self.head_config.type != "sam":
            channels = self.config.out_channels // 8
            levels |= {IMAGE: Level(in_channels, 1), UPSCALED: Level(channels, 4)}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.class_head = self.head_config.build(num_classes, levels)
        own = [name for name in self.head.reads if name != UPSCALED]
        own += [EMBEDDING] if self.mask_decoder is not None else []
        self.levels = tuple(dict.fromkeys(own))  # that :meth:`encode` hands out
        self.image_encoder.checkpointing = checkpointing  # type: ignore[assignment]
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(-1, 1, 1), persistent=False)
        self._positions = DerivedTensors()
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_pre_hook(_look_for_base)
        self.register_load_state_dict_post_hook(_excuse_base)
        self.eval()
        if weights is not None:
            self.load_base(fetch_weights(self.config.name) if weights == "pretrained" else weights)
        freeze(self)
        if adapters:
            attach(self, adapters)
        if adapter_file is not None:
            load_adapters(self, adapter_file)

    def _build_decoder(self) -> tuple[PromptEncoder, ClassDecoder]:
        side, channels = self.config.image_size, self.config.out_channels
        grid = (side // STRIDE, side // STRIDE)
        own = self.head_config.build(self.num_classes, self.config.levels()) if self.head_config.type == "sam" else None
        decoder = ClassDecoder(self.num_classes, channels, own)  # type: ignore[arg-type]
        return PromptEncoder(channels, grid, (side, side), mask_in_chans=16), decoder

    @property
    def head(self) -> ClassHead:
        """The class head."""
        if "class_head" in self._modules:
            return self.class_head
        assert self.mask_decoder is not None
        return self.mask_decoder.output_hypernetworks_mlps

    def load_base(self, path: str | Path) -> BaseReport:
        """Load base weights and start the class head from them; nothing is changed where that fails.

        Works on a network on any device, "meta" included. Errors: :func:`samda.networks.weights.read_base`.
        """
        own = {name: t for name, t in self.full_state().items() if not name.startswith("class_head.")}
        state, self.base_report = read_base(path, self.config, self.num_classes, own)
        self.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in own.values()))
        self._fingerprint = None
        self._fingerprint = self.fingerprint()  # before anything is trained: baselines change the base
        return self.base_report

    def full_state(self) -> dict[str, torch.Tensor]:
        """The state dict of base and class head, without adapters."""
        before, self.full_state_dict = self.full_state_dict, True
        try:
            state = self.state_dict()
            return {key: tensor for key, tensor in state.items() if ADAPTERS not in key and key != BASE_RESPONSE}
        finally:
            self.full_state_dict = before

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the base weights, see :mod:`samda.networks.fingerprint`; plain values for JSON."""
        if self._fingerprint is None:
            return compute_fingerprint(self)
        return copy.deepcopy(self._fingerprint)

    def get_extra_state(self) -> torch.Tensor:
        """The base's answer to the probe, as part of the state dict; empty where the base came from no file."""
        return torch.empty(0) if self._fingerprint is None else response_of(self._fingerprint)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse a state dict that was trained on other base weights, whoever loads it."""
        own = self.get_extra_state()
        if len(own) and len(state) and not same_response(own, state.cpu()):
            name = self.base_report.path.name if self.base_report else "others"
            raise WeightsError(
                f"other base weights: the parameters were not trained on those of this network ({name}); give the file "
                "that they were trained on as weights"
            )

    def forward(self, x: torch.Tensor | Pyramid) -> torch.Tensor:
        """Class logits at the size of the image.

        Args:
            x: images (B, C, H, W) or stacks of them (B, C, H, W, D) in [0, 1], or a pyramid of :meth:`encode`.

        Returns:
            (B, K, H, W), of stacks (B, K, H, W, D).
        """
        if isinstance(x, dict):
            return self.upsampled(self.decode(x))
        if x.ndim == 5:
            return torch.stack([self(image) for image in x.unbind(-1)], -1)
        return self.upsampled(self.decode(self.encode(x)))

    def upsampled(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of :meth:`decode` at the size of the image."""
        # single precision from here: class scores of many windows and slices are summed later
        return upsample(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.head.stride)

    @phase("encoding")
    def encode(self, image: torch.Tensor) -> Pyramid:
        """Images (B, C, H, W) in [0, 1] -> the levels that :meth:`decode` needs."""
        if isinstance(image, MetaTensor):
            image = image.as_tensor()  # it would carry its metadata through every operation
        image = self.image_encoder.input(image)  # type: ignore[operator]
        inner = [name for name in self.levels if name != IMAGE]
        pyramid = self.image_encoder.pyramid(self.normalize(image), inner)  # type: ignore[operator]
        return {name: image if name == IMAGE else pyramid[name] for name in self.levels}

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> what the encoder takes: three channels (B, 3, H, W) by SAM's mean and std.

        Raises:
            UsageError: another number of channels, or sides that are no multiples of 16.
        """
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise UsageError(f"images must be (B, {self.in_channels}, H, W), got {tuple(image.shape)}")
        if image.shape[2] % STRIDE or image.shape[3] % STRIDE:
            raise UsageError(f"H and W must be multiples of {STRIDE}, got {tuple(image.shape[2:])}; pad the images")
        if self.in_channels == 2:
            image = torch.cat([image, image.mean(dim=1, keepdim=True)], dim=1)
        return (image.expand(-1, 3, -1, -1) - self.pixel_mean) / self.pixel_std

    @phase("head")
    def decode(self, pyramid: Pyramid) -> torch.Tensor:
        """Levels of :meth:`encode`, also in half precision -> class logits at the stride of the head."""
        missing = [name for name in self.levels if name not in pyramid]
        if missing:
            read = ", ".join(self.levels)
            raise UsageError(f"the pyramid lacks the level {missing[0]!r}; give what encode returns ({read})")
        pyramid = {name: pyramid[name].to(self.pixel_mean.dtype) for name in self.levels}
        if self.mask_decoder is not None:
            tokens, upscaled = self.mask_decoder(pyramid[EMBEDDING], *self.prompts(pyramid[EMBEDDING]))
            pyramid |= {TOKENS: tokens, UPSCALED: upscaled}
        return self.head(pyramid)

    @torch.no_grad()
    def fit_closed_form(
        self, batches: Iterable[tuple[torch.Tensor | Pyramid, torch.Tensor]], counts: torch.Tensor
    ) -> None:
        """Start the class head without gradient steps, from one pass over labeled slices.

        Args:
            batches: images or pyramids, with labels (B, 1, H, W) of class indices.
            counts: (K,) pixels of each class in these labels.

        Raises:
            InputError: no foreground, no batch, or features that are not finite.
            UsageError: the head has no such start.
        """
        start, device = self.head.closed_form(counts), self.pixel_mean.device
        for inputs, labels in batches:
            pyramid = inputs if isinstance(inputs, dict) else self.encode(inputs.to(device))
            start.add(map_levels(lambda level: level.to(device), pyramid), labels[:, 0].to(device))
        start.finish()

    def prompts(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What SAM adds without prompts: positions (1, 256, h, w) and the "no mask" vector (1, 256, 1, 1)."""
        assert self.prompt_encoder is not None
        frequencies = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        no_mask = self.prompt_encoder.no_mask_embed.weight
        size = (embedding.shape[2], embedding.shape[3])
        positions = self._positions(frequencies, size, lambda: grid_positions(frequencies, size))
        return positions.to(no_mask.dtype), no_mask.view(1, -1, 1, 1)

    def head_params(self) -> list[str]:
        """Full names of the class head's parameters (a fresh list)."""
        tokens = ["mask_decoder.mask_tokens.weight"] if self.mask_decoder is not None else []
        return tokens + [
            f"{self._head_path}.{name}" for name, _ in self.head.named_parameters() if ADAPTERS not in name
        ]

    def head_buffers(self) -> list[str]:
        """Full names of the class head's persistent buffers: saved with its parameters."""
        return [f"{self._head_path}.{name}" for name, _ in self.head.named_buffers() if ADAPTERS not in name]

    @property
    def head_trained(self) -> bool:
        """Has the class head left its initial state?"""
        tokens = None if self.mask_decoder is None else self.mask_decoder.mask_tokens.weight
        return self.head.trained or (tokens is not None and bool((tokens != tokens[0]).any()))

    @property
    def _head_path(self) -> str:
        return "class_head" if "class_head" in self._modules else "mask_decoder.output_hypernetworks_mlps"

    @property
    def feature_modules(self) -> list[nn.Module]:
        """Modules whose outputs are the features that adaptation aligns, see `samda.source_statistics`."""
        if isinstance(self.head, PyramidHead):
            return [self.head.features]
        assert self.mask_decoder is not None
        return list(self.mask_decoder.transformer.sites)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The two parts that adapters distinguish, see :mod:`samda.adapters.base`."""
        parts = {"encoder": self.image_encoder, "decoder": self.mask_decoder}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def encoder_adapted(self) -> bool:
        """Does the embedding depend on anything that is trained? Then it cannot be cached."""
        return changes_encoder(self)

    def train(self, mode: bool = True) -> SamSegmenter:
        """Switch adapters and class head; the base stays in evaluation (batch norms keep their statistics)."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, Site):
                module.adapters.train(mode)
        self.head.train(mode)
        if self.mask_decoder is not None:
            self.mask_decoder.mask_tokens.train(mode)
        return self

    def extra_repr(self) -> str:
        sizes = f"num_classes={self.num_classes}, in_channels={self.in_channels}"
        return f"backbone={self.config.name}, {sizes}, head={self.head.name}"


HEADS: dict[str, type[ClassHeadConfig]] = {kind.type: kind for kind in (PyramidHeadConfig, SamHeadConfig)}


def head_config(head: str | Mapping[str, Any] | ClassHeadConfig) -> ClassHeadConfig:
    """The settings of a class head from its name or a mapping {"type": name, settings}; a config passes through."""
    if isinstance(head, ClassHeadConfig):
        return head
    values = dict(head) if isinstance(head, Mapping) else {"type": head}
    kind = values.pop("type", "none")
    if not isinstance(kind, str) or kind not in HEADS:
        raise UsageError(f"there is no class head {kind!r}; {nearest(str(kind), HEADS)}")
    return from_mapping(HEADS[kind], values, f"head {kind!r}")


def trains_decoder(adapters: Adapters) -> bool:
    """Do these adapters change SAM's mask decoder, or train it?"""
    with torch.device("meta"):
        decoder = ClassDecoder(num_classes=2)
    sample = nn.ModuleDict({"mask_decoder": decoder})
    sample.parts = {"encoder": nn.ModuleList(), "decoder": decoder}  # type: ignore[assignment]
    places = [site.info for site in sites(decoder).values()]
    configs = build_configs(adapters).values()
    return any(config.base_params(sample) or any(map(config.targets, places)) for config in configs)


def _base_keys(network: SamSegmenter) -> set[str]:
    """Keys of the full state dict that belong to the frozen base: all but adapters and what is trained."""
    own = set(trainable_parameters(network)) | set(network.head_buffers())
    for path, module in network.named_modules():
        if isinstance(module, Site):
            own |= {f"{path}.adapters.{name}" for name in module.adapters.state_dict()}
    tensors = [name for name, _ in network.named_parameters()] + [name for name, _ in network.named_buffers()]
    return {name for name in tensors if name not in own}


def _drop_base(network: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if not network.full_state_dict:
        for name in _base_keys(network):
            state.pop(prefix + name, None)


def _look_for_base(network: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict with none of the base's tensors leaves the base as it is; one with some of them must have all."""
    names = {prefix + name for name in _base_keys(network)}
    adapter_only = names.isdisjoint(state)
    network._excused = (names if adapter_only else set()) | {prefix + BASE_RESPONSE}  # older files have none
    if not adapter_only:
        network._fingerprint = None  # of the previous base


def _excuse_base(network: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in network._excused]
    network._excused = set()
