# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a training goes on from: it holds everything, so a resumed run equals one that never stopped."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from samda.errors import InputError, UsageError
from samda.io import try_writing
from samda.processes import broadcast, is_main, place

logger = logging.getLogger(__name__)

LAST = "last.pt"
MODEL = "adapter.json"  # of a finished training, whose last.pt may have been removed to save room


def check_model_folder(folder: str | Path, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that cannot hold the training, before hours of work.

    Args:
        folder: where the model goes; made later, with the folders above it.
        resume: go on with the training there.
        overwrite: replace it.

    Raises:
        UsageError: it is a file, lies in one, or cannot be written; it holds a training and neither `resume` nor
            `overwrite` is given, or both are; there is a finished model to resume, but no last.pt.
    """
    folder = Path(folder)
    if resume and overwrite:
        raise UsageError("resume and overwrite exclude each other; choose one")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UsageError(f"output {folder} cannot be made, {place} is a file; give a folder")
    try:
        try_writing(place)
    except OSError as error:
        raise UsageError(f"nothing can be written to {place} ({error.strerror}); choose another output") from error
    if overwrite:
        return
    if (folder / LAST).exists():
        if not resume:
            raise UsageError(f"{folder} already holds a training; resume it, overwrite it or choose another folder")
    elif (folder / MODEL).exists():
        why = f"there is no {LAST} to resume from" if resume else "it would be lost"
        raise UsageError(f"{folder} already holds a model, and {why}; overwrite it or choose another folder")


class Checkpoint:
    """`folder`/last.pt: the state of `objects`, the epoch, all random generators and, for comparison, `settings`.

    Tensors and plain values only. It serves one's own resume and is no part of the model. Of several processes the
    first reads and writes it, so it serves any number of them.

    Args:
        folder: where last.pt lies.
        objects: name -> object with `state_dict` and `load_state_dict` (network, optimizer, schedule, record).
        settings: what must not change between start and resume.
        resume: go on from last.pt; where there is none, the training starts anew and says so.
        overwrite: replace the training that `folder` holds instead of refusing to.

    Raises:
        UsageError: see :func:`check_model_folder`.
    """

    def __init__(
        self,
        folder: str | Path,
        objects: Mapping[str, Any],
        settings: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(folder) / LAST
        self.objects, self.settings = dict(objects), dict(settings)
        self.resume = resume
        check_model_folder(folder, resume, overwrite)
        if resume and not self.path.exists():
            logger.warning("nothing to resume in %s: starting at the first epoch", self.path.parent)

    def save(self, engine: Engine) -> None:
        """Write last.pt under a temporary name (always the same: a killed run leaves no litter), then rename it.

        Raises:
            InputError: there is no room for it; the one before stays.
        """
        if not is_main():
            return
        state: dict[str, Any] = {name: thing.state_dict() for name, thing in self.objects.items()}
        state |= {"epoch": engine.state.epoch, "settings": self.settings, "random": _random_state()}
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(".last.pt.tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)  # half a file on a full disk
            if isinstance(error, OSError) or "inline_container" in str(error):  # where PyTorch writes
                raise InputError(
                    f"{self.path} cannot be written ({_reason(error)}); make room, and go on with resume"
                ) from error
            raise

    def load(self, engine: Engine) -> None:
        """Put everything back as last.pt has it.

        Raises:
            InputError: the file is damaged.
            UsageError: a setting has changed since.
        """
        state = broadcast(self._read() if is_main() else {})
        for key, value in self.settings.items():
            before = state["settings"].get(key)
            if before != value:
                raise UsageError(f"resume: {key} was {before!r} and is now {value!r}; keep it or use another folder")
        for name, thing in self.objects.items():
            thing.load_state_dict(state[name])
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        _set_random_state(state["random"])
        logger.info("resumed after epoch %d", state["epoch"])

    def _read(self) -> dict[str, Any]:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{self.path} cannot be read ({error}); train anew with overwrite") from error


class Resume:
    """At the start, load the checkpoint or, with `overwrite`, remove that of another training. Attach it first."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if not self.checkpoint.resume:
            if is_main():
                self.checkpoint.path.unlink(missing_ok=True)
        elif broadcast(self.checkpoint.path.exists()):
            self.checkpoint.load(engine)


class SaveCheckpoint:
    """Save the checkpoint every `interval` epochs and at the end. Attach it last, when all of an epoch is done."""

    def __init__(self, checkpoint: Checkpoint, interval: int = 1) -> None:
        if interval < 1:
            raise UsageError(f"checkpoint_interval must be at least 1 epoch, got {interval}")
        self.checkpoint, self.interval = checkpoint, interval
        self._saved = 0  # epoch

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.epoch != self._saved:
            self.checkpoint.save(engine)
            self._saved = engine.state.epoch


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or "is the disk full?"


def _random_state() -> dict[str, Any]:
    """Every global generator, as tensors and plain values."""
    kind, keys, *numbers = np.random.get_state()  # noqa: NPY002 - the generator that libraries use
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *numbers],
        "python": list(random.getstate()),
    }


def _cuda_state() -> list[torch.Tensor]:
    """Of all GPUs, or of the one that a process among several has for itself."""
    if not torch.cuda.is_available():
        return []
    return torch.cuda.get_rng_state_all() if place()[1] == 1 else [torch.cuda.get_rng_state()]


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        places = range(torch.cuda.device_count()) if place()[1] == 1 else [torch.cuda.current_device()]
        for device, values in zip(places, state["cuda"], strict=False):  # the GPUs may be others than before
            torch.cuda.set_rng_state(values, device)
    kind, keys, *numbers = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *numbers))  # noqa: NPY002
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
