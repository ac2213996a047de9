"""Rows of a bank, and slots that are read where they lie, as graphs ask for that are captured once and replayed (CUDA graphs).

A graph reads memory that it was captured over: the caller's tensor of slots, and a bank's tables. It knows nothing of leases, and
cannot be told that a table has moved. So what it may read lives as long as the tensor of slots does, and where tables become
others while such tensors are there, that is said.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import ref

from torch import Tensor, nn

from roadie.errors import RoutingError
from roadie.kernels.constants import kept_beside
from roadie.sites.rows import Choice

_logger = logging.getLogger("roadie")


class Graphs:
    """The tensors of static slots over which graphs of one bank may have been captured."""

    def __init__(self) -> None:
        self._slots: dict[int, ref[Tensor]] = {}

    def kept(self, bank: Any, slots: Tensor) -> dict[str, Any]:
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


class BankChoice(Choice):
    """Rows of an `AdapterBank`. Where they lie on the CPU they are marked as the last ones were, if they are the same in the same
    kind of call; where they are static, what a graph may read of the bank is kept beside them."""

    def __init__(
        self, bank: Any, slots: Tensor, expansion: int, held: object = None, *, is_static: bool = False
    ) -> None:
        super().__init__(slots, expansion, model=bank.model, held=held, is_static=is_static)
        self._bank, self._writes = bank, -1

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().starts(model, args, kwargs)
        bank = self._bank
        bank.streams.before_reading()
        if not self.is_static:
            self.mark = bank.mark(self.host, self.expansion, self.calls, self.slots.device)
            return
        self.check(bank.total_slots)
        if self._writes != bank.writes:
            self._writes = bank.writes
            bank.graphs.kept(bank, self.slots)


def static_slots(slots: Any) -> Tensor:
    """What was given as static slots; raises `RoutingError` for anything but a tensor."""
    if isinstance(slots, Tensor):
        return slots
    raise RoutingError(
        f"got {type(slots).__name__} as static slots; wanted a tensor of slots that the caller keeps, and writes to between "
        "calls, as in static.copy_(bank.slots(names))"
    )
