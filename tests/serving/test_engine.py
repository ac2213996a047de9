"""The engine: every token is what its adapter alone would give, whoever shares the batch; what was held is given back."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.patience import HANG_S
from tests.serving.harness import SMALL, Collector, prompt, serving
from tests.versions import needs_a_cache_that_lets_old_prefixes_go
from transformers import RepetitionPenaltyLogitsProcessor

from roadie import embedded
from roadie.adapter import Adapter
from roadie.bank import AdapterBank
from roadie.errors import ConfigError, EngineFailed, PromptTooLong, QueueFull, ShuttingDown, UnknownAdapter
from roadie.serving import (
    ContinuousBatchingEngine,
    EngineSettings,
    FinishReason,
    GenerationRequest,
    Registry,
    Sampling,
    stream,
)

WISHES = [None, "a0", "a1", "a2", {"a0": 0.5, "a1": 0.5}, {"a2": 1.5}, {"a1": -1.0}, "a3"]
WISHES[4] = {"a0": 0.5, "a3": 0.25}  # of one group size, as blends have to be


def alone(
    model: Any,
    adapters: dict[str, Adapter],
    wish: Any,
    prompt_ids: list[int],
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """What transformers' `generate` gives for one row in a batch of its own."""
    with AdapterBank(copy.deepcopy(model), 8, dtype=dtype) as bank:
        for name in [wish] if isinstance(wish, str) else wish or ():
            bank.admit(name, adapters[name])
        with bank.rows([wish]):
            settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
            ids = bank.model.generate(torch.tensor([prompt_ids]), pad_token_id=0, **settings)
    return ids[0, len(prompt_ids) :].tolist()


def check(model: Any, adapters: dict[str, Adapter], collector: Collector, asked: dict[str, Any]) -> GreedyVerdict:
    """Every token of these requests (id -> (prompt, wish)) against the model with the adapter alone; all have ended well."""
    reference, verdict = GreedyReference(model, adapters), GreedyVerdict()
    for request_id, (prompt_ids, wish) in asked.items():
        assert collector.last(request_id).finish is FinishReason.LENGTH, collector.last(request_id)
        verdict += reference.check(prompt_ids, wish, collector.tokens(request_id))
    return verdict


def test_greedy_tokens_are_those_of_generate_with_that_adapter_alone(model: Any, adapters: Any, root: Path) -> None:
    with serving(model, root, EngineSettings(num_slots=8, page_size=8, num_blocks=128)) as collector:
        asked = {}
        for place, wish in enumerate(WISHES * 2):
            prompt_ids = prompt(place, 5 + 3 * place)
            asked[collector.submit(prompt_ids, wish, max_tokens=12)] = (prompt_ids, wish)
        collector.wait()
    verdict = check(model, adapters, collector, asked)
    assert (verdict.num_tokens, verdict.num_wrong) == (12 * len(asked), 0)
    differing = sum(
        collector.tokens(one) != alone(model, adapters, wish, ids, 12) for one, (ids, wish) in list(asked.items())[:8]
    )
    assert differing <= verdict.num_ties


def test_tables_may_take_half_the_memory(model: Any, adapters: dict[str, Adapter], root: Path) -> None:
    """Tokens are those of vectors that were rounded once, which the base's are not, and logprobs tell them from others."""
    wishes = (None, "a0", "a1", {"a0": 0.5}, "a0", "a1", "a2", "a3")
    tokens: dict[str, list[list[int]]] = {}
    logprobs: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        with serving(model, root, EngineSettings(num_slots=8, table_dtype=dtype, page_size=8, num_blocks=128)) as one:
            ids = [one.submit(prompt(place, 9), wish, max_tokens=12, logprobs=0) for place, wish in enumerate(wishes)]
            one.wait()
        tokens[dtype] = [one.tokens(each) for each in ids]
        logprobs[dtype] = [one.outputs[each][0].logprobs[0].logprob for each in ids]
    for place, wish in enumerate(wishes):
        assert tokens["bfloat16"][place] == alone(model, adapters, wish, prompt(place, 9), 12, torch.bfloat16)
    is_other = [abs(a - b) > 1e-4 for a, b in zip(logprobs["float32"], logprobs["bfloat16"], strict=True)]
    assert not is_other[0]
    assert sum(is_other) > 4
    with pytest.raises(ConfigError, match="got table_dtype='int8'; wanted one of float32, bfloat16, float16"):
        EngineSettings(table_dtype="int8")


