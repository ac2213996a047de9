"""Adapters come, change and go while requests run: none fails, none sees two versions, and a crash forgets nothing."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.patience import HANG_S, until
from tests.serving.harness import SMALL, adapters_of, prompt, serving

from roadie import checkpoint
from roadie.bank import AdapterBank
from roadie.errors import AdapterBusy, AdapterError, CheckpointError, ConfigError, UnknownAdapter
from roadie.serving import AdapterState, FinishReason, Registry, Unload
from roadie.testing import tiny_llama


def state(collector: Any, name: str) -> AdapterState:
    return next(one.state for one in collector.engine.adapters() if one.name == name)


def test_a_replacement_under_traffic_fails_nothing_and_mixes_nothing(model: Any, adapters: Any, root: Path) -> None:
    """Every request is whole in one version; those that ran at the replacement keep the old one, later ones have the new."""
    with serving(model, root) as collector:
        asked = {collector.submit(prompt(0, 10), "a0", max_tokens=60): (prompt(0, 10), "a0")}
        collector.wait(*asked, num_tokens=3)
        before = "a0"
        for source in ["a1", "a2", "a3"] * 3:
            collector.wait(*asked)  # what runs in the block below holds two slots of four, and ends after it
            with collector.held(2):
                running = {collector.submit(prompt(one, 10), "a0", max_tokens=90): prompt(one, 10) for one in range(3)}
                collector.wait(*running, num_tokens=2)
                collector.engine.load_adapter("a0", str(root / source), replace=True).result(HANG_S)
                assert not any(collector.last(one).finish for one in running)
            asked |= {one: (prompt_ids, before) for one, prompt_ids in running.items()}
            asked[collector.submit(prompt(9, 10), "a0", max_tokens=20)] = (prompt(9, 10), source)
            before = source
        collector.wait()
        assert {collector.last(one).finish for one in asked} == {FinishReason.LENGTH}
        statistics = collector.engine.statistics()
        assert (statistics.num_slots_leased, statistics.num_failed) == (0, 0)
    reference, verdict = GreedyReference(model, adapters), GreedyVerdict()
    for request_id, (prompt_ids, source) in asked.items():
        verdict += reference.check(prompt_ids, source, collector.tokens(request_id))
    assert (verdict.num_tokens, verdict.num_wrong) == (60 + 9 * (3 * 90 + 20), 0)


@dataclass(frozen=True)
class Change:
    """A name got another adapter, at some moment between these two."""

    begin_s: float
    end_s: float
    source: str


def sources_while(changes: Sequence[Change], begin_s: float, end_s: float) -> set[str]:
    """What a name may have been at some moment from begin to end."""
    replaced = [*(change.end_s for change in changes[1:]), math.inf]
    return {
        change.source
        for change, until in zip(changes, replaced, strict=True)
        if change.begin_s <= end_s and until >= begin_s
    }


NUM_ASKED, NUM_AT_ONCE, NUM_CHANGES = 200, 32, 24


def test_random_loads_replacements_and_unloads_under_traffic(model: Any, adapters: Any, root: Path) -> None:
    """Of both as many as there must be; every request is whole in one of the versions its name had while it was live."""
    stop, turns = threading.Event(), random.Random(1)
    changes = {f"a{one}": [Change(0.0, 0.0, f"a{one}")] for one in range(4)}

    def change(collector: Any) -> None:
        while not stop.is_set():
            name, source = f"a{turns.randrange(4)}", f"a{turns.randrange(4, 8)}"
            if turns.random() < 0.3:
                collector.engine.unload_adapter(name, Unload.WAIT).result(HANG_S)
            begin = time.monotonic()
            collector.engine.load_adapter(name, str(root / source), replace=True).result(HANG_S)
            changes[name].append(Change(begin, time.monotonic(), source))

    asked: dict[str, tuple[list[int], str, float]] = {}
    with serving(model, root) as collector:
        changer = threading.Thread(target=change, args=(collector,))
        changer.start()
        rng = random.Random(0)
        while len(asked) <= NUM_ASKED or sum(map(len, changes.values())) <= NUM_CHANGES:
            assert changer.is_alive(), "a change failed"
            wish, prompt_ids, now = f"a{rng.randrange(4)}", prompt(rng.randrange(8), 17), time.monotonic()
            with contextlib.suppress(UnknownAdapter):  # it is unloaded for a moment
                asked[collector.submit(prompt_ids, wish, max_tokens=rng.randrange(1, 30))] = (prompt_ids, wish, now)
            time.sleep(0.01)
            collector.wait(*list(asked)[:-NUM_AT_ONCE])
        stop.set()
        changer.join(HANG_S)
        collector.wait(*asked)
        assert {collector.last(one).finish for one in asked} == {FinishReason.LENGTH}
        statistics = collector.engine.statistics()
        assert statistics.num_cached_prompt_tokens > 0
        assert statistics.num_blocks_free == statistics.num_blocks
        assert (statistics.num_slots_leased, statistics.num_failed) == (0, 0)
    reference = GreedyReference(model, adapters)
    for request_id, (prompt_ids, wish, begin_s) in asked.items():
        sources = sources_while(changes[wish], begin_s, collector.heard_s[request_id])
        checks = (reference.check(prompt_ids, source, collector.tokens(request_id)) for source in sources)
        assert any(verdict.num_wrong == 0 for verdict in checks), (request_id, wish, sources)


def test_a_blend_of_a_replaced_adapter_is_made_anew_and_fails_alone(model: Any, adapters: Any, root: Path) -> None:
    wish = {"a0": 0.5, "a3": 0.5}
    with serving(model, root, replace(SMALL, num_slots=8)) as collector:
        old = collector.submit(prompt(0, 8), wish, max_tokens=100)
        collector.wait(old, num_tokens=2)
        collector.engine.load_adapter("a0", str(root / "a6"), replace=True).result(HANG_S)
        new = collector.submit(prompt(0, 8), wish)
        collector.wait(new)
        collector.engine.load_adapter("a0", str(root / "a1"), replace=True).result(HANG_S)  # of another group size
        impossible = collector.submit(prompt(0, 8), wish)
        collector.wait()
        assert collector.last(impossible).finish is FinishReason.FAILED
        assert "group" in str(collector.last(impossible).error)
        assert collector.engine.is_ready
    reference = GreedyReference(model, {**adapters, "a0": adapters["a6"]})
    assert reference.check(prompt(0, 8), wish, collector.tokens(new)).num_wrong == 0
    assert GreedyReference(model, adapters).check(prompt(0, 8), wish, collector.tokens(old)).num_wrong == 0


def test_unloading_waits_refuses_or_cancels(model: Any, root: Path) -> None:
    with serving(model, root) as collector:
        with collector.held(2):
            running = collector.submit(prompt(0, 8), {"a0": 0.5, "a3": 0.5}, max_tokens=60)
            collector.wait(running, num_tokens=2)
            with pytest.raises(AdapterBusy, match="1 requests"):
                collector.engine.unload_adapter("a0", Unload.REFUSE).result(HANG_S)
            collector.submit(prompt(0, 8), "a0")
            waiting = collector.engine.unload_adapter("a0", Unload.WAIT)
            with pytest.raises(UnknownAdapter, match="being unloaded"):
                collector.submit(prompt(0, 8), "a0")
            with pytest.raises(AdapterBusy):
                collector.engine.unload_adapter("a0").result(HANG_S)
        waiting.result(HANG_S)
        assert collector.last(running).finish is FinishReason.LENGTH
        with pytest.raises(UnknownAdapter):
            collector.submit(prompt(0, 8), "a0")
        with collector.held(2):
            cancelled = collector.submit(prompt(0, 8), "a1", max_tokens=100)
            collector.wait(cancelled, num_tokens=2)
            collector.engine.unload_adapter("a1", Unload.CANCEL).result(HANG_S)
        assert collector.last(cancelled).finish is FinishReason.CANCELLED
        with pytest.raises(UnknownAdapter):
            collector.engine.unload_adapter("a1").result(HANG_S)
        collector.engine.load_adapter("a0").result(HANG_S)
        again = collector.submit(prompt(0, 8), "a0")
        collector.wait(again)
        assert collector.last(again).finish is FinishReason.LENGTH


def test_states_are_visible(model: Any, root: Path) -> None:
    with serving(model, root) as collector:
        assert {one.state for one in collector.engine.adapters()} == {AdapterState.KNOWN}
        with collector.held(1):
            ids = [collector.submit(prompt(0, 8), "a1", max_tokens=30) for _ in range(3)]
            collector.wait(*ids, num_tokens=1)
            status = next(one for one in collector.engine.adapters() if one.name == "a1")
            assert (status.state, status.num_running, status.num_requests) == (AdapterState.RESIDENT, 3, 3)
            assert status.path == str(root / "a1")
        collector.wait()
        (root / "a2" / "adapter_model.safetensors").write_bytes(b"nonsense")
        failed = collector.submit(prompt(0, 8), "a2")
        collector.wait(failed)
        assert isinstance(collector.last(failed).error, CheckpointError)
        broken = next(one for one in collector.engine.adapters() if one.name == "a2")
        assert (broken.state, "corrupt" in str(broken.error)) == (AdapterState.BROKEN, True)
        status = next(one for one in collector.engine.adapters() if one.name == "a1")
        assert status.num_tokens == 90


def test_a_load_that_fails_leaves_the_adapter_that_was_there(model: Any, adapters: Any, root: Path) -> None:
    other = tiny_llama(hidden_size=32)
    checkpoint.save(next(iter(adapters_of(other, 1).values())), root / "foreign")
    with serving(model, root) as collector:
        first = collector.submit(prompt(0, 8), "a0")
        collector.wait()
        with pytest.raises(AdapterError, match="outputs"):
            collector.engine.load_adapter("a0", "foreign", replace=True).result(HANG_S)
        with pytest.raises(CheckpointError):
            collector.engine.load_adapter("a0", "nowhere", replace=True).result(HANG_S)
        with pytest.raises(ConfigError, match="loaded already"):
            collector.engine.load_adapter("a0", "a1").result(HANG_S)
        with pytest.raises(ConfigError, match="name"):
            collector.engine.load_adapter("../a0", "a1").result(HANG_S)
        second = collector.submit(prompt(0, 8), "a0")
        collector.wait()
        assert collector.tokens(first) == collector.tokens(second)
        assert Registry.open(root).entries == {}


def test_a_name_that_is_dropped_into_the_folder_is_found(model: Any, adapters: Any, root: Path) -> None:
    with serving(model, root) as collector:
        with pytest.raises(UnknownAdapter):
            collector.submit(prompt(0, 8), "newcomer")
        checkpoint.save(adapters["a1"], root / "newcomer")
        ids = [collector.submit(prompt(0, 8), wish) for wish in ("newcomer", "a1")]
        collector.wait()
        assert collector.tokens(ids[0]) == collector.tokens(ids[1])


def test_what_is_in_a_slot_is_there_until_it_is_unloaded(model: Any, root: Path) -> None:
    """Whatever has become of its folder: listed, pinned and unpinned, and gone once it is unloaded."""
    with serving(model, root) as collector:
        engine = collector.engine

        def names() -> set[str]:
            return {one.name for one in engine.adapters()}

        for name in ("a0", "a1", "a2", "a3"):
            collector.submit(prompt(0, 8), name)
        collector.wait()
        first = collector.tokens("r0")
        shutil.rmtree(root / "a0")
        (root / "a1").rename(root / "renamed")
        shutil.rmtree(root / "a2")
        shutil.copytree(root / "a4", root / "a2")
        assert names() == {*(f"a{number}" for number in range(8)), "renamed"}
        found = {one.name: one.on_disk.value for one in engine.adapters()}
        wanted = {"a0": "gone", "a1": "gone", "a2": "changed", "a3": "same", "a5": "same"}
        assert {name: found[name] for name in wanted} == wanted
        assert state(collector, "a0") is AdapterState.RESIDENT
        assert state(collector, "renamed") is AdapterState.KNOWN
        again = collector.submit(prompt(0, 8), "a0")
        collector.wait()
        assert collector.tokens(again) == first
        assert engine.pin_adapter("a0").result(HANG_S).is_pinned
        assert not engine.pin_adapter("a0", False).result(HANG_S).is_pinned
        with pytest.raises(CheckpointError):
            engine.load_adapter("a0", replace=True).result(HANG_S)
        for name in ("a0", "a1"):
            engine.unload_adapter(name).result(HANG_S)
            assert name not in names()
            with pytest.raises(UnknownAdapter):
                collector.submit(prompt(0, 8), name)
            for verb in (engine.pin_adapter, engine.unload_adapter):
                with pytest.raises(UnknownAdapter):
                    verb(name).result(HANG_S)
        engine.load_adapter("a2", replace=True).result(HANG_S)
        assert next(one for one in engine.adapters() if one.name == "a2").on_disk.value == "same"
        assert Registry.open(root).entries == {}


def test_what_gave_its_slot_to_another_and_has_no_folder_is_not_there(model: Any, root: Path) -> None:
    with serving(model, root, replace(SMALL, num_slots=1)) as collector:
        for name in ("a0", "a1"):
            collector.submit(prompt(0, 8), name)
            collector.wait()
            shutil.rmtree(root / name)
        assert state(collector, "a1") is AdapterState.RESIDENT
        with pytest.raises(UnknownAdapter):
            collector.submit(prompt(0, 8), "a0")
        assert "a0" not in [one.name for one in collector.engine.adapters()]


def test_a_pinned_adapter_without_a_folder_is_said_at_the_start_and_can_be_let_go(
    model: Any, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model, root) as collector:
        collector.engine.pin_adapter("a3").result(HANG_S)
    shutil.rmtree(root / "a3")
    with serving(model, root) as collector:
        failed = collector.submit(prompt(0, 8), "a3")
        collector.wait()
        assert isinstance(collector.last(failed).error, CheckpointError)
        status = next(one for one in collector.engine.adapters() if one.name == "a3")
        assert (status.state, status.on_disk.value, status.is_pinned) == (AdapterState.BROKEN, "gone", True)
        collector.engine.unload_adapter("a3").result(HANG_S)
        with pytest.raises(UnknownAdapter):
            collector.submit(prompt(0, 8), "a3")
    assert "the pinned adapter a3 could not be loaded" in caplog.text
    assert Registry.open(root).entries == {}


def test_loading_does_not_hold_up_the_requests_that_run(model: Any, root: Path, monkeypatch: Any) -> None:
    """A load that takes until the others are done (a slow disk): they get tokens all the while."""
    read, is_there = Registry.read_folder, threading.Event()

    def read_folder(self: Registry, path: Path) -> Any:
        assert is_there.wait(HANG_S)
        return read(self, path)

    with serving(model, root) as collector:
        monkeypatch.setattr(Registry, "read_folder", read_folder)
        loading = collector.engine.load_adapter("a5")
        ids = [collector.submit(prompt(0, 8), None, max_tokens=20) for _ in range(4)]
        collector.wait(*ids)
        assert not loading.done()
        is_there.set()
        loading.result(HANG_S)


CRASH = """
import sys
from roadie.serving import Registry
from roadie.serving.registry import Entry
registry = Registry.open(sys.argv[1], allowed_roots=[sys.argv[2]])
registry.remember("outside", Entry(sys.argv[2] + "/x", False))
registry.pin("a1", True)
registry.forget("a2")
print("ready", flush=True)
number = 0
while True:
    number += 1
    registry.remember("spinning", Entry(sys.argv[2] + f"/{number}"))
    print(number, flush=True)
