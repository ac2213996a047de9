"""Loads, unloads, training, publications and requests that vanish, all at once: no wrong row, and nothing is left."""

from __future__ import annotations

import os
import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.engine.tenants import config, row
from tests.patience import HANG_S, until
from tests.serving.harness import SMALL, Collector, prompt, serving

from roadie.engine import AdamSettings, TrainingSettings
from roadie.errors import QueueFull, RoadieError, UnknownAdapter
from roadie.serving import ContinuousBatchingEngine, FinishReason, Registry, Unload

ROUNDS = int(os.environ.get("ROADIE_CHURN_ROUNDS", "40"))
FIXED = [None, "a0", "a1", "a2"]
COMING = ["a4", "a5", "a6"]
SETTINGS = replace(SMALL, num_slots=6)


def asked(number: int, adapter: str | None) -> tuple[list[int], dict[str, object]]:
    """A prompt of few kinds, so that what is right is known beforehand."""
    return prompt(number % 5, 6 + number % 5), {"max_tokens": 6}


def right_answers(model, root) -> dict[tuple[int, str | None], list[int]]:
    with serving(model, root, SETTINGS) as collector:
        requests = {}
        for name in (*FIXED, *COMING):
            for number in range(5):
                ids, rules = asked(number, name)
                requests[number, name] = collector.submit(ids, name, **rules)
            collector.wait()
        return {key: collector.tokens(request) for key, request in requests.items()}


def ask(collector: Collector, chance: random.Random) -> list[tuple[int, str | None, str]]:
    """Requests for adapters that stay, of which some vanish; those that are to be answered."""
    kept = []
    for _ in range(ROUNDS):
        number, name = chance.randrange(5), chance.choice([*FIXED, *COMING])
        ids, rules = asked(number, name)
        try:
            request = collector.submit(ids, name, tenant=str(number), **rules)
        except (UnknownAdapter, QueueFull):
            continue
        if chance.random() < 0.3:
            collector.engine.cancel(request)
        else:
            kept.append((number, name, request))
        if chance.random() < 0.2:
            collector.wait(request)
    return kept


def load(collector: Collector, chance: random.Random) -> None:
    for _ in range(ROUNDS // 2):
        name = chance.choice(COMING)
        how = chance.choice([Unload.WAIT, Unload.REFUSE, Unload.CANCEL])
        for future in (
            collector.engine.unload_adapter(name, how),
            collector.engine.load_adapter(name, replace=True),
        ):
            _done(future)


def train(collector: Collector, chance: random.Random, tenant: str) -> None:
    """A tenant who comes, learns, publishes, samples, and goes, a few times."""
    engine, tenants = collector.engine, collector.engine.training
    for life in range(max(1, ROUNDS // 10)):
        tenants.create(tenant, config(chance.randrange(6)))
        for number in range(3):
            tenants.forward_backward(tenant, [row(number, chance.randrange(2, 12))], "cross_entropy")
            _done(tenants.optim_step(tenant, AdamSettings(1e-2)))
            if _done(engine.publish(tenant)):
                request = collector.submit(prompt(number, 5), tenant, max_tokens=3)
                collector.wait(request)
                assert collector.last(request).finish is FinishReason.LENGTH, collector.last(request)
        _done(engine.unload_adapter(tenant, Unload.WAIT))
        assert tenants.remove(tenant).result(HANG_S) is None, life


def _done(future: Future) -> bool:
    """Whether it went well; that it was refused is right, too."""
    error = future.exception(HANG_S)
    assert error is None or isinstance(error, RoadieError), error
    return error is None


@pytest.mark.slow
def test_no_row_is_wrong_and_nothing_is_left(model, root):
    right = right_answers(model, root)
    engine = ContinuousBatchingEngine(
        model, None, Registry.open(root), SETTINGS, training=TrainingSettings(max_tokens_per_pass=32)
    )
    engine.start()
    collector = Collector(engine)
    try:
        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask, collector, random.Random(seed)) for seed in range(3)]
            others = [pool.submit(load, collector, random.Random(7))]
            others += [pool.submit(train, collector, random.Random(8 + n), f"tenant{n}") for n in range(3)]
            for future in others:
                future.result()
            kept = [one for future in asking for one in future.result()]
        collector.wait()
        answered = 0
        for number, name, request in kept:
            finish = collector.last(request).finish
            if name in FIXED:
                assert finish is FinishReason.LENGTH, (name, collector.last(request))
            if finish is FinishReason.LENGTH:
                answered += 1
                assert collector.tokens(request) == right[number, name], (number, name)
        assert answered > len(kept) // 3
        until(lambda: engine.statistics().num_blocks_free == SETTINGS.num_blocks)
        found = engine.statistics()
        assert (found.num_running, found.num_queued, found.num_slots_leased) == (0, 0, 0)
        assert (found.num_training_tenants, found.num_training_waiting, found.num_training_failed) == (0, 0, 0)
        assert engine.training.bank.families == []
        assert not any(status.name.startswith("tenant") for status in engine.adapters())
    finally:
        engine.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