def test_adapters_change_what_is_said(model: Any, root: Path) -> None:
    with serving(model, root) as collector:
        ids = [collector.submit(prompt(0, 10), wish, max_tokens=16) for wish in (None, "a0", "a1", "a2")]
        collector.wait()
        assert len({tuple(collector.tokens(one)) for one in ids}) == 4


def test_prefixes_are_shared_by_equal_adapters_only(model: Any, adapters: Any, root: Path) -> None:
    prompt_ids = prompt(1, 40)
    with serving(model, root) as collector:
        asked = {}
        for wish in (None, "a0", "a1", {"a0": 0.5}, None, "a0", "a1", {"a0": 0.5}):
            request_id = collector.submit(prompt_ids, wish)
            collector.wait()
            asked[request_id] = (prompt_ids, wish)
        cached = [collector.last(one).usage.cached_tokens for one in asked]
        assert cached == [0, 0, 0, 0, 32, 32, 32, 32]  # four whole blocks of 8: the last token is always computed
        statistics = collector.engine.statistics()
        assert statistics.num_cached_prompt_tokens == 128
        assert statistics.num_blocks_free == statistics.num_blocks
    assert check(model, adapters, collector, asked).num_wrong == 0


def test_prefixes_are_not_shared_after_a_slot_or_a_name_has_changed_hands(
    model: Any, adapters: Any, root: Path
) -> None:
    prompt_ids = prompt(2, 40)
    one_slot = EngineSettings(num_slots=1, page_size=8, num_blocks=128, max_batch_tokens=128, max_running=8)
    with serving(model, root, one_slot) as collector:
        asked = {}

        def ask(wish: str) -> int:
            request_id = collector.submit(prompt_ids, wish)
            collector.wait()
            asked[request_id] = (prompt_ids, wish)
            return collector.last(request_id).usage.cached_tokens

        assert [ask("a0"), ask("a1"), ask("a0"), ask("a1")] == [0, 0, 32, 32]  # the slot changes hands, contents do not
        collector.engine.load_adapter("a0", str(root / "a2"), replace=True).result(HANG_S)
        assert ask("a0") == 0
        before = dict(asked)
        assert ask("a2") == 32  # another name for what a0 is now
    last = {one: asked[one] for one in asked if one not in before}
    replaced = {list(before)[-1]: (prompt_ids, "a2")}
    right = {**{one: before[one] for one in list(before)[:-1]}, **replaced, **last}
    assert check(model, adapters, collector, right).num_wrong == 0


@needs_a_cache_that_lets_old_prefixes_go
def test_the_prefixes_that_were_unused_longest_make_room(model: Any, root: Path) -> None:
    settings = EngineSettings(num_slots=4, page_size=8, num_blocks=32, max_batch_tokens=64, max_running=4)
    with serving(model, root, settings) as collector:

        def cached(seed: int) -> int:
            request_id = collector.submit(prompt(seed, 33), max_tokens=1)
            collector.wait()
            return collector.last(request_id).usage.cached_tokens

        assert [cached(seed) for seed in range(9)] == [0] * 9  # 36 blocks of prefixes, for a cache of 32
        assert [cached(seed) for seed in (8, 7, 6)] == [32, 32, 32]
        assert cached(0) == 0


def test_long_prompts_take_several_steps(model: Any, adapters: Any, root: Path) -> None:
    settings = EngineSettings(num_slots=4, page_size=8, num_blocks=64, max_batch_tokens=32, max_running=8)
    with serving(model, root, settings) as collector:
        asked = {}
        for place, wish in enumerate((None, "a0", "a1", "a0")):
            prompt_ids = prompt(place, 100)
            asked[collector.submit(prompt_ids, wish)] = (prompt_ids, wish)
        collector.wait()
    assert check(model, adapters, collector, asked).num_wrong == 0


