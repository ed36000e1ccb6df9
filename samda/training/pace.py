# SPDX-License-Identifier: Apache-2.0
"""How long a training lasts: so many steps, so many minutes of wall time, or so many passes over its slices.

The schedule of the learning rate is a function of the used share of the training. Between two validations lies a round,
which is what MONAI's engine calls an epoch: one pass, or a number of steps, or a share of the time.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ignite.engine import Engine, Events

from samda.errors import UsageError
from samda.processes import broadcast, rank_and_world

logger = logging.getLogger(__name__)

STEPS = 3000  # where nothing else is said
ROUNDS = 10  # validations of a training by steps or minutes
ENDLESS = 10**9  # steps of a round for the engine, which :class:`Pace` ends itself
ENCODING = 0.25  # share of the time that may go into encoding
VALIDATING = 0.1  # share of the time that may go into validation
CALIBRATING = 0.08  # share of the time that the calibration of predicted Dice may take
FINISH = 0.03  # share of the budget that saving the model may take, beside
FINISH_STEPS = 25  # as much time as so many steps, for the statistics of features


def clock() -> float:
    """Seconds of a monotonic clock."""
    return time.monotonic()


class Pace:
    """The length of a training; attach it behind :class:`samda.training.Resume` and before the schedule.

    Exactly one of `steps`, `minutes` and `epochs` counts; without any it is :data:`STEPS`. Minutes are those of the
    whole job from here on, encoding, validation and the writing of the model included; a resumed training has what is
    left of them.

    Args:
        steps: gradient steps.
        minutes: of wall time.
        epochs: passes over the training slices.
        val_interval: steps between validations; with `epochs`, passes. None validates after every tenth of the
            training, or after each pass.
    """

    def __init__(
        self,
        steps: int | None = None,
        minutes: float | None = None,
        epochs: int | None = None,
        val_interval: int | None = None,
    ) -> None:
        check_length(steps=steps, minutes=minutes, epochs=epochs)
        self.steps = STEPS if minutes is None and epochs is None and steps is None else steps
        self.minutes, self.epochs, self.val_interval = minutes, epochs, val_interval
        self._began, self._before = clock(), 0.0  # of this run; seconds of earlier runs
        self._share = self._first_share = 0.0
        self._first_step, self._first_iteration = clock(), 0
        self._validations = 0.0  # seconds
        self._validated = 0.0  # share at the last one
        self._last_validation, self._round_over = 0.0, clock()  # seconds of the last one, and when it began
        self.ended = False
        self.joined = False  # do the validation patients train? see samda.training.JoinValidation

    @property
    def share(self) -> float:
        """The used share of the training, in [0, 1]; with minutes, of the time for steps."""
        return self._share

    @property
    def seconds(self) -> float:
        """Used so far, in earlier runs, too."""
        return self._before + clock() - self._began

    @property
    def rounds(self) -> int:
        """For the engine's `max_epochs`."""
        return self.epochs or ENDLESS

    @property
    def round_length(self) -> int | None:
        """For the engine's `epoch_length`: None is a pass."""
        return None if self.epochs else ENDLESS

    @property
    def interval(self) -> int:
        """Rounds between validations."""
        return (self.val_interval or 1) if self.epochs else 1

    def encoded_enough(self) -> bool:
        """Has the first encoding used its share of the budget?"""
        return self.minutes is not None and self.seconds > ENCODING * self.minutes * 60

    def may_renew(self, spent: float) -> bool:
        """May more time go into new views, after `spent` seconds since the first step?"""
        return spent <= ENCODING * (clock() - self._first_step)

    def progress(self, engine: Engine) -> tuple[float, float, str]:
        """What is done, the total, and their unit."""
        if self.minutes is not None:
            return round(self._share * self.minutes * 60), self.minutes * 60, "s"
        return engine.state.iteration, self._total(engine), "step"

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step)

    def start(self, engine: Engine) -> None:
        """Begin, or go on, with the steps."""
        self._first_share, self._first_step, self._first_iteration = self._share, clock(), engine.state.iteration
        if self.minutes is None:
            self._share = min(1.0, engine.state.iteration / self._total(engine))
        elif self.seconds >= self.minutes * 60:
            logger.warning("encoding has used up the %g minutes; what started in closed form is kept", self.minutes)
            self._share = 1.0
        if self.epochs is None:
            self._place_sampler(engine)
            if self._share >= 1:
                engine.terminate()

    def step(self, engine: Engine) -> None:
        """Count a step; end the round where a validation is due, and with the training."""
        if self.minutes is None:
            self._share = min(1.0, engine.state.iteration / self._total(engine))
        else:
            share = self._time_share(engine.state.iteration)
            self._share = broadcast(share) if rank_and_world()[1] > 1 else share
        if self.epochs is None and (self._share >= 1 or self._validation_due(engine)):
            self.ended = self._share >= 1
            self._round_over, self._validated = clock(), self._share  # also where nothing validates any more
            self._place_sampler(engine)  # the engine begins a new iterator
            engine.terminate_epoch()

    def validated(self) -> None:
        """Note that the validation at the end of a round is over."""
        self._last_validation = clock() - self._round_over
        self._validations += self._last_validation

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        state = {"seconds": self.seconds, "share": self._share, "validated": self._validated}
        return state | {"joined": self.joined, "length": self._length()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, perhaps in a longer training: what was done is a smaller share."""
        unit, length = self._length()
        stretched = 1.0
        if "length" in state:  # an older samda did not store it
            then, before = state["length"]
            refuse_other_unit(then, before, unit)
            stretched = min(1.0, before / length)
        self._before, self._share, self._validated = state["seconds"], state["share"], state["validated"]
        self._share, self._validated = self._share * stretched, self._validated * stretched
        self.joined = state.get("joined", False)  # an older samda never did

    def _length(self) -> tuple[str, float]:
        """Unit and number."""
        lengths = {"steps": self.steps, "minutes": self.minutes, "epochs": self.epochs}
        return next((unit, number) for unit, number in lengths.items() if number is not None)

    def _place_sampler(self, engine: Engine) -> None:
        loader: Any = engine.state.dataloader
        loader.sampler.start_at(engine.state.iteration * loader.batch_size)

    def _total(self, engine: Engine) -> int:
        return self.steps or (self.epochs or 1) * (engine.state.epoch_length or 1)

    def _time_share(self, iteration: int) -> float:
        assert self.minutes is not None
        budget = self.minutes * 60
        spent = clock() - self._first_step - self._validations
        step = spent / max(1, iteration - self._first_iteration)
        reserve = (CALIBRATING + FINISH) * budget + FINISH_STEPS * step + 1.2 * self._last_validation
        end = self._began + budget - self._before - reserve
        left = max(end - self._first_step, 1e-9)
        share = self._first_share + (1 - self._first_share) * (clock() - self._first_step) / left
        return min(1.0, max(share, self._share))

    def _validation_due(self, engine: Engine) -> bool:
        if self.val_interval:
            return engine.state.iteration % self.val_interval == 0
        if self.steps:
            return engine.state.iteration % max(1, self.steps // ROUNDS) == 0
        if self._share < self._validated + 1 / ROUNDS or self._share > 1 - 0.5 / ROUNDS:
            return False
        return self._validations + self._last_validation <= VALIDATING * (clock() - self._began)


class Attach:
    """A part of the config that is a handler, too, in the list of handlers, where MONAI wants mappings."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        self.part.attach(engine)


class Ended:
    """Ends the engine when the training is complete. Attach it last."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def attach(self, engine: Engine) -> None:
        """Register with the training engine."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.pace.ended:
            engine.terminate()


def refuse_other_unit(unit: str, length: float, now: str) -> None:
    """Refuse to resume a training of `length` in `unit` with a length in another unit."""
    if now != unit:
        raise UsageError(f"resume: the length was given in {unit} ({length:g}), now it is in {now}; give {unit}")


def check_length(**lengths: float | None) -> None:
    """Refuse more than one of steps, minutes and epochs."""
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        values = ", ".join(f"{name}={lengths[name]}" for name in given)
        raise UsageError(f"the length of the training is given {len(given)} times, {values}; give one of them")
