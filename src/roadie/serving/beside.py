"""Training beside sampling: a training engine whose work is done in the loop of a server's engine, when it is its turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

from roadie.adapter import Adapter
from roadie.bank import AdapterBank
from roadie.engine import TrainingEngine, TrainingSettings
from roadie.engine.turns import Turns, TurnSettings
from roadie.errors import ServingError
from roadie.serving.active import ActiveRequest
from roadie.serving.engine import AdapterStatus
from roadie.serving.registry import content_hash
from roadie.serving.residency import Residency


class TrainingBeside:
    """See the module; all but `engine` is the loop's.

    turns: how time is shared; notify: says that there is something to do; called under `changed`.
    """

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings,
        turns: TurnSettings,
        changed: threading.Condition,
        notify: Callable[[], None],
    ) -> None:
        self._changed, self._notify = changed, notify
        self.engine = TrainingEngine(model, settings, on_news=self._tell)
        self._turns = Turns(turns)
        self._seconds = 0.0
        self._numbers = count(1)

    def _tell(self) -> None:
        with self._changed:
            self._notify()

    @property
    def pause_s(self) -> float | None:
        """How long to wait for requests, where none runs, before it is training's turn; None where nothing is to be done."""
        if self.engine.is_idle:
            return None
        return self._turns.pause_s

    def work(
        self, active: Mapping[str, ActiveRequest], running: bool, lent: Callable[[], AbstractContextManager[None]]
    ) -> bool:
        """Do what is its turn to be done now; whether this was a turn, after which sampling is not to have one at once.

        active: requests that are not over; running: whether any of them is in the batch; lent: within it the model is free.
        """
        if self.engine.is_idle:
            return False
        self.engine.do_chores()
        waited_s, turns = self._longest_wait_s(active), self._turns
        if self.engine.is_idle or (not turns.is_trainings(waited_s) if running else turns.pause_s):
            return False
        samples = running or turns.has_just_sampled
        begin, before = time.perf_counter(), self.engine.figures.num_tokens
        with lent():
            self.engine.work(turns.max_tokens(waited_s))
        seconds = time.perf_counter() - begin
        self._seconds += seconds
        turns.trained(seconds, self.engine.figures.num_tokens - before, sampling_waits=samples)
        return True

    def sampled(self, seconds: float) -> None:
        """A step of sampling has taken so long."""
        self._turns.sampled(seconds, training_waits=not self.engine.is_idle)

    def _longest_wait_s(self, active: Mapping[str, ActiveRequest]) -> float | None:
        if self._turns.settings.latest_first_token_s is None:
            return None
        since = min((each.submitted_s for each in list(active.values()) if not each.num_generated), default=None)
        return None if since is None else time.monotonic() - since

    def publish(self, tenant: str, name: str, residency: Residency, bank: AdapterBank) -> Future[AdapterStatus]:
        """See `ContinuousBatchingEngine.publish`."""

        def publish() -> AdapterStatus:
            ready = bank.prepare_row(self.engine.bank.family_of(tenant), tenant)
            return residency.hand_over(name, ready, f"{next(self._numbers):016x}")

        return self.engine.when_its_turn(tenant, publish)

    @property
    def figures(self) -> dict[str, Any]:
        """As `Statistics` has them."""
        done = self.engine.figures
        return {
            "num_training_tenants": len(self.engine.tenants),
            "num_training_waiting": self.engine.num_waiting,
            "num_training_passes": done.num_passes,
            "num_training_tokens": done.num_tokens,
            "num_training_steps": done.num_steps,
            "num_training_failed": done.num_failed,
            "seconds_training": self._seconds,
            "training_share": self._turns.settings.training_share,
            "training_owed_s": self._turns.owed_s,
        }


def give(name: str, adapter: Adapter, residency: Residency, bank: AdapterBank) -> Future[AdapterStatus]:
    """See `ContinuousBatchingEngine.give_adapter`."""
    return residency.run(lambda: residency.hand_over(name, bank.prepare(name, adapter), content_hash(adapter)))


def required(beside: TrainingBeside | None) -> TrainingBeside:
    """Raise `ServingError` where there is none."""
    if beside is None:
        raise ServingError("got an engine that samples alone; wanted one that trains; give it settings for training")
    return beside
