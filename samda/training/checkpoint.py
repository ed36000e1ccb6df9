# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a training: it holds everything, so a resumed run equals one that never stopped.

ignite's own `Checkpoint` is not used: it neither keeps the random generators, compares settings, nor reads on one
process and sends to the others.
"""

from __future__ import annotations

import logging
import random
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from samda.errors import InputError, UsageError, disk_trouble
from samda.io import packaged, replacing, save_tensors
from samda.networks.fingerprint import check_fingerprint
from samda.output import OutputFolder, hold_output, output_of, try_writing
from samda.processes import broadcast, is_main, launched, rank_and_world
from samda.training.config_check import decoded, is_plain, own_settings
from samda.training.pace import refuse_other_unit
from samda.version import __version__

logger = logging.getLogger(__name__)

LAST = "last.pt"
MODEL = "adapter.json"  # of a finished training, whose last.pt may have been removed to save room


def check_model_folder(folder: str | Path, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written, or that holds what neither `resume` nor `overwrite` covers.

    Called before hours of work; the folder and those above it are made later. Files of others are never covered.
    """
    folder = Path(folder)
    if resume and overwrite:
        raise UsageError("resume and overwrite exclude each other; choose one")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"output {folder} cannot be made, {existing} is a file; give a folder")
    try:
        try_writing(existing)
    except OSError as error:
        raise UsageError(f"nothing can be written to {existing} ({error.strerror}); choose another output") from error
    output = OutputFolder(folder)
    resumed = [LAST] if output.manifest.exists() else [LAST, "history.json"]  # a resume checks the first itself
    output.refuse_foreign(file for file in model_files() if not (resume and file in resumed))
    if overwrite:
        return
    if (folder / LAST).exists():
        if not resume:
            raise UsageError(f"{folder} already holds a training; resume it, overwrite it or choose another folder")
    elif (folder / MODEL).exists():
        why = f"there is no {LAST} to resume from" if resume else "it would be lost"
        raise UsageError(f"{folder} already holds a model, and {why}; overwrite it or choose another folder")


def model_files() -> list[str]:
    """What a training writes into its model folder, relative to it."""
    bundle = packaged("bundles", "sam_segmentation")
    files = [path.relative_to(bundle).as_posix() for path in sorted(bundle.rglob("*")) if path.suffix != ".py"]
    own = [MODEL, "adapter.safetensors", "base.safetensors", "history.json", "models/model.pt", LAST]
    return own + [name for name in files if not (bundle / name).is_dir()]