def test_a_cache_that_is_too_small_for_all_holds_requests_back_but_changes_nothing(
    model: Any, adapters: Any, root: Path
) -> None:
    settings = EngineSettings(num_slots=4, page_size=8, num_blocks=16, max_batch_tokens=64, max_running=8)
    with serving(model, root, settings) as collector:
        asked = {}
        for place in range(10):
            prompt_ids, wish = prompt(place, 20), ("a0", "a1", None)[place % 3]
            asked[collector.submit(prompt_ids, wish, max_tokens=60)] = (prompt_ids, wish)
        collector.wait()
        statistics = collector.engine.statistics()
        assert statistics.num_blocks_free == statistics.num_blocks == 16
    verdict = check(model, adapters, collector, asked)
    assert (verdict.num_tokens, verdict.num_wrong) == (600, 0)


def test_cancelled_requests_give_back_blocks_and_slots_wherever_they_are(model: Any, root: Path) -> None:
    settings = EngineSettings(num_slots=2, page_size=8, num_blocks=64, max_batch_tokens=32, max_running=4)
    with serving(model, root, settings) as collector:
        with collector.held(2):
            ids = [collector.submit(prompt(one, 60), f"a{one % 6}", max_tokens=60) for one in range(24)]
            collector.wait(ids[0], num_tokens=2)
            assert all(collector.engine.cancel(one) for one in ids)
        collector.wait()
        assert {collector.last(one).finish for one in ids} <= {FinishReason.CANCELLED, FinishReason.LENGTH}
        assert not collector.engine.cancel(ids[0])
        statistics = collector.engine.statistics()
        assert (statistics.num_running, statistics.num_queued, statistics.num_slots_leased) == (0, 0, 0)
        assert statistics.num_blocks_free == statistics.num_blocks
        assert statistics.num_cancelled + statistics.num_finished == 24
        again = collector.submit(prompt(0, 60), "a5")
        collector.wait()
        assert collector.last(again).finish is FinishReason.LENGTH


def test_a_seed_gives_the_same_tokens_whoever_shares_the_batch(model: Any, root: Path) -> None:
    rules = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 24}
    with serving(model, root) as collector:
        lonely = collector.submit(prompt(0, 10), "a0", seed=7, **rules)
        collector.wait()
        others = [collector.submit(prompt(one, 12), "a1", **rules) for one in range(6)]
        among = collector.submit(prompt(0, 10), "a0", seed=7, **rules)
        more = [collector.submit(prompt(one, 9), None, temperature=0.0) for one in range(6)]
        other_seed = collector.submit(prompt(0, 10), "a0", seed=8, **rules)
        collector.wait()
        assert collector.tokens(lonely) == collector.tokens(among) != collector.tokens(other_seed)
        unseeded = {tuple(collector.tokens(collector_id)) for collector_id in others}
        assert len(unseeded) == 6
        assert len(more) == 6


def test_everyone_is_served_where_adapters_outnumber_slots(model: Any, adapters: Any, root: Path) -> None:
    with serving(model, root, EngineSettings(num_slots=2, page_size=8, num_blocks=128, max_running=8)) as collector:
        collector.engine.pin_adapter("a7").result(HANG_S)
        asked = {}
        for place in range(48):
            wish = f"a{place % 8}" if place % 3 else "a0"
            prompt_ids = prompt(place, 10)
            asked[collector.submit(prompt_ids, wish, max_tokens=6)] = (prompt_ids, wish)
        collector.wait()
        statistics = collector.engine.statistics()
        assert statistics.num_finished == 48
        assert statistics.num_evictions > 0
        assert next(one for one in collector.engine.adapters() if one.name == "a7").slot is not None
    assert check(model, adapters, collector, asked).num_wrong == 0


def test_a_popular_adapter_gives_its_slot_to_whoever_waits(model: Any, root: Path) -> None:
    """One slot, and more requests for one adapter whenever one of them ends: another adapter's request is served all the same."""
    settings = EngineSettings(num_slots=1, page_size=8, num_blocks=128, max_batch_tokens=128, max_running=4)
    with serving(model, root, settings) as collector:
        popular = [collector.submit(prompt(one, 8), "a0", max_tokens=10 + 3 * one) for one in range(8)]
        collector.wait(popular[0], num_tokens=1)
        rare = collector.submit(prompt(0, 8), "a1", max_tokens=2)
        while collector.last(rare).finish is None and len(popular) < 200:
            popular.append(collector.submit(prompt(0, 8), "a0", max_tokens=10 + len(popular) % 7))
            collector.wait(popular[len(popular) - 8])
        assert collector.last(rare).finish is FinishReason.LENGTH
        collector.wait()


