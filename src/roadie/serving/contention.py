"""Who waits for a slot while all are in use, and who gives one up.

Those who wait are served in order. For the first of them, as many keys as they need slots drain: they take no new requests, and
leave when their running ones have ended. At most a quarter of the slots drains at a time, but always enough for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class SlotLine(Generic[Key]):
    """The keys that wait, and those that drain; not thread-safe."""

    def __init__(self, num_slots: int) -> None:
        self._most = max(1, num_slots // 4)
        self._needed: dict[Key, int] = {}
        self._draining: dict[Key, None] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._needed

    def __iter__(self) -> Iterator[Key]:
        return iter(self._needed)

    def __bool__(self) -> bool:
        return bool(self._needed)

    def join(self, key: Key, num_slots: int) -> None:
        """A key waits for so many slots; whoever waits already keeps its place."""
        self._needed[key] = num_slots

    def leave(self, key: Key) -> None:
        """A key has its slots, or does not want them any more."""
        self._needed.pop(key, None)

    def is_draining(self, key: Key) -> bool:
        """Whether a key may take no new requests."""
        return key in self._draining

    def plan(self, candidates: Iterable[Key], is_in_slot: Callable[[Key], bool]) -> tuple[Key, ...]:
        """Say who drains from now on; candidates: who else could, the best first."""
        needed = self._num_wanted()
        kept = [key for key in self._draining if is_in_slot(key)][:needed]
        more = [key for key in candidates if key not in self._draining][: max(0, needed - len(kept))]
        self._draining = dict.fromkeys([*kept, *more])
        return tuple(self._draining)

    def _num_wanted(self) -> int:
        """How many slots the first of those who wait need together."""
        needed = 0
        for num_slots in self._needed.values():
            if needed and needed + num_slots > self._most:
                break
            needed += num_slots
        return needed
