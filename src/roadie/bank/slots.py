"""Who is in which slot: bookkeeping without tensors.

A slot is free, or belongs to a name, or is retired: its name has left or moved, but somebody who asked for the slot may still
be reading it. Whoever asks gets a lease; a leased slot never changes hands. A full book lets the
least recently used name go that is neither pinned nor leased.

Not thread-safe: the bank calls it under its lock. Only `SlotLease.close` may be called from anywhere, also by the garbage
collector.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

Returned: TypeAlias = "deque[tuple[tuple[int, ...], list[Any]]]"


class SlotLease:
    """Slots that must not change hands while this is open. ended: called when it is closed; gives events of a device."""

    def __init__(self, slots: Sequence[int], returned: Returned, ended: Callable[[], list[Any]] | None = None) -> None:
        self._slots, self._returned, self._ended = tuple(slots), returned, ended

    def close(self) -> None:
        """Give the slots back; only once, and from any thread."""
        slots, self._slots = self._slots, ()
        if slots:
            self._returned.append((slots, [] if self._ended is None else self._ended()))

    __del__ = close


class SlotBook:
    """Names and their slots, the least recently used first."""

    def __init__(self, num_slots: int) -> None:
        self._slot_of: OrderedDict[Hashable, int] = OrderedDict()
        self._pinned: set[Hashable] = set()
        self._free = deque(range(num_slots))
        self._leases = [0] * num_slots
        self._retired: set[int] = set()
        self._returned: Returned = deque()
        self._read: dict[int, list[Any]] = {}

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return len(self._leases)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._slot_of

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._slot_of)

    def __len__(self) -> int:
        return len(self._slot_of)

    def use(self, name: Hashable) -> int | None:
        """The slot of a name, which counts as used now; None where it has none."""
        slot = self._slot_of.get(name)
        if slot is not None:
            self._slot_of.move_to_end(name)
        return slot

    def lease(self, slots: Sequence[int], ended: Callable[[], list[Any]] | None = None) -> SlotLease:
        """Keep slots from changing hands until the lease is closed, or forgotten; see `SlotLease`."""
        for slot in slots:
            self._leases[slot] += 1
        return SlotLease(slots, self._returned, ended)

    def reads_of(self, slots: Sequence[int]) -> list[Any]:
        """The events at which those ended that have read slots which nobody reads any more; asked for once."""
        return [event for slot in slots for event in self._read.pop(slot, ())]

    def take(self) -> int | None:
        """A slot to write into; None where none is free."""
        self._settle()
        return self._free.popleft() if self._free else None

    def evict(self, is_dispensable: Callable[[Hashable], bool]) -> Hashable | None:
        """Let the least recently used name go that is neither pinned nor being read, and say which; None where there is none.

        Dispensable names, which can be made again, go before all others.
        """
        self._settle()
        movable = [name for name, slot in self._slot_of.items() if name not in self._pinned and not self._leases[slot]]
        chosen = next(filter(is_dispensable, movable), movable[0] if movable else None)
        if chosen is not None:
            self.drop(chosen)
        return chosen

    def give_back(self, slot: int) -> None:
        """A slot that was taken and is not used after all."""
        self._free.append(slot)

    def publish(self, name: Hashable, slot: int) -> None:
        """From now on the name is in this slot; the slot it had before retires."""
        before = self._slot_of.pop(name, None)
        self._slot_of[name] = slot
        if before is not None:
            self._retire(before)

    def drop(self, name: Hashable) -> None:
        """The name leaves."""
        self._pinned.discard(name)
        self._retire(self._slot_of.pop(name))

    def pin(self, name: Hashable) -> None:
        """The name never gives its slot up for another."""
        self._pinned.add(name)

    def unpin(self, name: Hashable) -> None:
        """The name may give its slot up again."""
        self._pinned.discard(name)

    def grow(self, num_slots: int) -> None:
        """More slots, all free; the old ones stay what they are."""
        self._free.extend(range(self.num_slots, num_slots))
        self._leases.extend([0] * (num_slots - self.num_slots))

    def _retire(self, slot: int) -> None:
        self._retired.add(slot)
        self._settle()

    def _settle(self) -> None:
        """Take back what was returned, and free what retired and nobody reads any more."""
        while self._returned:
            slots, events = self._returned.popleft()
            for slot in slots:
                self._leases[slot] -= 1
                if events:
                    self._read[slot] = [*[event for event in self._read.get(slot, ()) if not event.query()], *events]
        done = [slot for slot in self._retired if not self._leases[slot]]
        self._retired.difference_update(done)
        self._free.extend(done)
