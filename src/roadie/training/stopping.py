"""The end of a training whose held-out loss no longer falls.

What happened is read from the losses that were logged, which checkpoints hold, so that a run that was interrupted ends where
it would have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def step_of_end(history: Sequence[Mapping[str, float]], patience: int) -> int | None:
    """The step at which `patience` evaluations in a row had passed without a better one; None where they never had."""
    best, waited = float("inf"), 0
    for entry in history:
        if "eval_loss" not in entry:
            continue
        if entry["eval_loss"] < best:
            best, waited = entry["eval_loss"], 0
        else:
            waited += 1
        if waited == patience:
            return int(entry["step"])
    return None


class EarlyStop(TrainerCallback):
    """Ends a training after `patience` evaluations in a row without a better held-out loss."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where the last evaluation was one too many."""
        if step_of_end(state.log_history, self._patience) is not None:
            control.should_training_stop = True
