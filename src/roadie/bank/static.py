"""Slots that are read where they lie, as graphs that are captured once and replayed ask for (CUDA graphs).

A graph reads memory that it was captured over: the caller's tensor of slots, and a bank's tables. It knows nothing of leases, and
cannot be told that a table has moved. So what it may read lives as long as the tensor of slots does, and where tables become
others while such tensors are there, that is said.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol
from weakref import ref

from torch import Tensor, nn

from roadie.bank.streams import Streams
from roadie.errors import RoutingError
from roadie.kernels import Chain
from roadie.kernels.constants import kept_beside
from roadie.sites.rows import Choice

_logger = logging.getLogger("roadie")


class Bank(Protocol):
    """What is asked of an `AdapterBank`. writes: how often slots were written to; total_slots: rows of a table."""

    model: nn.Module
    graphs: Graphs
    streams: Streams
    storage_version: int
    writes: int

    @property
    def tables(self) -> list[Chain]: ...

    @property
    def total_slots(self) -> int: ...


class Graphs:
    """The tensors of static slots over which graphs of one bank may have been captured."""

    def __init__(self) -> None:
        self._slots: dict[int, ref[Tensor]] = {}

    def kept(self, bank: Bank, slots: Tensor) -> dict[str, Any]:
        """What lives as long as `slots`: the tables as they are now, and what the caller adds."""
        of_all = kept_beside(slots)
        key = bank, bank.storage_version
        if key not in of_all:
            of_all[key] = {"tables": bank.tables}
            place, known = id(slots), self._slots
            known[place] = ref(slots, lambda _: known.pop(place, None))
        kept: dict[str, Any] = of_all[key]
        return kept

    def tell(self, what: str) -> None:
        """Say that tables have become others, if a graph may read the old ones."""
        if self._slots:
            _logger.warning(
                "%s: graphs that were captured over static slots go on reading the tables of before, and rotate by no adapter "
                "that has come since; capture them again (storage_version says when)",
                what,
            )


class StaticChoice(Choice):
    """Rows of a bank whose slots are read where they lie."""

    def __init__(self, bank: Bank, slots: Tensor, expansion: int) -> None:
        super().__init__(slots, expansion, model=bank.model, is_static=True)
        self._bank, self._writes = bank, -1

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().starts(model, args, kwargs)
        self._bank.streams.before_reading()
        self.check(self._bank.total_slots)
        if self._writes != self._bank.writes:
            self._writes = self._bank.writes
            self._bank.graphs.kept(self._bank, self.slots)


def static_slots(slots: Any) -> Tensor:
    """What was given as static slots; raises `RoutingError` for anything but a tensor."""
    if isinstance(slots, Tensor):
        return slots
    raise RoutingError(
        f"got {type(slots).__name__} as static slots; wanted a tensor of slots that the caller keeps, and writes to between "
        "calls, as in static.copy_(bank.slots(names))"
    )
