"""What requests ask for and hold, and what is known of adapters: the values that `residency` deals in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from roadie.bank.blends import Blend
from roadie.serving.belongings import Belongings
from roadie.serving.engine import FinishReason, OnDisk
from roadie.serving.registry import Stamp

Key: TypeAlias = "str | Blend | None"


def names_of(key: Key) -> tuple[str, ...]:
    """The adapters that a key is made of."""
    if key is None:
        return ()
    return key.names if isinstance(key, Blend) else (key,)


@dataclass(frozen=True)
class Version:
    """Where the adapter of a name is now, and what it is."""

    slot: int
    content_hash: str


@dataclass(frozen=True, eq=False)
class Lease:
    """A slot held for a request; salt: equal for requests that may share key-value blocks. slots: what holds it."""

    key: Key
    slot: int
    salt: int
    slots: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """What an adapter was when it was read last."""

    content_hash: str
    stamp: Stamp | None
    belongings: Belongings


@dataclass
class Totals:
    """Of requests and steps, since the start."""

    num_requests: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    seconds_computing: float = 0.0

    def count_end(self, finish: FinishReason | None) -> None:
        """A request has ended so."""
        self.num_cancelled += finish is FinishReason.CANCELLED
        self.num_failed += finish is FinishReason.FAILED
        self.num_finished += finish not in (FinishReason.CANCELLED, FinishReason.FAILED)


@dataclass
class Counts:
    """Since the start."""

    num_loads: int = 0
    num_load_failures: int = 0
    num_evictions: int = 0


@dataclass(frozen=True)
class Callbacks:
    """What the engine tells, and is told. remaining_tokens: of the running requests of a key, the most any may still generate;
    is_wanted: whether a request waits for a key; on_news: something was brought, or could not be; on_layers: which layers an
    adapter has, before it is published; num_running: requests that a load disturbs."""

    remaining_tokens: Callable[[Key], int]
    is_wanted: Callable[[Key], bool]
    on_news: Callable[[], None]
    on_layers: Callable[[frozenset[str]], None]
    num_running: Callable[[], int]


def on_disk(stamp: Stamp | None, seen: Seen | None) -> OnDisk:
    """What has become of files that are known by this stamp now."""
    if stamp is None:
        return OnDisk.GONE
    return OnDisk.SAME if seen is None or seen.stamp == stamp else OnDisk.CHANGED


def wish_of(key: str | Blend) -> str | dict[str, float]:
    """As the bank is asked for it."""
    return key if isinstance(key, str) else dict(key.weights)
