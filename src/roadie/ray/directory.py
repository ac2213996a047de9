"""The directory of adapters: one process that decides which version each name has, and sees to it that all others know.

Loading goes in two steps. First every replica fetches the version, checks its hash, and tries it; where one refuses, nothing has
changed. Then the catalogue is written to shared storage, and every replica and front follows. Only then is the operator told.
A replica that has the new version never answers with the old one; while the others follow, each answer is of one version.

A process that comes later begins with the catalogue as it is. One that dies is not waited for. Where the directory itself
dies, it is started again and reads the catalogue; what was going on fails as a whole, and may be asked for again.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from roadie.adapter import check_adapter_name
from roadie.errors import ConfigError, RoadieError, ShuttingDown, UnknownAdapter
from roadie.ray.catalogue import Catalogue, Entry, parse
from roadie.ray.liveness import has_died
from roadie.ray.membership import Orders, Outcome, Overview, Report, Role, Task
from roadie.ray.overview import combined, known_status, on_record
from roadie.ray.storage import SharedAdapters
from roadie.serving.engine import AdapterState, AdapterStatus, Unload

SILENCE_S = 2.5
"""A member that has said nothing for so long is looked after."""
GONE_S = 30.0
"""A member that has said nothing for so long is not waited for any more, whatever else is known of it."""
LISTING_S = 2.0
SWEEP_S = 1.0


@dataclass(eq=False)
class Member:
    """A replica or front, as the directory knows it. revision: up to which it has applied everything; -1: nothing yet."""

    id: str
    role: Role
    actor: Any = None
    revision: int = -1
    report: Report | None = None
    heard_s: float = field(default_factory=time.monotonic)
    tasks: deque[Task] = field(default_factory=deque)


class Directory:
    """See the module. Errors come back as values (`Outcome`), since Ray wraps what is raised."""

    def __init__(self, uri: str, allow_from: tuple[str, ...], max_bytes: int) -> None:
        self._shared = SharedAdapters(uri, allow_from, max_bytes)
        self._catalogue: Catalogue = parse(self._shared.read_catalogue())
        self._members: dict[str, Member] = {}
        self._outcomes: dict[tuple[str, int], Outcome] = {}
        self._news = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._task_ids = count()
        self._names: tuple[str, ...] = ()
        self._listed_s = -LISTING_S
        self._swept_s = time.monotonic()

    # Members.

    async def join(self, member_id: str, role: Role, actor: Any) -> Orders:
        """A member begins; what it has to know."""
        self._members[member_id] = Member(member_id, role, actor)
        return Orders(self._catalogue.revision, self._catalogue.since(-1), (), await self._overview(role))

    async def follow(self, member_id: str, role: Role, revision: int, report: Report | None, wait_s: float) -> Orders:
        """What is new to a member that has applied everything up to `revision`; waits for it, for `wait_s` at most."""
        member = self._members.setdefault(member_id, Member(member_id, role))
        member.revision, member.report, member.heard_s = revision, report, time.monotonic()
        await self._notify()
        if time.monotonic() - self._swept_s > SWEEP_S:
            self._swept_s = time.monotonic()
            await self._drop_the_dead()
        await self._wait(lambda: bool(member.tasks) or self._catalogue.revision > revision, wait_s)
        member.heard_s = time.monotonic()
        tasks = tuple(member.tasks)
        member.tasks.clear()
        return Orders(self._catalogue.revision, self._catalogue.since(revision), tasks, await self._overview(role))

    async def done(self, member_id: str, task_id: int, outcome: Outcome) -> None:
        """A member has done a task."""
        self._outcomes[member_id, task_id] = outcome
        await self._notify()

    async def leave(self, member_id: str) -> None:
        """A member ends."""
        self._members.pop(member_id, None)
        await self._notify()

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(condition), seconds)
            except asyncio.TimeoutError:
                return False
        return True

    async def _drop_the_dead(self) -> None:
        """Members that are known to be gone are not waited for."""
        for member in list(self._members.values()):
            silent_s = time.monotonic() - member.heard_s
            if silent_s > GONE_S or (silent_s > SILENCE_S and await has_died(member.actor)):
                self._members.pop(member.id, None)

    async def _until_all(self, role: Role | None, condition: Callable[[Member], bool]) -> None:
        """Until the condition holds of every member that lives."""

        def holds() -> bool:
            return all(condition(member) for member in self._members.values() if role in (None, member.role))

        while not await self._wait(holds, 0.5):
            await self._drop_the_dead()

    async def _ask(self, role: Role, method: str, *arguments: Any) -> list[Outcome]:
        """Give a task to all members of a role; their outcomes, without those of members that died."""
        await self._drop_the_dead()
        task = Task(next(self._task_ids), method, arguments)
        asked = {member.id for member in self._members.values() if member.role is role}
        for member_id in asked:
            self._members[member_id].tasks.append(task)
        await self._notify()
        await self._until_all(role, lambda member: member.id not in asked or (member.id, task.id) in self._outcomes)
        found = [self._outcomes.pop((member_id, task.id), None) for member_id in sorted(asked)]
        return [outcome for outcome in found if outcome is not None]

    # What operators ask for.

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        async with self._busy[name]:
            yield

    async def load(self, name: str, path: str | None, replace_it: bool) -> Outcome:
        """`Engine.load_adapter`, over all replicas."""
        async with self._alone(name):
            return await self._attempt(self._load, name, path, replace_it)

    async def unload(self, name: str, how: Unload) -> Outcome:
        """`Engine.unload_adapter`, over all fronts and replicas."""
        async with self._alone(name):
            return await self._attempt(self._unload, name, how)

    async def pin(self, name: str, is_pinned: bool) -> Outcome:
        """`Engine.pin_adapter`, over all replicas."""
        async with self._alone(name):
            return await self._attempt(self._pin, name, is_pinned)

    async def resolve(self, name: str) -> Outcome:
        """The entry of an adapter that may have been put into the folder; None where there is none."""
        async with self._alone(name):
            return await self._attempt(self._resolve, name)

    async def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Outcome:
        try:
            return Outcome(await action(*arguments))
        except RoadieError as error:
            return Outcome(error=error)

    async def _load(self, name: str, path: str | None, replace_it: bool) -> AdapterStatus:
        check_adapter_name(name)
        source = None if path in (None, name) else path
        if not replace_it:
            self._check_new(name, source)
        digest = await asyncio.to_thread(self._shared.publish, source or name)
        await self._try("check", name, digest)
        await self._commit(name, digest=digest, source=source, is_hidden=False, is_loaded=True)
        return self._status(name)

    def _check_new(self, name: str, source: str | None) -> None:
        entry = self._catalogue.current(name)
        if entry is None:
            return
        is_resident = any(status.state is AdapterState.RESIDENT for status in self._reported(name))
        if entry.is_loaded or is_resident or entry.source != source:
            raise ConfigError(f"got {name!r}, which is loaded already; use replace, or unload it first")

    async def _try(self, method: str, *arguments: Any) -> None:
        """A task of all replicas; raises the first error, and `ShuttingDown` where no replica runs."""
        outcomes = await self._ask(Role.REPLICA, method, *arguments)
        if not outcomes:
            raise ShuttingDown("got no replica that runs; wanted one to try the adapter with; try again later")
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error

    async def _commit(self, name: str, *, is_waited_for: bool = True, **values: Any) -> Entry:
        """Write down a change, and wait until every member that lives has followed."""
        async with self._writing:
            changed = self._catalogue.changed(name, **values)
            await asyncio.to_thread(self._shared.write_catalogue, changed.as_bytes())
            self._catalogue = changed
        await self._notify()
        if is_waited_for:
            await self._until_all(None, lambda member: member.revision >= changed.revision)
            await self._ask(Role.FRONT, "refresh", name)  # what the replicas report now comes with it
        return changed.entries[name]

    async def _unload(self, name: str, how: Unload) -> AdapterStatus:
        await self._known(name)
        outcomes = await self._ask(Role.FRONT, "retire", name, how)
        refused = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
        if refused is not None:
            await self._ask(Role.FRONT, "restore", name)
            raise refused
        try:
            await self._commit(name, is_hidden=True, is_pinned=False, is_loaded=False, source=None)
        except RoadieError:
            await self._ask(Role.FRONT, "restore", name)
            raise
        return AdapterStatus(name, AdapterState.KNOWN)

    async def _pin(self, name: str, is_pinned: bool) -> AdapterStatus:
        entry = await self._known(name)
        try:
            await self._try("pin", name, entry, is_pinned)
            await self._commit(name, is_pinned=is_pinned)
        except RoadieError:
            await self._ask(Role.REPLICA, "pin", name, entry, entry.is_pinned)
            raise
        return self._status(name)

    async def _known(self, name: str) -> Entry:
        entry = await self._resolve(name)
        if entry is None:
            raise UnknownAdapter(
                f"got adapter {name[:200]!r}; wanted one of those in the folder of adapters, or one that was loaded; put it "
                "there or load it"
            )
        return entry

    async def _resolve(self, name: str) -> Entry | None:
        entry = self._catalogue.entries.get(name)
        if entry is not None:
            return self._catalogue.current(name)
        if not await asyncio.to_thread(self._shared.has, name):
            return None
        digest = await asyncio.to_thread(self._shared.publish, name)
        return await self._commit(name, is_waited_for=False, digest=digest)

    # What is known.

    def _reported(self, name: str) -> list[AdapterStatus]:
        reports = [member.report for member in self._members.values() if member.report is not None]
        return [status for report in reports for status in report.adapters if status.name == name]

    def _status(self, name: str) -> AdapterStatus:
        status = combined(name, self._reported(name))
        entry = self._catalogue.entries[name]
        is_resident = entry.is_loaded or entry.is_pinned
        return replace(
            on_record(status, entry, self._shared.uri),
            state=AdapterState.RESIDENT if is_resident else status.state,
        )

    async def _overview(self, role: Role) -> Overview | None:
        """How all stand, for fronts."""
        if role is not Role.FRONT:
            return None
        if time.monotonic() - self._listed_s > LISTING_S:
            self._listed_s = time.monotonic()
            self._names = await asyncio.to_thread(self._shared.names)
        reports = [member.report for member in self._members.values() if member.role is Role.REPLICA and member.report]
        ready = [report for report in reports if report.is_ready]
        hidden = {name for name, entry in self._catalogue.entries.items() if entry.is_hidden}
        return Overview(
            num_replicas=len(ready),
            limits=ready[0].limits if ready else None,
            statistics=tuple(report.statistics for report in reports),
            adapters=tuple(self._statuses(reports)),
            names=tuple(name for name in self._names if name not in hidden),
        )

    def _statuses(self, reports: list[Report]) -> list[AdapterStatus]:
        found: defaultdict[str, list[AdapterStatus]] = defaultdict(list)
        for report in reports:
            for status in report.adapters:
                found[status.name].append(status)
        shown = {*found, *(name for name in self._catalogue.entries if self._catalogue.current(name))}
        entries, uri = self._catalogue.entries, self._shared.uri
        return [
            on_record(combined(name, found[name]), entries[name], uri) if name in entries else known_status(name, uri)
            for name in sorted(shown)
        ]
