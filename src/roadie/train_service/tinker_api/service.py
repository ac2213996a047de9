"""The parts of Tinker's API, put together on one engine; and what is done now and then."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roadie.serving import ContinuousBatchingEngine
from roadie.train_service.database import Database
from roadie.train_service.progress import Progress
from roadie.train_service.tinker_api.checkpoints import Checkpoints
from roadie.train_service.tinker_api.futures import Futures
from roadie.train_service.tinker_api.records import Records
from roadie.train_service.tinker_api.runs import Ground, Runs
from roadie.train_service.tinker_api.samplers import Samplers
from roadie.train_service.tinker_api.store import Store
from roadie.train_service.tinker_api.tasks import Tasks

SWEEP_EVERY_S = 15.0


@dataclass(frozen=True, eq=False)
class BaseModel:
    """What everybody trains. names: those it answers to, its own first; place: where its tokenizer can be loaded from."""

    model: Any
    names: tuple[str, ...]
    place: str


class TinkerService:
    """See the package. folder: of weights."""

    def __init__(
        self, engine: ContinuousBatchingEngine, base: BaseModel, database: Database, folder: Path, progress: Progress
    ) -> None:
        self.engine, self.base = engine, base
        self.records, self.futures = Records(database), Futures(database)
        self.store, self._tasks = Store(folder), Tasks()
        self.secret = secrets.token_bytes(32)  # of links, which end with the process
        self.samplers = Samplers(engine, self.futures, self.records, self.store, self._tasks)
        self.checkpoints = Checkpoints(self.records, self.store, self.samplers.gone)
        parts = (self.store, self._tasks, self.checkpoints, self.samplers, progress)
        self.runs = Runs(Ground(engine, self.futures, self.records, *parts))

    def start(self) -> None:
        """Go on with what was asked for before; the engine has been started."""
        self.store.keep_only(self.records.folders())
        for asked in self.futures.waiting(samples=True):
            self._tasks.submit(self.samplers.again, asked)
        self.runs.start()
        self._tasks.every(SWEEP_EVERY_S, self.sweep)

    def stop(self) -> None:
        """Take in what is done; whatever waits is done after the next start."""
        self.futures.wake()
        self._tasks.close()

    def sweep(self, now_s: float | None = None) -> None:
        """Keep the states of runs; let go of results and checkpoints that are past their time."""
        now = time.time() if now_s is None else now_s
        for each in (self.runs.keep, partial(self.checkpoints.sweep, now), partial(self.futures.sweep, now)):
            self._tasks.submit(each)
