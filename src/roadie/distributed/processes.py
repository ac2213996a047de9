"""The processes of one training: started by accelerate or torchrun, and what they say to each other.

    together = join()                        one process, where nobody started several
    answer = together.first(write)           the first process does it; its answer, or its error, is everybody's
    value = together.each(read)              all do it; an error of one is everybody's
    together.sum_(tensor)                    summed over all, in place

Errors travel, so that a training that is refused ends in all processes at once, before anything is written. Who has nothing
to do waits as long as it takes: one process may read or train for hours after the others are done.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from roadie.errors import TOLD_BY_ANOTHER_PROCESS, RoadieError

T = TypeVar("T")

_PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; rank: its number, from 0; count: how many there are.

    talk: the group in which they exchange objects; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    talk: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises in the first process, in all of them; the value must be picklable."""
        if self.count == 1:
            return make()
        said: list[Any] = [_attempt(make)] if self.is_first else [None]
        dist.broadcast_object_list(said, src=0, group=self.talk)
        return cast(T, _outcome(said[0], told=not self.is_first))

    def each(self, make: Callable[[], T]) -> T:
        """What `make` returns here; where it raises in any process, the error of the first of these, in all."""
        if self.count == 1:
            return make()
        own = _attempt(make)
        for rank, error in enumerate(self.gather(own[1])):
            if error is not None:
                _outcome((None, error), told=rank != self.rank)
        return cast(T, own[0])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks; picklable ones."""
        values: list[Any] = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value, group=self.talk)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all processes, in place; its bits are the same in all."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            dist.barrier(group=self.talk)


def join() -> Processes:
    """The processes that accelerate or torchrun started, this one among them; connects them on the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    state = PartialState(cpu=not torch.accelerator.is_available())
    return Processes(state.process_index, state.num_processes, _talk())


def _talk() -> Any:
    """A group on the CPU that waits; made once for each connection."""
    world = dist.group.WORLD
    if _talks.get("of") is not world:
        _talks.update(of=world, group=dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _talks["group"]


_talks: dict[str, Any] = {}


@contextmanager
def joined() -> Iterator[Processes]:
    """`join` for a whole program: at the end of the block the connection is closed, if it was made in it."""
    before = dist.is_available() and dist.is_initialized()
    try:
        yield join()
    finally:
        if not before and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            PartialState._reset_state()  # it would go on believing that there is a connection
            _talks.clear()


def _attempt(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, _picklable(error)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RoadieError(f"{type(error).__name__}: {error}")
    return error


def _outcome(said: tuple[Any, Exception | None], *, told: bool) -> Any:
    value, error = said
    if error is None:
        return value
    if told:
        setattr(error, TOLD_BY_ANOTHER_PROCESS, True)
    raise error