def test_requests_fail_rather_than_wait_for_a_slot_that_cannot_come(model: Any, root: Path) -> None:
    with serving(model, root, EngineSettings(num_slots=2, page_size=8, num_blocks=64, max_running=8)) as collector:
        for name in ("a0", "a1"):
            collector.engine.pin_adapter(name).result(HANG_S)
        stuck = collector.submit(prompt(0, 8), "a2")
        fine = collector.submit(prompt(0, 8), "a1")
        collector.wait()
        assert collector.last(stuck).finish is FinishReason.FAILED
        assert "pinned" in str(collector.last(stuck).error)
        assert collector.last(fine).finish is FinishReason.LENGTH
        collector.engine.pin_adapter("a0", False).result(HANG_S)
        later = collector.submit(prompt(0, 8), "a2")
        collector.wait()
        assert collector.last(later).finish is FinishReason.LENGTH


def test_what_cannot_be_served_is_refused_at_the_door(model: Any, root: Path) -> None:
    settings = EngineSettings(
        num_slots=2, page_size=8, num_blocks=64, max_running=1, max_queued=3, max_queued_per_tenant=2
    )
    with serving(model, root, settings) as collector:
        with pytest.raises(UnknownAdapter, match="'nobody'"):
            collector.submit(prompt(0, 8), "nobody")
        with pytest.raises(PromptTooLong, match="at most 128"):
            collector.submit(prompt(0, 125), max_tokens=8)
        for wrong in ([], [128], [-1]):
            with pytest.raises(ConfigError, match="vocabulary"):
                collector.submit(wrong)
        with pytest.raises(ConfigError, match="blend of 2"):
            collector.submit(prompt(0, 8), {"a0": 0.5, "a3": 0.5})
        with pytest.raises(ConfigError, match="tokenizer"):
            collector.submit(prompt(0, 8), stop=("x",))
        with collector.held(1):
            first = collector.submit(prompt(0, 8), max_tokens=100)
            collector.wait(first, num_tokens=1)
            for _ in range(2):
                collector.submit(prompt(0, 8))
            with pytest.raises(QueueFull, match="2 requests of 'default'") as refused:
                collector.submit(prompt(0, 8))
            assert refused.value.retry_after_s >= 1
            collector.submit(prompt(0, 8), tenant="other")
            with pytest.raises(QueueFull, match="3 requests wait"):
                collector.submit(prompt(0, 8), tenant="third")
        collector.outputs = {one: outputs for one, outputs in collector.outputs.items() if outputs or one == first}
        assert collector.engine.statistics().num_refused == 2


@pytest.mark.parametrize("value", [{"max_tokens": -1}, {"top_p": 1.5}, {"temperature": math.nan}, {"stop": ("",)}])
def test_sampling_out_of_range_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(value))):
        Sampling(**value)


def test_draining_ends_what_was_accepted_and_stopping_fails_the_rest(model: Any, root: Path) -> None:
    with serving(model, root) as collector:
        ids = [collector.submit(prompt(one, 8), "a0", max_tokens=40) for one in range(6)]
        assert collector.engine.drain(HANG_S)
        assert {collector.last(one).finish for one in ids} == {FinishReason.LENGTH}
        assert not collector.engine.is_ready
        with pytest.raises(ShuttingDown):
            collector.submit(prompt(0, 8))
    with serving(model, root) as collector:
        with collector.held(1):
            running = collector.submit(prompt(0, 8), "a0", max_tokens=100)
            collector.wait(running, num_tokens=1)
            queued = collector.submit(prompt(0, 8), "a1", max_tokens=100)
            collector.engine.stop()
        for one in (running, queued):
            assert isinstance(collector.last(one).error, ShuttingDown)
        with pytest.raises(ShuttingDown):
            collector.engine.load_adapter("a0").result(HANG_S)


