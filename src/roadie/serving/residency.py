"""Which adapters are in slots, and who holds them. A worker reads, publishes and blends; the engine's loop never waits for it.

    lease(key)    a slot for a request that starts now; None: not yet, and the worker brings it
    release       a request has ended
    load, unload, pin    what operators ask for

A key is what a request asks for: None (the base model), a name, or a `Blend`. A lease keeps its slot from changing hands, so that
a request keeps the version of its adapter that it started with. What the worker has brought for a request that waits is held
until that request starts or leaves.

**When every slot is in use,** a key that was asked for waits its turn, and others drain for it (`contention`). So whoever waits
gets a slot after at most the longest run of a request, however popular the others are.

Everything but the worker's reading, checking and blending happens under the engine's condition, `changed`.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor

from roadie.bank import AdapterBank
from roadie.bank.admission import ReadyAdapter
from roadie.bank.blends import Blend
from roadie.errors import AdapterBusy, BankFull, ConfigError, RoadieError, ShuttingDown, UnknownAdapter
from roadie.serving.belongings import Base, Belongings, notes
from roadie.serving.contention import SlotLine
from roadie.serving.engine import AdapterState, AdapterStatus
from roadie.serving.leases import Callbacks, Counts, Key, Lease, Seen, Version, names_of, on_disk, wish_of
from roadie.serving.loader import Loader
from roadie.serving.places import check_served_name
from roadie.serving.registry import Entry, ReadAdapter, Registry, Stamp, unknown_adapter

_log = logging.getLogger("roadie")


class Residency:
    """See the module."""

    def __init__(
        self,
        bank: AdapterBank,
        registry: Registry,
        changed: threading.Condition,
        engine: Callbacks,
        base: Base | None = None,
    ) -> None:
        self._bank, self._registry, self._changed = bank, registry, changed
        self._engine, self._base = engine, base or Base()
        self._said: set[tuple[str, str]] = set()
        self._worker = Loader(engine.num_running, lambda: len(self._coming))
        self._secret = secrets.token_bytes(16)  # nobody outside can make blocks that collide with another's
        self.counts = Counts()
        self._versions: dict[str, Version] = {}
        self._seen: dict[str, Seen] = {}  # everything that was ever read
        self._read: dict[str, ReadAdapter] = {}  # checked, and waiting for a slot
        self._live: Counter[Key] = Counter()
        self._held: dict[Key, Tensor] = {}
        self._made: dict[
            Blend, tuple[Version | None, ...]
        ] = {}  # of which versions the blends that are held or active are
        self._coming: set[Key] = set()
        self._line: SlotLine[Key] = SlotLine(bank.num_slots)
        self._failures: dict[Key, Exception] = {}
        self._broken: dict[str, str] = {}
        self._unloading: set[str] = set()
        self._num_releases = 0
        self._is_blending = False
        self._is_closed = False
        self._publishing = threading.Lock()  # of the worker and the engine's thread, one after the other

    # What the engine's loop asks.

    def lease(self, key: Key) -> Lease | None:
        """A slot for a request that starts now, or None; `want` has been called then."""
        if key is None:
            return Lease(None, -1, self._salt("base"))
        if self._line.is_draining(key) or key in self._coming or self._is_blending:
            return None
        lease = self._lease_resident(key)
        if lease is None:
            self._want(key)
            return None
        self._live[key] += 1
        self._held.pop(key, None)
        return lease

    def _lease_resident(self, key: str | Blend) -> Lease | None:
        versions = [self._versions.get(name) for name in names_of(key)]
        if None in versions or not (isinstance(key, str) or self._is_made(key, versions)):
            return None
        try:
            slots = self._bank.slots([wish_of(key)])
        except RoadieError:
            return None  # it has just been evicted; whatever else it is, the worker will find out
        slot = int(slots[0])
        if isinstance(key, str) and slot != self._versions[key].slot:
            return None  # a replacement is being published
        return Lease(key, slot, self._salt_of(key, slot), slots)

    def _is_made(self, blend: Blend, versions: Sequence[Version | None]) -> bool:
        """Whether a blend of these versions is in a slot and stays there: nothing has to be computed to lease it."""
        return self._made.get(blend) == tuple(versions) and (self._live[blend] > 0 or blend in self._held)

    def release(self, lease: Lease) -> None:
        """A request has ended; drop the lease itself, too."""
        key = lease.key
        if key is None:
            return
        self._live[key] -= 1
        if self._live[key] <= 0:
            del self._live[key]
            if isinstance(key, Blend) and key not in self._held:
                self._made.pop(key, None)
            elif isinstance(key, str) and key in self._bank:
                self._bank.slots([key])  # it was in use until now
        self._retry_first_in_line()

    def not_wanted(self, key: Key) -> None:
        """No request waits for this key any more."""
        self._held.pop(key, None)
        self._line.leave(key)
        self._failures.pop(key, None)
        self._plan_draining()
        self._retry_first_in_line()

    def failure(self, key: Key) -> Exception | None:
        """Why a key cannot be had, or None."""
        return self._failures.get(key)

    @property
    def num_leased(self) -> int:
        """Slots that requests hold, waiting ones included."""
        return len(set(self._live) | set(self._held))

    @property
    def num_resident(self) -> int:
        """Adapters in slots (blends are not counted)."""
        return len(self._versions)

    def _salt(self, *parts: str) -> int:
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8, key=self._secret)
        return int.from_bytes(digest.digest(), "little")

    def _salt_of(self, key: str | Blend, slot: int) -> int:
        if isinstance(key, str):
            return self._salt("adapter", self._versions[key].content_hash)
        parts = (f"{weight!r} {self._versions[name].content_hash}" for name, weight in key.weights)
        return self._salt("blend", *parts)

    # Slots.

    def _want(self, key: str | Blend) -> None:
        if key in self._coming or key in self._line or key in self._failures or self._is_closed:
            return
        if self._line:  # others wait for a slot: behind them
            self._line.join(key, self._num_missing(key))
            return
        self._coming.add(key)
        self._worker.submit(self._bring, key)

    def _num_missing(self, key: str | Blend) -> int:
        """How many slots a key that is in none still needs."""
        return max(1, sum(name not in self._versions for name in names_of(key)) + isinstance(key, Blend))

    def _retry_first_in_line(self) -> None:
        self._num_releases += 1
        first = next((key for key in self._line if key not in self._coming), None)
        if first is not None and not self._is_closed:
            self._coming.add(first)
            self._worker.submit(self._bring, first)

    def _plan_draining(self) -> None:
        """Those closest to their end drain; what is held for waiting requests of theirs is let go."""
        candidates = [key for key in self._live if not self._is_pinned(key)]
        for key in self._line.plan(sorted(candidates, key=self._engine.remaining_tokens), self._is_in_slot):
            self._held.pop(key, None)

    def _is_in_slot(self, key: Key) -> bool:
        return self._live[key] > 0 or (isinstance(key, str) and key in self._versions)

    def _is_pinned(self, key: Key) -> bool:
        return isinstance(key, str) and self._registry.entries.get(key, Entry()).is_pinned

    # The worker.

    def _bring(self, key: str | Blend) -> None:
        """Put a key into a slot and hold it for whoever waits for it."""
        held: list[Tensor] = []
        num_releases = self._num_releases
        try:
            for name in names_of(key):
                held.append(self._bring_name(name))
            slots = self._blended(key) if isinstance(key, Blend) else held[0]
            outcome: Tensor | Exception = slots
        except Exception as error:
            outcome = error
            if not isinstance(error, RoadieError):
                _log.exception("an adapter could not be loaded")
        held.clear()
        with self._changed:
            self._coming.discard(key)
            self._forget_evicted()
            self._settle_bring(key, outcome, num_releases)
            self._engine.on_news()

    def _settle_bring(self, key: str | Blend, outcome: Tensor | Exception, num_releases: int) -> None:
        if not self._engine.is_wanted(key):
            self._line.leave(key)
        elif isinstance(outcome, BankFull) and self._may_have_a_slot_later(key, num_releases):
            self._line.join(key, self._num_missing(key))
        elif isinstance(outcome, Exception):
            self._line.leave(key)
            self._failures[key] = outcome
        else:
            self._line.leave(key)
            self._held[key] = outcome
            if isinstance(key, Blend):
                self._made[key] = tuple(self._versions.get(name) for name in key.names)
        self._plan_draining()
        if not isinstance(outcome, BankFull) or num_releases != self._num_releases:
            self._retry_first_in_line()

    def _may_have_a_slot_later(self, key: Key, num_releases: int) -> bool:
        """Whether somebody holds a slot, or has given one back since; otherwise all are pinned."""
        return bool(self._live) or bool(set(self._held) - {key}) or num_releases != self._num_releases

    def _bring_name(self, name: str) -> Tensor:
        """A lease of the adapter's slot, once it is in one."""
        with self._changed:
            if name in self._versions and name in self._bank:
                return self._bank.slots([name])
            read = self._read.get(name)
        try:
            read = read or self._registry.read(name)
            with self._publishing:  # the engine's thread may have put it there meanwhile, or another version beside it
                read = self._read.get(name, read)
                if name not in self._bank:
                    self._admit(name, read)
        except BankFull:
            assert read is not None
            self._keep(name, read)
            raise
        except RoadieError as error:
            with self._changed:
                self.counts.num_load_failures += 1
                self._broken[name] = str(error)
            raise
        return self._bank.slots([name])

    def _keep(self, name: str, read: ReadAdapter) -> None:
        """Keep what waits for a slot from being read again; of no more adapters than there are slots."""
        self._read[name] = read
        while len(self._read) > self._bank.num_slots:
            del self._read[next(iter(self._read))]

    def _admit(self, name: str, read: ReadAdapter) -> None:
        """Publish an adapter that is in no slot; only the worker does so."""
        self._engine.on_layers(frozenset(read.adapter.layers))
        slot = self._bank.admit(name, read.adapter)
        self._published(name, slot, read)

    def _published(self, name: str, slot: int, read: ReadAdapter) -> None:
        if self._registry.entries.get(name, Entry()).is_pinned:
            self._bank.pin(name)
        with self._changed:
            self._forget_evicted()
            self.counts.num_loads += 1
            self._versions[name] = Version(slot, read.content_hash)
            self._seen[name] = Seen(read.content_hash, read.stamp, read.belongings)
            self._say(name, read.belongings)
            self._read.pop(name, None)
            self._broken.pop(name, None)
            self._engine.on_news()

    def _forget_evicted(self) -> None:
        """What the bank let go to make room is in no slot any more."""
        still_there = set(self._bank.names)
        gone = [name for name in self._versions if name not in still_there]
        for name in gone:
            del self._versions[name]
        self.counts.num_evictions += len(gone)

    def _blended(self, blend: Blend) -> Tensor:
        with self._changed:
            self._is_blending = True  # the bank is locked meanwhile: the engine's loop is not to wait for it
        try:
            return self._bank.slots([wish_of(blend)])
        finally:
            with self._changed:
                self._is_blending = False

    # Which there are: what is in a slot exists, whatever has become of its files, as long as no operator unloads it.

    @property
    def names(self) -> tuple[str, ...]:
        """All that a request may ask for, sorted."""
        return tuple(sorted({*self._registry.names(), *list(self._versions)}))

    def __contains__(self, name: str) -> bool:
        return name in self._versions or name in self._registry

    def belongings(self, name: str) -> Belongings:
        """What an adapter brings beside its weights: with the version in a slot, else from the disk."""
        seen = self._seen.get(name)
        if seen is not None and name in self._versions:
            return seen.belongings
        if name not in self._registry:
            return Belongings()
        return self._registry.belongings(self._registry.path_of(name))

    def look_around(self) -> None:
        """Say what of which adapter is not as the base model has it."""
        for name in self._registry.names():
            self._say(name, self._registry.belongings(self._registry.path_of(name)))

    def _say(self, name: str, belongings: Belongings) -> None:
        for note in notes(belongings, self._base):
            if (name, note) not in self._said:
                self._said.add((name, note))
                _log.warning("adapter %s: %s", name, note)

    def _check_exists(self, name: str) -> None:
        if name not in self:
            raise unknown_adapter(name)

    # Operators.

    def run(self, task: Callable[[], AdapterStatus]) -> Future[AdapterStatus]:
        """Let the worker do something."""
        if self._is_closed:
            raise ShuttingDown("got a task for an engine that has stopped; wanted one that runs; start it")
        return self._worker.submit(task)

    def load(self, name: str, path: str | None, must_be_new: bool) -> AdapterStatus:
        """`Engine.load_adapter`, in the worker's thread."""
        check_served_name(name)
        folder = self._source(name, path, must_be_new)
        try:
            read = self._registry.read_folder(folder)
            prepared = self._bank.prepare(name, read.adapter)
        except RoadieError:
            with self._changed:
                self.counts.num_load_failures += 1
            raise
        is_at_home = folder == self._registry.root / name
        before = self._registry.entries.get(name, Entry())
        self._registry.remember(name, Entry(None if is_at_home else str(folder), before.is_pinned))
        self._publish(name, read, prepared)
        return self.status(name)

    def _source(self, name: str, path: str | None, must_be_new: bool) -> Path:
        folder = self._registry.allowed_path(name if path is None else path)
        with self._changed:
            if name in self._unloading:
                raise AdapterBusy(f"got adapter {name!r}, which is being unloaded; load it when that is done")
            is_other = name in self._registry and self._registry.path_of(name) != folder
            if must_be_new and (name in self._versions or is_other):
                raise ConfigError(f"got {name!r}, which is loaded already; use replace, or unload it first")
        return folder

    def _publish(self, name: str, read: ReadAdapter, prepared: ReadyAdapter) -> None:
        """A checked adapter takes its name; where no slot can be had, the next request brings it."""
        self._engine.on_layers(frozenset(read.adapter.layers))
        with self._publishing:
            try:
                publish = self._bank.replace if name in self._bank else self._bank.admit
                self._published(name, publish(name, prepared), read)
            except BankFull:
                with self._changed:
                    self._keep(name, read)
                    self._seen[name] = Seen(read.content_hash, read.stamp, read.belongings)
                    self._leave(name)
                    self._engine.on_news()

    def hand_over(self, name: str, prepared: ReadyAdapter, content_hash: str) -> AdapterStatus:
        """An adapter without files takes its name, in the engine's thread; requests that run keep what they started with."""
        if name in self._unloading:
            raise AdapterBusy(f"got adapter {name!r}, which is being unloaded; publish it when that is done")
        self._publish(name, self._registry.give(name, prepared, content_hash), prepared)
        return self.status(name)

    def _leave(self, name: str) -> None:
        """The name is in no slot any more; running requests keep theirs. What was held for waiting ones is brought again."""
        self._versions.pop(name, None)
        for key in [key for key in self._held if name in names_of(key)]:
            del self._held[key]
        if name in self._bank:
            self._bank.evict(name)

    def begin_unload(self, name: str) -> None:
        """From now on no request may ask for it. Raises `UnknownAdapter`, or `AdapterBusy` where it is being unloaded."""
        if name in self._unloading:
            raise AdapterBusy(f"got adapter {name!r}, which is being unloaded already; wait for that")
        self._check_exists(name)
        self._unloading.add(name)

    def end_unload(self, name: str) -> AdapterStatus:
        """It leaves its slot and the registry, in the worker's thread; where that fails it is as it was."""
        try:
            self._registry.forget(name)
        except RoadieError:
            with self._changed:
                self._unloading.discard(name)
            raise
        with self._changed:
            self._unloading.discard(name)
            self._leave(name)
            for table in (self._read, self._seen, self._broken):
                table.pop(name, None)
            self._retry_first_in_line()
            return AdapterStatus(name, AdapterState.KNOWN)

    def pin(self, name: str, is_pinned: bool) -> AdapterStatus:
        """`Engine.pin_adapter`, in the worker's thread."""
        self._check_exists(name)
        if not is_pinned:
            self._registry.pin(name, False)
            if name in self._bank:
                self._bank.unpin(name)
            with self._changed:
                self._retry_first_in_line()
            return self.status(name)
        lease = self._bring_name(name)
        self._registry.pin(name, True)
        self._bank.pin(name)
        del lease
        return self.status(name)

    def bring_pinned(self) -> None:
        """Let the worker load what the registry says is pinned; what cannot be loaded is reported as broken."""
        pinned = [name for name, entry in self._registry.entries.items() if entry.is_pinned]
        for name in pinned:
            self._worker.submit(self._bring_quietly, name)

    def _bring_quietly(self, name: str) -> None:
        try:
            self._bring_name(name)
        except RoadieError as error:
            _log.warning("the pinned adapter %s could not be loaded: %s", name, error)

    def require(self, key: Key) -> None:
        """Raise `UnknownAdapter` unless a request may ask for this key now."""
        for name in names_of(key):
            if name in self._unloading:
                raise UnknownAdapter(f"got adapter {name!r}, which is being unloaded; wanted one that is loaded")
            self._check_exists(name)

    def statuses(self) -> tuple[AdapterStatus, ...]:
        """How all adapters stand, without their requests; the disk is looked at before anything is held up."""
        names = self.names
        stamps = [self._registry.stamp(self._registry.path_of(name)) for name in names]
        with self._changed:
            return tuple(self._status(name, stamp) for name, stamp in zip(names, stamps, strict=True))

    def status(self, name: str) -> AdapterStatus:
        """How an adapter stands, without its requests."""
        return self._status(name, self._registry.stamp(self._registry.path_of(name)))

    def _status(self, name: str, stamp: Stamp | None) -> AdapterStatus:
        with self._changed:
            version = self._versions.get(name)
            entry = self._registry.entries.get(name, Entry())
            path, seen = self._registry.path_of(name), self._seen.get(name)
            return AdapterStatus(
                name,
                self._state(name),
                str(path),
                on_disk(stamp, seen),
                content_hash=seen.content_hash if seen else None,
                is_pinned=entry.is_pinned,
                slot=version.slot if version else None,
                error=self._broken.get(name),
                notes=notes(seen.belongings if seen else self._registry.last_belongings(path), self._base),
            )

    def _state(self, name: str) -> AdapterState:
        if name in self._unloading:
            return AdapterState.UNLOADING
        if name in self._versions:
            return AdapterState.RESIDENT
        if any(name in names_of(key) for key in self._coming):
            return AdapterState.LOADING
        return AdapterState.BROKEN if name in self._broken else AdapterState.KNOWN

    def close(self) -> None:
        """Let the worker end; nothing is brought any more."""
        with self._changed:
            self._is_closed = True
        self._worker.close()
        self._held.clear()
