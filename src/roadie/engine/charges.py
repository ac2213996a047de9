"""Who was charged how many tokens: the one with the least is next.

Who comes back from idleness starts no lower than whoever started last: idleness earns nothing, and being served alone costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Charges(Generic[Key]):
    """Tokens charged by key, divided by the key's weight."""

    def __init__(self, weights: Mapping[Key, float] | None = None) -> None:
        self._charged: dict[Key, float] = {}
        self._weights = weights or {}
        self._floor = 0.0

    def join(self, key: Key) -> None:
        """A key that nobody waited for."""
        self._charged[key] = max(self.of(key), self._floor)

    def of(self, key: Key) -> float:
        """What the key was charged."""
        return self._charged.get(key, self._floor)

    def charge(self, key: Key, tokens: float) -> None:
        """Add the tokens of a start, or give some back (negative)."""
        before = self.of(key)
        if tokens > 0:
            self._floor = max(self._floor, before)
        self._charged[key] = before + tokens / self._weights.get(key, 1.0)

    def forget_idle(self, in_use: Callable[[Key], bool], limit: int = 4096) -> None:
        """Let keys go that are not in use, once there are many: tenants and adapters come and go."""
        if len(self._charged) > limit:
            self._charged = {key: value for key, value in self._charged.items() if in_use(key)}
