"""Which rows go together in the next pass: fair by tokens, up to a budget, without more padding than it is worth.

The owner that was charged least gives a row, is charged for it, and so on, until the budget is full. So a flood of rows waits for
itself. A row that is much longer, or much shorter, than the others waits for the next pass: each row is padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from roadie.engine.calls import Call
from roadie.engine.charges import Charges

WORTH_PADDING = 256
"""Tokens of padding that a row may take whatever its length: a pass of its own would take as long."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Rows ``(call, index)`` that go together."""

    rows: Sequence[tuple[Call, int]]

    @property
    def calls(self) -> dict[Call, None]:
        """The calls that the rows are of, each once."""
        return dict.fromkeys(call for call, _ in self.rows)

    @property
    def backward(self) -> bool:
        """Whether gradients are wanted; of all of them, or of none."""
        return self.rows[0][0].backward

    @property
    def num_tokens(self) -> int:
        """With padding."""
        return len(self.rows) * max(_length(*row) for row in self.rows)

    def by_call(self) -> list[Chosen]:
        """The rows of each call for themselves."""
        return [Chosen([row for row in self.rows if row[0] is call]) for call in self.calls]


def choose(
    calls: Sequence[Call], owner_of: Callable[[Call], str], charges: Charges[str], max_tokens: int | None
) -> Chosen:
    """Take rows out of the calls, which all have some; at least one, however long it is."""

    def charged(call: Call) -> float:
        return charges.of(owner_of(call))

    first = min(calls, key=charged)
    ready = [(charged(call), number, call) for number, call in enumerate(calls) if call.backward == first.backward]
    heapify(ready)
    rows: list[tuple[Call, int]] = []
    shortest = longest = 0
    while ready:
        before, number, call = heappop(ready)
        if before != charged(call):  # another call of its owner has had a row since
            heappush(ready, (charged(call), number, call))
            continue
        length = _length(call, call.waiting[-1])
        low, high = (min(shortest, length), max(longest, length)) if rows else (length, length)
        fits = max_tokens is None or (len(rows) + 1) * high <= max_tokens
        if rows and not (fits and high - low <= max(WORTH_PADDING, low)):
            continue
        shortest, longest = low, high
        rows.append((call, call.waiting.pop()))
        charges.charge(owner_of(call), length)
        if call.waiting:
            heappush(ready, (charged(call), number, call))
    return Chosen(rows)


def _length(call: Call, index: int) -> int:
    return len(call.rows[index].tokens)
