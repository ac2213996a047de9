"""Who is next: waiting requests, fair by tokens between tenants, and between the adapters of a tenant.

Every tenant has a counter of the tokens that it was charged, divided by its weight; the tenant with the lowest counter is next,
and within it the adapter with the lowest counter, first come first served. A request is charged for its prompt and all the
tokens it may generate when it starts, and what it did not generate is given back when it ends. Who comes back from idleness
starts no lower than whoever started last: idleness earns nothing, and being served alone costs nothing.

So a tenant that floods the queue waits for itself: between two requests of another tenant it can start at most the tokens
that the other is behind by, however many it has waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from roadie.engine.charges import Charges


class Waiting(Protocol):
    """What can wait in the queue."""

    @property
    def tenant(self) -> str:
        """Who is charged."""

    @property
    def flow(self) -> Hashable:
        """What it shares the tenant's turn with: equal flows are first come, first served."""


Item = TypeVar("Item", bound=Waiting)


class FairQueue(Generic[Item]):
    """Requests that wait; not thread-safe."""

    def __init__(self, tenant_weights: Mapping[str, float] | None = None) -> None:
        self._queues: dict[str, dict[Hashable, deque[Item]]] = {}
        self._tenants: Charges[str] = Charges(tenant_weights)
        self._flows: dict[str, Charges[Hashable]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Item]:
        return (item for flows in self._queues.values() for queue in flows.values() for item in queue)

    def num_of(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        return sum(map(len, self._queues.get(tenant, {}).values()))

    def by_tenant(self) -> dict[str, int]:
        """How many requests of each tenant wait."""
        return {tenant: self.num_of(tenant) for tenant in self._queues}

    def push(self, item: Item) -> None:
        """A request comes to wait."""
        tenant = item.tenant
        if tenant not in self._queues:
            self._tenants.forget_idle(self._queues.__contains__)
            self._tenants.join(tenant)
            self._queues[tenant] = {}
            self._flows.setdefault(tenant, Charges())
        flows = self._queues[tenant]
        if item.flow not in flows:
            self._flows[tenant].forget_idle(flows.__contains__)
            self._flows[tenant].join(item.flow)
            flows[item.flow] = deque()
        flows[item.flow].append(item)
        self._size += 1

    def remove(self, item: Item) -> None:
        """A request leaves, started or not."""
        flows = self._queues[item.tenant]
        flows[item.flow].remove(item)
        self._size -= 1
        if not flows[item.flow]:
            del flows[item.flow]
        if not flows:
            del self._queues[item.tenant]

    def in_turn(self, may_start: Callable[[str], bool]) -> Iterator[Item]:
        """The first request of every flow, whose turn it is first; of tenants that may start one. Do not change it meanwhile."""
        for tenant in sorted(filter(may_start, self._queues), key=self._tenants.of):
            flows = self._queues[tenant]
            for flow in sorted(flows, key=self._flows[tenant].of):
                yield flows[flow][0]

    def charge(self, tenant: str, flow: Hashable, tokens: float) -> None:
        """Charge a tenant, and its flow, for tokens; negative: give them back."""
        self._tenants.charge(tenant, tokens)
        if tenant in self._flows:
            self._flows[tenant].charge(flow, tokens)
        if tenant not in self._queues and len(self._flows) > 4096:
            self._flows = {name: counters for name, counters in self._flows.items() if name in self._queues}
