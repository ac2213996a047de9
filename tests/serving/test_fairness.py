"""Who is next: nobody starves, and a flood waits for itself."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from roadie.serving.fairness import FairQueue


@dataclass(eq=False)
class Job:
    tenant: str
    flow: str
    tokens: int


def start_next(queue: FairQueue[Job]) -> Job:
    """As the engine does it: the first in turn starts, and is charged."""
    job = next(queue.in_turn(lambda tenant: True))
    queue.remove(job)
    queue.charge(job.tenant, job.flow, job.tokens)
    return job


def test_a_flood_waits_for_itself() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(900):
        queue.push(Job("flood", "a", 10))
    for _ in range(100):
        queue.push(Job("small", "b", 10))
    started = [start_next(queue).tenant for _ in range(200)]
    assert started.count("small") == 100


def test_turns_are_by_tokens_and_weight() -> None:
    queue: FairQueue[Job] = FairQueue({"heavy": 2.0})
    for _ in range(300):
        queue.push(Job("long", "x", 40))
        queue.push(Job("short", "x", 10))
        queue.push(Job("heavy", "x", 10))
    tokens: dict[str, int] = {}
    for _ in range(210):
        job = start_next(queue)
        tokens[job.tenant] = tokens.get(job.tenant, 0) + job.tokens
    assert abs(tokens["long"] - tokens["short"]) <= 40
    assert abs(tokens["heavy"] - 2 * tokens["short"]) <= 80


def test_the_adapters_of_a_tenant_take_turns_and_each_is_first_come_first_served() -> None:
    queue: FairQueue[Job] = FairQueue()
    popular = [Job("t", "popular", 10) for _ in range(50)]
    rare = [Job("t", "rare", 10) for _ in range(5)]
    for job in (*popular, *rare):
        queue.push(job)
    started = [start_next(queue) for _ in range(10)]
    assert [job for job in started if job.flow == "rare"] == rare
    assert [job for job in started if job.flow == "popular"] == popular[:5]


def test_idleness_earns_nothing_and_costs_nothing() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(100):
        queue.push(Job("busy", "x", 10))
    for _ in range(50):
        start_next(queue)
    for _ in range(50):
        queue.push(Job("late", "x", 10))
    started = [start_next(queue).tenant for _ in range(40)]
    assert 19 <= started.count("late") <= 21
    while len(queue):
        start_next(queue)
    for tenant in ("busy", "late"):
        queue.push(Job(tenant, "x", 10))
    assert {start_next(queue).tenant for _ in range(2)} == {"busy", "late"}


def test_being_served_alone_costs_nothing_later() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(100):  # nobody else wanted anything
        queue.push(Job("early", "x", 10))
        start_next(queue)
    for _ in range(50):
        queue.push(Job("late", "x", 10))
    for _ in range(50):
        queue.push(Job("early", "x", 10))
    started = [start_next(queue).tenant for _ in range(40)]
    assert 19 <= started.count("late") <= 21


def test_what_was_not_used_is_given_back() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(20):
        queue.push(Job("modest", "x", 100))
        queue.push(Job("greedy", "x", 10))
    started = []
    for _ in range(20):
        job = start_next(queue)
        started.append(job.tenant)
        if job.tenant == "modest":
            queue.charge("modest", "x", -90)  # it asked for 100 tokens and generated 10
    assert started.count("modest") == 10


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 50)), max_size=60))
def test_everyone_is_served_once_and_counts_are_right(jobs: list[tuple[str, str, int]]) -> None:
    queue: FairQueue[Job] = FairQueue()
    waiting = [Job(*job) for job in jobs]
    for job in waiting:
        queue.push(job)
    assert queue.by_tenant() == {
        tenant: sum(job.tenant == tenant for job in waiting) for tenant in {j.tenant for j in waiting}
    }
    started = [start_next(queue) for _ in waiting]
    assert set(started) == set(waiting)
    assert len(queue) == len(list(queue)) == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), min_size=20, max_size=120))
def test_backlogged_tenants_are_never_further_apart_than_one_request(jobs: list[tuple[str, int]]) -> None:
    """The law of fair queueing: while two tenants both wait, their tokens differ by no more than their longest request."""
    queue: FairQueue[Job] = FairQueue()
    for tenant, tokens in jobs:
        queue.push(Job(tenant, "x", tokens))
    served = dict.fromkeys({tenant for tenant, _ in jobs}, 0)
    longest = max(tokens for _, tokens in jobs)
    while len(queue):
        waiting = set(queue.by_tenant())
        counts = [served[tenant] for tenant in waiting]
        assert max(counts) - min(counts) <= longest
        job = start_next(queue)
        served[job.tenant] += job.tokens