class Checkpoint:
    """`folder`/last.pt: the state of `objects`, the epoch, all random generators and, for comparison, `settings`.

    It holds tensors and plain values only, serves one's own resume, and is not part of the model. Of several processes
    the first reads and writes it, so it can be resumed by any number of them.

    Args:
        folder: see :func:`check_model_folder`.
        objects: name -> object with `state_dict` and `load_state_dict` (network, optimizer, schedule, record).
        settings: what must not change between start and resume.
        resume: continue from last.pt; without that file the training starts anew with a warning.
        overwrite: replace the training that `folder` holds.
    """

    def __init__(
        self,
        folder: str | Path,
        objects: Mapping[str, Any],
        settings: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        check_model_folder(folder, resume, overwrite)
        if launched()[0] == 0:
            hold_output(folder)
        self.path, self.resume = Path(folder) / LAST, resume
        self.objects, self.settings = dict(objects), dict(settings)
        self._compared = self.settings | own_settings()
        bases = {name: thing for name, thing in self.objects.items() if getattr(thing, "base_report", None)}
        self._bases = {name: thing.fingerprint() for name, thing in bases.items()}
        if resume and not self.path.exists():
            logger.warning("nothing to resume in %s: starting at the first epoch", self.path.parent)

    def save(self, engine: Engine) -> None:
        """Write last.pt; the one before stays until then."""
        if not is_main():
            return
        state: dict[str, Any] = {name: thing.state_dict() for name, thing in self._all(engine).items()}
        state |= {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        state |= {"settings": self._compared, "bases": self._bases, "version": __version__, "random": _random_state()}
        try:
            with replacing(self.path) as temporary:
                save_tensors(state, temporary)
        except Exception as error:
            if (trouble := disk_trouble(error)) is not None:
                raise InputError(f"checkpoint {self.path}: {trouble}, and continue with resume") from error
            raise

    def load(self, engine: Engine) -> None:
        """Restore what last.pt holds; refuse it where a setting has changed since."""
        state = broadcast(_read(self.path) if is_main() else {})
        for name, stored in state.get("bases", {}).items():
            if name in self._bases:
                check_fingerprint(self.objects[name], stored)
        before = state["settings"]
        same = state.get("version") == __version__  # another samda stored other keys
        _refuse_changes(before, self._compared, before.keys() ^ self._compared.keys() if same else ())
        for name, thing in self._all(engine).items():
            if name in state:
                thing.load_state_dict(state[name])
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state.get("iteration", state["epoch"] * engine.state.epoch_length)
        _set_random_state(state["random"])
        output = output_of(self.path)
        for path in (self.path, self.path.with_name("history.json")):  # of a copied folder, or of an older samda
            if output is not None and path.exists():
                output.note(path, path)
        logger.info("resumed after epoch %d", state["epoch"])

    def _all(self, engine: Engine) -> dict[str, Any]:
        """The objects, and the gradient scaler where the engine has one."""
        scaler = getattr(engine, "scaler", None)
        return self.objects if scaler is None else self.objects | {"scaler": scaler}


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as file:  # PyTorch does not look at the checksums that it writes
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"settings", "epoch", "random"} - set(state)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return state
    except Exception as error:
        raise InputError(f"{path} cannot be read ({error}); train anew with overwrite") from error


def _refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], only_in_one: Collection[str] = ()) -> None:
    for key in [*(key for key in now if key in before), *only_in_one]:
        if now.get(key) != before.get(key):
            was = f"was {before.get(key)!r} and is now {now.get(key)!r}"
            words = "are others than before" if key.endswith(" data") else was
            raise UsageError(f"resume: {key} {words}; keep it, start anew with overwrite, or use another folder")


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """What last.pt of a model folder holds; empty without one."""
    path = Path(folder) / LAST
    return _read(path) if path.exists() else {}


def check_resume(state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse to resume from `state` with other plain values in train.json's `config`, before anything is encoded."""
    if state:
        stored = config["checkpoint"]["settings"]
        now = {key: decoded(config[key]) for key, value in stored.items() if value == f"@{key}"}
        now = {key: value for key, value in now.items() if is_plain(value)}
        _refuse_changes(state["settings"], now)


def resumed_length(state: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The length of a training to resume from `state`, unit -> number, where none is `given`: that of before.

    Raises:
        UsageError: what is given has another unit than before, or is less.
    """
    pace = state.get("pace", {})
    if "length" not in pace:  # an older samda did not store it
        return {}
    unit, before = pace["length"]
    chosen = {key: number for key, number in given.items() if number is not None}
    if not chosen:
        return {unit: before}
    if len(chosen) == 1:
        [(key, number)] = chosen.items()
        refuse_other_unit(unit, before, key)
        if number < before:
            raise UsageError(f"resume: the length was {before:g} {unit}, {number:g} is less; give at least that")
    return {}


class Resume:
    """At the start, load the checkpoint. Attach it first. That of a training which is replaced stays until the first
    one of the new training is written.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.checkpoint.resume and broadcast(self.checkpoint.path.exists()):
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


def _own_gpus() -> list[int]:
    """All GPUs, or the one that a process among several has for itself."""
    if not torch.cuda.is_available():
        return []
    alone = rank_and_world()[1] == 1
    return list(range(torch.cuda.device_count())) if alone else [torch.cuda.current_device()]


def _random_state() -> dict[str, Any]:
    """Every global generator, as tensors and plain values."""
    kind, keys, *numbers = np.random.get_state()  # noqa: NPY002 - the generator that libraries use
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _own_gpus()],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *numbers],
        "python": list(random.getstate()),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for gpu, values in zip(_own_gpus(), state["cuda"], strict=False):  # their number may differ from before
        torch.cuda.set_rng_state(values, gpu)
    kind, keys, *numbers = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *numbers))  # noqa: NPY002
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
