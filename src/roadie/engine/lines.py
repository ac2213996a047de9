"""What tenants have asked for and has not been done: a line for each, of which the first is ready."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from roadie.engine.calls import Call, Operation, Step, Task, TrainingSettings
from roadie.errors import ConfigError, QueueFull, ShuttingDown, UnknownTenant

Kind = TypeVar("Kind")


@dataclass(eq=False)
class Tenant:
    """What is known of one. step: of the optimiser, made; num_calls: that have added gradients since."""

    owner: str
    config: Mapping[str, Any]
    step: int = 0
    num_calls: int = 0
    is_leaving: bool = False
    waiting: deque[Operation] = field(default_factory=deque)

    @property
    def num_tokens(self) -> int:
        """Of all rows that wait."""
        return sum(each.num_tokens for each in self.waiting if isinstance(each, Call))


class Lines:
    """Tenants and their lines; all methods may be called from any thread. on_news: called when something has come."""

    def __init__(self, settings: TrainingSettings, on_news: Callable[[], None]) -> None:
        self._settings, self.on_news = settings, on_news
        self._tenants: dict[str, Tenant] = {}
        self._busy: dict[str, Tenant] = {}  # those with something in their line
        self._lock = threading.RLock()
        self._is_closed = False

    def __contains__(self, name: object) -> bool:
        return name in self._tenants

    @property
    def names(self) -> tuple[str, ...]:
        """Who trains."""
        with self._lock:
            return tuple(self._tenants)

    @property
    def num_waiting(self) -> int:
        """Operations in all lines."""
        with self._lock:
            return sum(len(tenant.waiting) for tenant in self._busy.values())

    @property
    def are_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._busy

    def __getitem__(self, name: str) -> Tenant:
        return self._tenants[name]

    def begin(self, name: str, tenant: Tenant, first: Operation) -> None:
        """A tenant comes; raises `ConfigError` where the name is taken, `QueueFull`, `ShuttingDown`."""
        with self._lock:
            self._check_open()
            if name in self._tenants:
                raise ConfigError(
                    f"got tenant {name!r}, who trains already; wanted another name; remove that one first"
                )
            if len(self._tenants) >= self._settings.max_tenants:
                raise QueueFull(f"{self._settings.max_tenants} tenants train already; remove one", 60.0)
            tenant.waiting.append(first)
            self._tenants[name] = self._busy[name] = tenant
        self.on_news()

    def check(self, name: str) -> Tenant:
        """The tenant of this name, who may ask for something; raises `UnknownTenant` or `ShuttingDown`."""
        self._check_open()
        found = self._tenants.get(name)
        if found is None or found.is_leaving:
            raise UnknownTenant(f"got tenant {name!r}, who does not train; wanted one that was created; create it")
        return found

    def push(self, operation: Operation, *, is_last: bool = False) -> None:
        """An operation comes, after which there may be none; raises as `check` does, and `QueueFull`."""
        with self._lock:
            tenant = self.check(operation.tenant)
            if isinstance(operation, Call):
                self._check_room(tenant, operation)
            tenant.waiting.append(operation)
            tenant.is_leaving = is_last
            self._busy[operation.tenant] = tenant
        self.on_news()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ShuttingDown("got a call for an engine that takes none; try another, or later")

    def _check_room(self, tenant: Tenant, call: Call) -> None:
        limits = self._settings
        if len(tenant.waiting) >= limits.max_calls_per_tenant:
            raise QueueFull(f"{len(tenant.waiting)} calls of this tenant wait already; wait for some of them")
        if tenant.waiting and tenant.num_tokens + call.num_tokens > limits.max_tokens_per_tenant:
            raise QueueFull(f"{tenant.num_tokens} tokens of this tenant wait already; wait for some of them")

    def first(self, kind: type[Kind]) -> list[Kind]:
        """What is first in line of each tenant, where it is of this kind; what was cancelled is taken out."""
        with self._lock:
            for name in [name for name, tenant in self._busy.items() if _is_cancelled(tenant.waiting[0])]:
                while name in self._busy and _is_cancelled(self._busy[name].waiting[0]):
                    self._pop(name)
            first = [tenant.waiting[0] for tenant in self._busy.values()]
        return [each for each in first if isinstance(each, kind)]

    def is_first(self, operation: Operation) -> bool:
        """Whether it still waits, as the first of its tenant."""
        with self._lock:
            tenant = self._busy.get(operation.tenant)
            return tenant is not None and tenant.waiting[0] is operation

    def done(self, operation: Operation, result: Any = None, error: Exception | None = None) -> None:
        """Take an operation out of the line, and say what became of it."""
        with self._lock:
            if self.is_first(operation):
                self._pop(operation.tenant)
        _say(operation, result, error)

    def _pop(self, name: str) -> None:
        waiting = self._busy[name].waiting
        waiting.popleft()
        if not waiting:
            del self._busy[name]

    def forget(self, name: str, error: Exception | None = None) -> None:
        """A tenant goes; whatever it has waiting fails with this error."""
        with self._lock:
            waiting = self._tenants.pop(name).waiting
            self._busy.pop(name, None)
        for each in waiting:
            _say(each, None, error)

    def close(self) -> None:
        """Whatever waits fails with `ShuttingDown`, and nothing more comes."""
        with self._lock:
            self._is_closed = True
            waiting = [each for tenant in self._busy.values() for each in tenant.waiting]
            for tenant in self._busy.values():
                tenant.waiting.clear()
            self._busy.clear()
        for each in waiting:
            _say(each, None, ShuttingDown("got the end of the engine before the turn of this; ask where it goes on"))


def _is_cancelled(operation: Operation) -> bool:
    return isinstance(operation, (Call, Step, Task)) and operation.future.cancelled()


def _say(operation: Operation, result: Any, error: Exception | None) -> None:
    future: Any = operation.future
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