def test_a_step_that_fails_fails_the_requests_and_the_engine(model: Any, root: Path, monkeypatch: Any) -> None:
    with serving(model, root) as collector:
        with collector.held(1):
            running = collector.submit(prompt(0, 8), "a0", max_tokens=100)
            collector.wait(running, num_tokens=1)
            monkeypatch.setattr(collector.engine._batch, "step", lambda: 1 / 0)
            collector.wait()
        assert isinstance(collector.last(running).error, EngineFailed)
        with pytest.raises(EngineFailed):
            collector.submit(prompt(0, 8))


def test_the_model_is_what_it_was(model: Any, adapters: Any, root: Path) -> None:
    eager = copy.deepcopy(model).train()
    eager.set_attn_implementation("eager")
    before = {name: value.clone() for name, value in eager.state_dict().items()}
    with serving(eager, root) as collector:
        assert eager.config._attn_implementation == "paged|eager"
        collector.submit(prompt(0, 8), "a0")
        collector.wait()
    assert eager.config._attn_implementation == "eager"
    assert eager.training
    assert all(torch.equal(value, before[name]) for name, value in eager.state_dict().items())


def test_adapters_of_the_last_layer_are_served_too(model: Any, root: Path) -> None:
    from roadie import checkpoint
    from roadie.adapter import LayerParameters

    generator = torch.Generator().manual_seed(0)
    theta, alpha = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    head = Adapter(
        {"lm_head": LayerParameters(theta, alpha, "road_1", 128)},
        {"peft_type": "ROAD", "variant": "road_1", "group_size": 128},
    )
    checkpoint.save(head, root / "head")
    with serving(model, root) as collector:
        prompts = {one: prompt(one, 20) for one in range(4)}
        asked = {collector.submit(prompts[one], "head" if one % 2 else None): one for one in prompts}
        collector.wait()
    right = {one: (prompts[place], "head" if place % 2 else None) for one, place in asked.items()}
    assert check(model, {"head": head}, collector, right).num_wrong == 0


def test_asyncio_reads_outputs_as_they_come_and_leaving_cancels(model: Any, root: Path) -> None:
    async def talk(collector: Collector) -> tuple[int, FinishReason | None]:
        engine = collector.engine
        request = GenerationRequest("whole", tuple(prompt(0, 8)), "a0", Sampling(max_tokens=5, ignore_eos=True))
        whole = [output async for output in stream(engine, request)]
        left = GenerationRequest("left", tuple(prompt(0, 8)), "a0", Sampling(max_tokens=100, ignore_eos=True))
        outputs = stream(engine, left)
        with collector.held(1):
            await anext(outputs)
            await outputs.aclose()
        return sum(len(output.token_ids) for output in whole), whole[-1].finish

    with serving(model, root) as collector:
        assert asyncio.run(talk(collector)) == (5, FinishReason.LENGTH)
        assert collector.engine.drain(HANG_S)
        assert collector.engine.statistics().num_cancelled == 1


def test_text_stops_and_logprobs_of_the_embedded_model(tmp_path: Path) -> None:
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    ids = tokenizer("Beautiful is better than").input_ids
    with serving(model, tmp_path, SMALL, tokenizer) as collector:
        plain = collector.submit(ids, max_tokens=40, logprobs=3)
        collector.wait()
        text = collector.text(plain)
        assert text == tokenizer.decode([*ids, *collector.tokens(plain)])[len(tokenizer.decode(ids)) :]
        stop = text[17:22]
        stopped = collector.submit(ids, max_tokens=40, stop=(stop, "never there"))
        included = collector.submit(ids, max_tokens=40, stop=(stop,), include_stop=True)
        fifth = collector.tokens(plain)[4]
        by_token = collector.submit(ids, max_tokens=40, stop_token_ids=(fifth,))
        collector.wait()
        begin = text.index(stop)
        assert (collector.text(stopped), collector.last(stopped).finish) == (text[:begin], FinishReason.STOP)
        assert collector.text(included) == text[: begin + len(stop)]
        assert len(collector.tokens(by_token)) == collector.tokens(plain).index(fifth) + 1
    entries = [entry for output in collector.outputs[plain] for entry in output.logprobs]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *collector.tokens(plain)]])).logits[0, len(ids) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    for place, entry in enumerate(entries):
        assert entry.token_id == entry.top[0][0] == collector.tokens(plain)[place]
        assert len(entry.top) == 3
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)


