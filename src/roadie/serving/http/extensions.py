"""What a server has beside its own routes: more of them, behind the same gate, with adapters that are one caller's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter

from roadie.serving.http.gate import Route
from roadie.serving.http.keys import Caller


@dataclass(frozen=True)
class StepFigures:
    """A step of a run. loss, reward: None where none was told."""

    step: int
    loss: float | None
    reward: float | None


@dataclass(frozen=True)
class RunFigures:
    """A run of one key that has trained since the server started. kind, state: in the words of its API; num_steps: it is to make,
    where known; tokens: learnt from; steps: the last ones.
    """

    id: str
    kind: str
    state: str
    num_steps: int | None
    tokens: int
    tokens_per_s: float
    steps: tuple[StepFigures, ...]


def _nobody(adapter: str) -> None:
    return None


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Extension:
    """Routes, and how the gate treats each of their paths.

    owner_of: whose an adapter is, by the name of the key; None where it is nobody's own: the keys say then who may use it.
    start: called when the engine has been started; stop: before it is stopped.
    runs_of: what trains for a caller, by the name of the key, said at once; None where this trains nothing.
    """

    router: APIRouter
    routes: Mapping[str, Route]
    owner_of: Callable[[str], str | None] = _nobody
    start: Callable[[], None] = _nothing
    stop: Callable[[], None] = _nothing
    runs_of: Callable[[str], Sequence[RunFigures]] | None = None


def who_may_use(extensions: Sequence[Extension]) -> Callable[[Caller, str], bool]:
    """Whether a caller may use an adapter, and see it: its owner and administrators, or whoever the keys say."""
    return partial(_may_use, tuple(extensions))


def _may_use(extensions: Sequence[Extension], caller: Caller, adapter: str) -> bool:
    owners = [owner for owner in (each.owner_of(adapter) for each in extensions) if owner is not None]
    return (caller.is_admin or caller.name in owners) if owners else caller.may_use(adapter)
