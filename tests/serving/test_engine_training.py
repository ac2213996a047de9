"""Tenants train in the loop of the server's engine, and requests are answered by their newest weights."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.engine.tenants import config, row
from tests.patience import HANG_S, until
from tests.serving.harness import SMALL, Collector, prompt, serving

from roadie import checkpoint
from roadie.engine import AdamSettings, TrainingEngine, TrainingRow, TrainingSettings
from roadie.engine.turns import TurnSettings
from roadie.errors import AdapterBusy, ConfigError, ServingError, ShuttingDown, UnknownAdapter
from roadie.serving import AdapterState, ContinuousBatchingEngine, EngineSettings, OnDisk, Registry, Unload
from roadie.serving.http.metrics import Metrics
from roadie.testing import tiny_llama

STEP = AdamSettings(0.05)


@contextmanager
def training(model, root, settings: EngineSettings = SMALL, **sizes):
    engine = ContinuousBatchingEngine(model, None, Registry.open(root), settings, training=TrainingSettings(**sizes))
    engine.start()
    try:
        yield Collector(engine)
    finally:
        engine.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def learn(collector: Collector, tenant: str, *seeds: int) -> None:
    """Steps, and then the weights are published."""
    for seed in seeds:
        collector.engine.training.forward_backward(tenant, [row(seed, 9)], "cross_entropy")
        collector.engine.training.optim_step(tenant, STEP)
    assert collector.engine.publish(tenant).result(HANG_S).state is AdapterState.RESIDENT


def answer(collector: Collector, adapter: str | None, **rules) -> list[int]:
    request = collector.submit(prompt(7, 20), adapter, max_tokens=10, **rules)
    collector.wait(request)
    return collector.tokens(request)


def test_answers_are_those_of_the_newest_weights(model, root):
    with training(model, root) as collector:
        collector.engine.training.create("t", config(0))
        answers, states = [], []
        for step in range(3):
            learn(collector, "t", step)
            answers.append(answer(collector, "t"))
            states.append(collector.engine.training.state("t").result(HANG_S))
    assert len(set(map(tuple, answers))) > 1
    for number, state in enumerate(states):
        checkpoint.save(state.adapter, root / f"v{number}")
    with serving(model, root) as collector:
        assert [answer(collector, f"v{number}") for number in range(3)] == answers


def test_an_adapter_that_nobody_trains_here_is_given(model, root):
    with training(model, root) as collector:
        collector.engine.training.create("t", config(0))
        learn(collector, "t", 0)
        wanted = answer(collector, "t")
        adapter = collector.engine.training.state("t").result(HANG_S).adapter
        for _ in range(2):  # the second time it replaces the first
            assert collector.engine.give_adapter("again", adapter).result(HANG_S).state is AdapterState.RESIDENT
        assert answer(collector, "again") == wanted
        assert "again" not in collector.engine._registry.entries
        collector.engine.unload_adapter("again").result(HANG_S)
        with pytest.raises(UnknownAdapter):
            answer(collector, "again")


def test_sampler_and_trainer_agree_on_logprobs_in_mixed_batches(model, root):
    kinds = range(5)
    with training(model, root) as collector:
        tenants = collector.engine.training
        for kind in kinds:
            tenants.create(f"t{kind}", config(kind))
            learn(collector, f"t{kind}", kind, kind + 1)
        prompts = {f"t{kind}": prompt(kind, 5 + 3 * kind) for kind in kinds}
        requests = {
            name: collector.submit(ids, name, max_tokens=12, temperature=1.0, seed=3, logprobs=0)
            for name, ids in prompts.items()
        }
        collector.wait()
        futures = {}
        for name, request in requests.items():
            whole = [*prompts[name], *collector.tokens(request)]
            weights = [0.0] * (len(prompts[name]) - 1) + [1.0] * 12
            futures[name] = tenants.forward(name, [TrainingRow(whole[:-1], whole[1:], weights)], "cross_entropy")
        errors = []
        for name, request in requests.items():
            sampled = [token.logprob for output in collector.outputs[request] for token in output.logprobs]
            trained = futures[name].result(HANG_S).logprobs[0][-12:].tolist()
            errors += [abs(one - other) for one, other in zip(sampled, trained, strict=True)]
    assert len(errors) == 60
    assert sorted(errors)[30] <= 1e-5
    assert max(errors) <= 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_beside_a_server_is_a_step_without(attention, root):
    alone = TrainingEngine(tiny_llama())
    alone.create("t", config(0))
    rows = [row(1, 9), row(2, 5)]
    expected = [alone.forward_backward("t", rows, "cross_entropy"), alone.optim_step("t", STEP)]
    alone.run()
    model = tiny_llama().eval()
    model.set_attn_implementation(attention)
    with training(model, root) as collector:
        running = collector.submit(prompt(7, 20), "a0", max_tokens=10)
        tenants = collector.engine.training
        tenants.create("t", config(0))
        found = [tenants.forward_backward("t", rows, "cross_entropy"), tenants.optim_step("t", STEP)]
        assert found[0].result(HANG_S).loss == pytest.approx(expected[0].result().loss, rel=1e-6)
        assert found[1].result(HANG_S).gradient_norm == pytest.approx(expected[1].result().gradient_norm, rel=1e-5)
        collector.wait(running)
    assert model.config._attn_implementation == attention


def test_a_running_request_keeps_the_weights_it_started_with(model, root):
    with training(model, root) as collector:
        collector.engine.training.create("t", config(0))
        learn(collector, "t", 1)
        before = answer(collector, "t")
        with collector.held(3):
            running = collector.submit(prompt(7, 20), "t", max_tokens=10)
            collector.wait(running, num_tokens=3)
            learn(collector, "t", 2, 3, 4)
        collector.wait(running)
        assert collector.tokens(running) == before
        assert answer(collector, "t") != before


def test_requests_are_answered_as_without_training(model, root):
    with serving(model, root) as collector:
        expected = [answer(collector, name) for name in (None, "a0", "a1")]
    with training(model, root, max_tokens_per_pass=24) as collector:
        tenants = collector.engine.training
        for kind in range(3):
            tenants.create(f"t{kind}", config(kind))
        calls = [tenants.forward_backward(f"t{n % 3}", [row(n, 12), row(n + 1, 9)], "cross_entropy") for n in range(30)]
        found = [answer(collector, name) for name in (None, "a0", "a1")]
        assert all(call.result(HANG_S).loss > 0 for call in calls)
        statistics = collector.engine.statistics()
        shown = Metrics(collector.engine, 8).text(with_names=False).decode()
    assert found == expected
    assert "roadie_training_share 0.5\n" in shown
    assert f"roadie_training_passes_total {float(statistics.num_training_passes)}\n" in shown
    assert statistics.num_training_tenants == 3
    assert statistics.num_training_passes >= 30
    assert statistics.num_training_tokens >= 30 * 21
    assert statistics.seconds_training > 0
    assert statistics.num_training_waiting == statistics.num_training_failed == 0


def test_published_adapters_come_and_go_like_others(model, root):
    with training(model, root) as collector:
        engine = collector.engine
        engine.training.create("t", config(0))
        learn(collector, "t", 1)
        assert engine.publish("t", "other").result(HANG_S).name == "other"
        assert answer(collector, "other") == answer(collector, "t") != answer(collector, None)
        (status,) = [status for status in engine.adapters() if status.name == "t"]
        assert (status.state, status.on_disk, status.path) == (AdapterState.RESIDENT, OnDisk.SAME, "memory:t")
        assert engine.has_adapter("t")
        with pytest.raises(ConfigError, match="got 't', which has no files to be found by later"):
            engine.pin_adapter("t").result(HANG_S)
        with pytest.raises(ConfigError, match="got 'a0', which is an adapter with files"):
            engine.publish("t", "a0").result(HANG_S)
        with pytest.raises(ConfigError, match="got adapter name"):
            engine.publish("t", "../t").result(HANG_S)
        engine.unload_adapter("t", Unload.WAIT).result(HANG_S)
        with pytest.raises(UnknownAdapter):
            collector.submit(prompt(1, 4), "t")
        assert answer(collector, "other")
        learn(collector, "t", 2)
        assert answer(collector, "t")
        engine.load_adapter("t", str(root / "a0"), replace=True).result(HANG_S)
        assert answer(collector, "t") == answer(collector, "a0")
    assert not (root / "t").exists()
    assert "other" not in Registry.open(root)


def test_more_are_published_than_there_are_slots(model, root):
    with training(model, root) as collector:
        names = [f"t{number}" for number in range(7)]
        for number, name in enumerate(names):
            collector.engine.training.create(name, config(number))
            learn(collector, name, number)
        first = {name: answer(collector, name) for name in names}
        assert {name: answer(collector, name) for name in reversed(names)} == first
        assert collector.engine.statistics().num_evictions > 0


def test_all_slots_are_in_use_when_weights_are_published(model, root):
    with training(model, root, replace(SMALL, num_slots=1)) as collector:
        collector.engine.training.create("t", config(0))
        learn(collector, "t", 1)
        before = answer(collector, "t")
        with collector.held(2):
            running = collector.submit(prompt(7, 20), "t", max_tokens=10)
            collector.wait(running, num_tokens=2)
            learn(collector, "t", 2, 3)  # into the slot to spare
            tenants = collector.engine.training
            tenants.forward_backward("t", [row(5, 9)], "cross_entropy")
            tenants.optim_step("t", STEP)
            published = collector.engine.publish("t").result(HANG_S)
            assert published.state is not AdapterState.RESIDENT
            waiting = collector.submit(prompt(7, 20), "t", max_tokens=10)
        collector.wait(running, waiting)
        assert collector.tokens(running) == before
        assert collector.tokens(waiting) == answer(collector, "t") != before


def test_an_unload_that_is_under_way_is_not_undone(model, root):
    with training(model, root) as collector:
        collector.engine.training.create("t", config(0))
        learn(collector, "t", 1)
        with collector.held(2):
            running = collector.submit(prompt(7, 20), "t", max_tokens=10)
            collector.wait(running, num_tokens=2)
            unloading = collector.engine.unload_adapter("t", Unload.WAIT)
            with pytest.raises(AdapterBusy, match="which is being unloaded"):
                collector.engine.publish("t").result(HANG_S)
        unloading.result(HANG_S)


def test_training_gives_way_where_it_has_no_share(model, root):
    settings = replace(SMALL, turns=TurnSettings(0.0))
    with training(model, root, settings) as collector:
        collector.engine.training.create("t", config(0)).result(HANG_S)
        with collector.held(4):
            running = collector.submit(prompt(7, 20), None, max_tokens=10)
            collector.wait(running, num_tokens=4)
            call = collector.engine.training.forward_backward("t", [row(1, 9)], "cross_entropy")
            until(lambda: collector.engine.statistics().num_steps > 50)
            assert not call.done()
        collector.wait(running)
        assert call.result(HANG_S).loss > 0


def test_an_engine_that_samples_alone_says_so(model, root):
    with serving(model, root) as collector, pytest.raises(ServingError, match="got an engine that samples alone"):
        collector.engine.publish("t")


def test_what_waits_when_the_engine_stops_fails(model, root):
    with training(model, root, replace(SMALL, turns=TurnSettings(0.0))) as collector:
        collector.engine.training.create("t", config(0)).result(HANG_S)
        with collector.held(2):
            running = collector.submit(prompt(7, 20), None, max_tokens=10)
            collector.wait(running, num_tokens=2)
            call = collector.engine.training.forward_backward("t", [row(1, 9)], "cross_entropy")
            collector.engine.stop()
    assert isinstance(call.exception(HANG_S), ShuttingDown)
    with pytest.raises(ShuttingDown):
        collector.engine.training.create("u", config(0))
    assert torch.is_grad_enabled()
