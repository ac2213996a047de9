"""Which replica gets a request: the least loaded one, and of two that are about equally loaded the one that has the adapter.

    cost = requests that the replica has + PENALTY where it does not have the adapter

An adapter of RoAd is a few MiB, so that a replica which does not have it loads it in milliseconds. Queueing behind others
takes longer. So an adapter is worth the wait behind `PENALTY` requests, and not more: a popular adapter spreads over all
replicas, and rare ones stay where they are. (docs/decisions/0016.)

What a replica has is what it reported last (`record_routing_stats`) and what was sent to it since. Queue lengths are Serve's:
each router counts what it sends, and replicas report theirs.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from roadie.bank.blends import Blend, parse
from roadie.errors import RoutingError
from roadie.serving.engine import AdapterWish

PENALTY = 2.0
MAX_REMEMBERED = 4096
"""Adapters that a router remembers of one replica."""
RESIDENTS = "adapters"
Replica = TypeVar("Replica")


@dataclass(frozen=True)
class Standing:
    """A replica as a router sees it. num_requests: None: not known yet."""

    num_requests: int | None
    residents: Collection[str]


def cost(standing: Standing, wanted: Sequence[str], penalty: float = PENALTY) -> float:
    """In requests: how long a replica will make a request wait that wants these adapters."""
    missing = any(name not in standing.residents for name in wanted)
    return float(standing.num_requests or 0) + penalty * missing


def ranked(
    standings: Mapping[Replica, Standing], wanted: Sequence[str], draw: random.Random, penalty: float = PENALTY
) -> list[Replica]:
    """Replicas, the best first; equal ones in any order."""
    order = list(standings)
    draw.shuffle(order)
    return sorted(order, key=lambda replica: cost(standings[replica], wanted, penalty))


def names_of(wish: AdapterWish) -> tuple[str, ...]:
    """The adapters that a request needs; none for the base model, or for what is no wish at all."""
    try:
        key = parse(wish)
    except RoutingError:
        return ()
    if key is None:
        return ()
    return key.names if isinstance(key, Blend) else (key,)


class AdapterRouter(FIFOMixin, RequestRouter):
    """Serve's router with the choice above. It offers all replicas in order; Serve passes over those that are full.

    First in, first out: Serve knows pending requests by the id of the HTTP request, which all prompts of one share, so that it
    cannot tell them apart; a replica that was found is the first pending one's.
    """

    def initialize_state(self, penalty: float = PENALTY, **others: Any) -> None:
        """penalty: see the module."""
        self._penalty = penalty
        self._draw = random.Random()
        self._sent: dict[Any, OrderedDict[str, None]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas as `ranked` has them, each a rank of its own."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        standings = {replica_id: self._standing(replica) for replica_id, replica in by_id.items()}
        order = ranked(standings, _wanted(pending_request), self._draw, self._penalty)
        return [[by_id[replica_id]] for replica_id in order]

    def _standing(self, replica: RunningReplica) -> Standing:
        reported = replica.routing_stats.get(RESIDENTS, ()) if replica.routing_stats else ()
        sent = self._sent.get(replica.replica_id, ())
        return Standing(self.replica_queue_len_cache.get(replica.replica_id), {*reported, *sent})

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """The replica will have these adapters."""
        sent = self._sent.setdefault(replica_id, OrderedDict())
        for name in _wanted(pending_request):
            sent[name] = None
            sent.move_to_end(name)
        while len(sent) > MAX_REMEMBERED:
            sent.popitem(last=False)

    def update_replicas(self, replicas: Iterable[RunningReplica]) -> None:
        """Replicas that are gone are forgotten; what one has reported takes the place of what was sent to it."""
        replicas = list(replicas)
        there = {replica.replica_id: replica for replica in replicas}
        self._sent = {
            replica_id: sent
            for replica_id, sent in self._sent.items()
            if replica_id in there and not there[replica_id].routing_stats
        }
        super().update_replicas(replicas)


def _wanted(pending_request: PendingRequest | None) -> tuple[str, ...]:
    if pending_request is None or not pending_request.args:
        return ()
    asked = pending_request.args[0]
    return tuple(getattr(asked, "names", ()))
