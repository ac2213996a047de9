"""Who follows the catalogue: replicas and fronts, each from its start to its end.

    join        what there is now
    follow      what has changed since, as soon as it has; and in the same call what the member has to report
    done        what became of a task that the directory gave it

A member that has followed up to a revision has applied everything up to it. The directory waits for that, so that an operator
who is told "loaded" can rely on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from roadie.ray.catalogue import Entry
from roadie.serving.engine import AdapterStatus, EngineLimits, Statistics

FOLLOW_S = 1.0
"""How long a call to follow waits for a change."""
RETRY_S = 0.5
_log = logging.getLogger("roadie")


class Role(str, Enum):
    """What a member does."""

    REPLICA = "replica"
    FRONT = "front"


@dataclass(frozen=True)
class Report:
    """How a replica stands. adapters: those in slots, or that requests use."""

    is_ready: bool
    limits: EngineLimits
    statistics: Statistics
    adapters: tuple[AdapterStatus, ...] = ()


@dataclass(frozen=True)
class Task:
    """Something that a member is to do once; `arguments` as its method has them."""

    id: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Overview:
    """How all replicas stand together. names: adapters that lie in the folder."""

    num_replicas: int = 0
    limits: EngineLimits | None = None
    statistics: tuple[Statistics, ...] = ()
    adapters: tuple[AdapterStatus, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Orders:
    """What a member is told: the entries that changed, up to which revision, and tasks. overview: for fronts."""

    revision: int
    changes: Mapping[str, Entry] = field(default_factory=dict)
    tasks: tuple[Task, ...] = ()
    overview: Overview | None = None


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    value: Any = None
    error: Exception | None = None


class Follower:
    """A member's side: follows until it is closed, and applies what it hears.

    directory: a handle. apply: takes the orders, without their tasks. perform: does a task. report: what to say of oneself.
    """

    def __init__(
        self,
        directory: Any,
        member_id: str,
        role: Role,
        apply: Callable[[Orders], Awaitable[None]],
        perform: Callable[[Task], Awaitable[Any]],
        report: Callable[[], Report | None] = lambda: None,
    ) -> None:
        self._directory, self._id, self._role = directory, member_id, role
        self._apply, self._perform, self._report = apply, perform, report
        self._revision = -1
        self._running: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self.failure: Exception | None = None

    @property
    def revision(self) -> int:
        """Up to which revision everything is applied."""
        return self._revision

    async def begin(self, actor: Any = None) -> None:
        """Join, apply what there is, and follow from then on. actor: a handle by which the directory sees whether it lives."""
        orders = await self._directory.join.remote(self._id, self._role, actor)
        await self._apply(orders)
        self._revision = orders.revision
        self._loop = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                await self.exchange(FOLLOW_S)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                _log.warning("the directory of adapters does not answer (%s); trying again", type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def exchange(self, wait_s: float) -> None:
        """Report, hear what is new, and apply it. One that cannot be applied is a failure, which ends this member."""
        orders: Orders = await self._directory.follow.remote(
            self._id, self._role, self._revision, self._report(), wait_s
        )
        for task in orders.tasks:
            running = asyncio.create_task(self._do(task))
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        try:
            await self._apply(orders)
        except Exception as error:
            self.failure = error
            raise
        self._revision = max(self._revision, orders.revision)

    async def _do(self, task: Task) -> None:
        try:
            outcome = Outcome(await self._perform(task))
        except Exception as error:
            outcome = Outcome(error=error)
        with contextlib.suppress(Exception):  # the directory has gone, and its task with it
            await self._directory.done.remote(self._id, task.id, outcome)

    def close(self) -> None:
        """Follow no more."""
        for task in (self._loop, *self._running):
            if task is not None:
                task.cancel()
