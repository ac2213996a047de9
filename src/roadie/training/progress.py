"""How far a training run is: steps, time left, the last losses; a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINES_OF_A_RUN = 20
_NAMES = (("loss", "loss"), ("eval_loss", "held-out"))


def shown_progress() -> TrainerCallback:
    """What shows a person, or a log, how far a training is, on standard error."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()


def steps_between_lines(steps: int) -> int:
    """Steps from one line to the next, so that a run has about `LINES_OF_A_RUN`."""
    return max(1, steps // LINES_OF_A_RUN)


class ProgressBar(TrainerCallback):
    """A progress bar on standard error; a resumed run starts where it left off."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if self._bar is None or not logs:
            return
        self._shown |= _losses(logs)
        self._bar.set_postfix(self._shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ProgressLines(TrainerCallback):
    """A whole line on standard error at the first step, at the last, and every so many between."""

    def __init__(self) -> None:
        self._began_s, self._first = 0.0, 0
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began_s, self._first, self._shown = time.perf_counter(), state.global_step, {}

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Losses are logged at each step, and held-out losses after that of their step."""
        self._shown |= _losses(logs or {})
        done, step = state.global_step - self._first, state.global_step
        is_due = done == 1 or step == state.max_steps or step % steps_between_lines(state.max_steps) == 0
        if "loss" in (logs or {}) and is_due:
            left_s = (time.perf_counter() - self._began_s) / done * (state.max_steps - step)
            losses = ", ".join(f"{name}={loss}" for name, loss in self._shown.items())
            tqdm.write(f"training: {step}/{state.max_steps} steps, {losses}, {left_s:.0f} s left", file=sys.stderr)


def _losses(logs: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{float(logs[key]):.4f}" for key, name in _NAMES if key in logs}