def test_submitters_on_many_threads(model: Any, adapters: Any, root: Path) -> None:
    with serving(model, root) as collector:
        asked: dict[str, Any] = {}
        lock = threading.Lock()

        def talk(seed: int) -> None:
            for turn in range(6):
                wish = (None, "a0", "a1", "a2", "a3")[(seed + turn) % 5]
                with lock:
                    request_id = collector.submit(prompt(seed, 12), wish, tenant=f"t{seed}")
                    asked[request_id] = (prompt(seed, 12), wish)
                collector.wait(request_id)

        threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        assert len(asked) == 48
    assert check(model, adapters, collector, asked).num_wrong == 0


def test_an_engine_starts_once(model: Any, root: Path) -> None:
    engine = ContinuousBatchingEngine(model, None, Registry.open(root), SMALL)
    with pytest.raises(ShuttingDown):
        engine.statistics()
    engine.start()
    engine.stop()
    with pytest.raises(RuntimeError, match="started before"):
        engine.start()


def test_every_request_has_a_repetition_penalty_of_its_own(model: Any, adapters: Any, root: Path) -> None:
    """In one batch; each token is the likeliest after transformers' own processor, up to the rounding of the logits."""
    penalties = (1.0, 1.3, 3.0, 0.7)
    with serving(model, root) as collector:
        asked = {
            collector.submit(prompt(seed, 12), wish, max_tokens=16, repetition_penalty=penalty): (seed, wish, penalty)
            for seed, penalty in enumerate(penalties)
            for wish in (None, "a0", {"a1": 0.5})
        }
        collector.wait()
    wide = copy.deepcopy(model).double()
    texts = {}
    with AdapterBank(model, 8) as bank, AdapterBank(wide, 8, dtype=torch.float64) as wide_bank:
        for each in (bank, wide_bank):
            each.update({name: adapters[name] for name in ("a0", "a1")})
        for request_id, (seed, wish, penalty) in asked.items():
            tokens = texts[seed, str(wish)] = collector.tokens(request_id)
            ids = torch.tensor([[*prompt(seed, 12), *tokens]])
            with torch.no_grad(), bank.rows([wish]), wide_bank.rows([wish]):
                narrow, exact = model(ids).logits[0].double(), wide(ids).logits[0]
            allowed = 2 * max(penalty, 1 / penalty) * float((narrow - exact).abs().max())
            for place, token in enumerate(tokens, 12):
                scores = RepetitionPenaltyLogitsProcessor(penalty)(ids[:, :place], exact[None, place - 1].clone())[0]
                assert float(scores.max() - scores[token]) <= allowed
    assert len({len(set(tokens)) for tokens in texts.values()}) > 1


def test_nothing_ends_a_request_before_its_fewest_tokens(model: Any, root: Path) -> None:
    """Neither a stop token, nor the model's own end, which is forbidden until then; other rows end when they like."""
    first = {}
    with serving(model, root) as collector:
        for seed in range(4):
            request_id = collector.submit(prompt(seed, 8), "a0", max_tokens=12)
            collector.wait()
            first[seed] = collector.tokens(request_id)
        stops = {seed: tokens[2] for seed, tokens in first.items()}
        free = {
            seed: collector.submit(prompt(seed, 8), "a0", stop_token_ids=(stops[seed],), max_tokens=12)
            for seed in first
        }
        held = {
            seed: collector.submit(prompt(seed, 8), "a0", stop_token_ids=(stops[seed],), max_tokens=12, min_tokens=6)
            for seed in first
        }
        collector.wait()
        for seed in first:
            ended, waited = collector.tokens(free[seed]), collector.tokens(held[seed])
            assert ended == first[seed][: first[seed].index(stops[seed]) + 1]
            assert len(waited) >= 7 or collector.last(held[seed]).finish is FinishReason.LENGTH
            assert stops[seed] not in waited[:6]
