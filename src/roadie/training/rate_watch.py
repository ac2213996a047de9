"""A warning when the loss says that the learning rate is far off: it rises, or it does not move at all.

    trainer = Trainer(..., callbacks=[RateWatch()])     # with logging_steps of 1, or a few

Losses differ from batch to batch, so a rise counts where it is large and larger than chance makes it: medians of stretches
of losses are compared, and the scatter is that of successive losses, which a trend does not widen. What it rose from: the
first losses, at which the adapter has hardly moved (at the start it is the identity), or the lowest stretch of the run.
AdamW moves no parameter further than the rates of all steps add up to, the "travel", and those of RoAd are angles and
factors: below `STILL_TRAVEL` (radians) a rotation is hardly one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("roadie")

FEWEST_STEPS = 30
"""Of a run that is told that its rate is too low; a shorter one is a trial."""
WINDOW = 10
CERTAIN = 5.0
"""Standard errors that count as no chance; the highest of a thousand stretches is about 4 above the lowest."""
RISEN_NATS = 0.5
STILL_TRAVEL = 0.02


class LossWatch:
    """The losses of one training of so many steps, and what they say; peak: its learning rate."""

    def __init__(self, steps: int, peak: float) -> None:
        self._steps, self._peak = steps, peak
        self._losses: list[float] = []
        self._step, self._travel = 0, 0.0
        self._squared_differences = 0.0
        self._start: list[float] = []
        self._lowest: list[float] = []
        self._is_half_done = self._has_spoken = False

    def see(self, step: int, loss: float, learning_rate: float) -> str | None:
        """What to say after a loss (nats; a mean over the steps since the last one), the first time there is something."""
        said = self._verdict(step, loss, learning_rate)
        if said is None or self._has_spoken:
            return None
        self._has_spoken = True
        return said

    def _verdict(self, step: int, loss: float, learning_rate: float) -> str | None:
        if not math.isfinite(loss):
            return self._too_high(f"is {loss} at step {step}")
        self._note(step, loss, learning_rate)
        return self._risen() or self._unmoved()

    def _note(self, step: int, loss: float, learning_rate: float) -> None:
        steps, self._step = step - self._step, step
        if (
            not self._losses or self._travel + (steps - 1) * learning_rate <= STILL_TRAVEL
        ):  # a loss is that before its step
            self._start.append(loss)
        self._travel += steps * learning_rate
        if self._losses:
            self._squared_differences += (loss - self._losses[-1]) ** 2
        self._losses.append(loss)

    def _risen(self) -> str | None:
        """Compared with where it started, and with the lowest stretch so far."""
        recent = self._losses[-WINDOW:]
        if len(self._losses) < len(self._start) + WINDOW:
            return None
        for before in (self._start, self._lowest):
            if before and median(recent) - median(before) > max(RISEN_NATS, CERTAIN * self._error(before, recent)):
                return self._too_high(f"rose from {median(before):.3f} to {median(recent):.3f} by step {self._step}")
        if len(self._losses) % WINDOW == 0 and (not self._lowest or median(recent) < median(self._lowest)):
            self._lowest = recent
        return None

    def _error(self, before: Sequence[float], after: Sequence[float]) -> float:
        """The standard error of the difference of two stretches' medians, pi / 2 times as wide, squared, as that of means."""
        scatter = math.pi / 2 * self._squared_differences / 2 / (len(self._losses) - 1)
        return math.sqrt(scatter * (1 / len(before) + 1 / len(after)))

    def _unmoved(self) -> str | None:
        """Asked once, when half of the steps are done."""
        if self._is_half_done or self._steps < FEWEST_STEPS or 2 * self._step < self._steps:
            return None
        self._is_half_done = True
        third = len(self._losses) // 3
        if third < 2 or self._travel > STILL_TRAVEL:
            return None
        first, last = self._losses[:third], self._losses[-third:]
        fall = fmean(first) - fmean(last)
        return self._too_low(fmean(first), fmean(last)) if fall <= 2 * self._error(first, last) else None

    def _too_high(self, what: str) -> str:
        return (
            f"got a learning rate of {self._peak:g}, with which the loss {what} of {self._steps}; wanted one with which it "
            f"falls; start again with a tenth of it or less, or ask `roadie find-lr`"
        )

    def _too_low(self, first: float, last: float) -> str:
        return (
            f"got a learning rate of {self._peak:g}, with which the loss has not moved in {self._step} of {self._steps} steps "
            f"({first:.3f} in the first of them, {last:.3f} in the last); wanted one that moves it; leave the rate to "
            "roadie, or ask `roadie find-lr`"
        )


class RateWatch(TrainerCallback):
    """Warns once, in the log of roadie, when the losses that a Trainer logs say that its learning rate is far off."""

    def __init__(self) -> None:
        self._watch: LossWatch | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start; what a former session of a resumed run said is not said again."""
        self._watch = LossWatch(state.max_steps, args.learning_rate)
        for entry in state.log_history:
            self._see(entry, int(entry["step"]))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """One more loss."""
        said = self._see(logs or {}, state.global_step)
        if said is not None and state.is_world_process_zero:
            logger.warning("%s", said)

    def _see(self, logs: Mapping[str, float], step: int) -> str | None:
        if self._watch is None or "loss" not in logs:
            return None
        # Trainer puts a finite number in the place of a loss that is not, unless it is told not to; its gradient shows.
        finite = math.isfinite(float(logs.get("grad_norm", 0.0)))
        loss = float(logs["loss"]) if finite else math.nan
        return self._watch.see(step, loss, float(logs.get("learning_rate", 0.0)))