"""


def test_the_registry_survives_kill_9(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    command = [sys.executable, "-c", CRASH, str(root), str(outside)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        while int(child.stdout.readline()) < 20:
            pass
        child.send_signal(signal.SIGKILL)
    registry = Registry.open(root, allowed_roots=[outside])
    assert registry.entries["outside"].path == str(outside / "x")
    assert registry.entries["a1"].is_pinned
    assert "a2" not in registry
    assert int(Path(str(registry.entries["spinning"].path)).name) >= 20


def test_pinned_adapters_are_there_after_a_restart(model: Any, root: Path) -> None:
    with serving(model, root) as collector:
        collector.engine.pin_adapter("a3").result(HANG_S)
        collector.engine.unload_adapter("a4").result(HANG_S)
    with serving(model, root) as collector:
        until(lambda: state(collector, "a3") is AdapterState.RESIDENT)
        with pytest.raises(UnknownAdapter):
            collector.submit(prompt(0, 8), "a4")


def test_a_blend_holds_its_own_slot_only(model: Any, adapters: Any) -> None:
    with AdapterBank(model, 3) as bank:
        for name in ("a0", "a3"):
            bank.admit(name, adapters[name])
        held = bank.slots([{"a0": 0.5, "a3": 0.5}])
        bank.admit("a1", adapters["a1"])  # takes the place of a part, which the blend does not need any more
        assert len(bank) == 2
        del held
