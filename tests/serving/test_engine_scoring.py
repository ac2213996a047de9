"""Scoring: every logprob of a prompt is what its adapter alone would give, whoever shares the batch, the steps and the blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.harness import Collector, prompt, save_all, serving
from torch import Tensor

from roadie.adapter import Adapter, LayerParameters
from roadie.bank import AdapterBank
from roadie.errors import ConfigError
from roadie.rotation import Variant
from roadie.serving import EngineSettings, FinishReason, Scoring, TokenLogprob
from roadie.serving.continuous_batching import Salted
from roadie.serving.scoring import CHUNK, PromptScorer, score
from roadie.testing.accuracy import assert_as_accurate_as

WISHES = [None, "a0", "a1", "a2", {"a0": 0.5, "a3": 0.25}, {"a2": 1.5}]
ROOMY = EngineSettings(num_slots=8, page_size=8, num_blocks=128, max_batch_tokens=128, max_running=16)


class Alone:
    """ln p of the tokens after each place of a prompt, one row in a batch of its own."""

    def __init__(self, model: Any, adapters: dict[str, Adapter], dtype: torch.dtype) -> None:
        self._bank = AdapterBank(copy.deepcopy(model).to(dtype), 16, dtype=dtype)
        for name, adapter in adapters.items():
            self._bank.admit(name, adapter)

    def logprobs(self, prompt_ids: list[int], wish: Any) -> Tensor:
        with torch.no_grad(), self._bank.rows([wish]):
            return torch.log_softmax(self._bank.model(torch.tensor([prompt_ids])).logits[0, :-1], dim=-1)


def assert_right(model: Any, adapters: Any, collector: Collector, asked: dict[str, tuple[list[int], Any]]) -> None:
    """Of whole prompts, or of their ends: no further from the truth than a plain forward is."""
    plain, wide = Alone(model, adapters, torch.float32), Alone(model, adapters, torch.float64)
    got, rival, truth = [], [], []
    for request_id, (prompt_ids, wish) in asked.items():
        scored = collector.outputs[request_id][0].prompt_logprobs
        assert [entry.token_id for entry in scored] == prompt_ids[-len(scored) :]
        tokens = torch.tensor(prompt_ids[1:])[:, None]
        got.append(torch.tensor([entry.logprob for entry in scored]))
        for found, reference in ((rival, plain), (truth, wide)):
            found.append(reference.logprobs(prompt_ids, wish).gather(-1, tokens)[-len(scored) :, 0])
    assert_as_accurate_as(torch.cat(got), torch.cat(rival), torch.cat(truth), slack=2.0)


def only(collector: Collector, request_id: str) -> tuple[TokenLogprob, ...]:
    """What was told of a prompt, which must be in the first output alone."""
    first, *later = collector.outputs[request_id]
    assert not any(output.prompt_logprobs for output in later)
    return first.prompt_logprobs


def test_prompts_of_many_adapters_are_scored_in_one_batch(model: Any, adapters: Any, root: Path) -> None:
    with serving(model, root, ROOMY) as collector:
        asked = {}
        for place, wish in enumerate(WISHES * 2):
            prompt_ids = prompt(place, 5 + 3 * place)
            request_id = collector.submit(prompt_ids, wish, max_tokens=0, scoring=Scoring())
            asked[request_id] = (prompt_ids, wish)
        collector.wait()
        assert collector.engine.statistics().num_generated_tokens == 0
    for request_id, (prompt_ids, _) in asked.items():
        assert len(only(collector, request_id)) == len(prompt_ids) - 1
        last = collector.last(request_id)
        assert (last.finish, last.token_ids, last.text) == (FinishReason.LENGTH, (), "")
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt_ids), 0)
    assert_right(model, adapters, collector, asked)


def test_prompts_are_scored_and_continued(model: Any, root: Path) -> None:
    with serving(model, root, ROOMY) as collector:
        plain = [collector.submit(prompt(place, 20), wish) for place, wish in enumerate(WISHES)]
        collector.wait()
        scored = [
            collector.submit(prompt(place, 20), wish, scoring=Scoring(), logprobs=0)
            for place, wish in enumerate(WISHES)
        ]
        collector.wait()
        whole = [
            collector.submit([*prompt(place, 20), *collector.tokens(one)], wish, max_tokens=0, scoring=Scoring(last=8))
            for place, (one, wish) in enumerate(zip(scored, WISHES, strict=True))
        ]
        collector.wait()
    for one, other in zip(plain, scored, strict=True):
        assert len(only(collector, other)) == 19
        assert collector.tokens(one) == collector.tokens(other)
    for one, other in zip(scored, whole, strict=True):  # what was sampled has the logprob that it is scored with
        sampled = torch.tensor([entry.logprob for output in collector.outputs[one] for entry in output.logprobs])
        again = torch.tensor([entry.logprob for entry in only(collector, other)])
        torch.testing.assert_close(sampled, again, atol=1e-4, rtol=0)


def test_long_prompts_are_scored_over_several_steps(model: Any, adapters: Any, root: Path) -> None:
    settings = EngineSettings(num_slots=4, page_size=8, num_blocks=64, max_batch_tokens=32, max_running=8)
    with serving(model, root, settings) as collector:
        asked = {}
        for place, wish in enumerate((None, "a0", "a1")):
            prompt_ids = prompt(place, 100)
            for scoring in (Scoring(), Scoring(last=50)):
                request_id = collector.submit(prompt_ids, wish, max_tokens=0, scoring=scoring)
                asked[request_id] = (prompt_ids, wish)
        collector.wait()
    assert [len(only(collector, one)) for one in asked] == [99, 50] * 3
    assert_right(model, adapters, collector, asked)


def test_what_comes_before_the_scored_tokens_is_shared_and_nothing_else(model: Any, adapters: Any, root: Path) -> None:
    prompt_ids = prompt(1, 40)
    with serving(model, root, ROOMY) as collector:
        asked, cached = {}, []
        for last in (None, None, 8, 23, 24, 39, 1):
            for wish in ("a0", "a1"):
                request_id = collector.submit(prompt_ids, wish, max_tokens=0, scoring=Scoring(last=last))
                collector.wait()
                asked[request_id] = (prompt_ids, wish)
                cached.append(collector.last(request_id).usage.cached_tokens)
        statistics = collector.engine.statistics()
        assert statistics.num_blocks_free == statistics.num_blocks
    # Blocks of 8: the last token of 40 is scored by place 38, in the fifth block; the last 8 by places 31 to 38, of which
    # 31 is in the fourth; the last 23 by 16 and on, which begins the third.
    assert cached == [0, 0, 0, 0, 24, 24, 16, 16, 8, 8, 0, 0, 32, 32]
    assert_right(model, adapters, collector, asked)


def test_a_cache_that_is_too_small_for_all_changes_no_score(model: Any, adapters: Any, root: Path) -> None:
    settings = EngineSettings(num_slots=4, page_size=8, num_blocks=16, max_batch_tokens=64, max_running=8)
    with serving(model, root, settings) as collector:
        asked = {}
        for place in range(10):
            prompt_ids, wish = prompt(place, 40), ("a0", "a1", None)[place % 3]
            request_id = collector.submit(prompt_ids, wish, max_tokens=40 * (place % 2), scoring=Scoring())
            asked[request_id] = (prompt_ids, wish)
        collector.wait()
        statistics = collector.engine.statistics()
        assert statistics.num_blocks_free == statistics.num_blocks == 16
    assert all(collector.last(one).finish is FinishReason.LENGTH for one in asked)
    assert_right(model, adapters, collector, asked)


def test_the_likeliest_and_the_asked_for_are_told_beside_each_token(model: Any, adapters: Any, root: Path) -> None:
    prompt_ids, others = prompt(3, 12), (7, 99, 7)
    with serving(model, root) as collector:
        request_id = collector.submit(prompt_ids, "a1", max_tokens=0, scoring=Scoring(last=4, top=3, token_ids=others))
        collector.wait()
    scored = only(collector, request_id)
    wanted = Alone(model, adapters, torch.float32).logprobs(prompt_ids, "a1")[-4:]
    assert len(scored) == 4
    for entry, line in zip(scored, wanted, strict=True):
        assert [token for token, _ in entry.top] == line.topk(3).indices.tolist()
        assert entry.rank == int((line > line[entry.token_id]).sum()) + 1
        assert [token for token, _ in entry.others] == list(others)
        told = torch.tensor([*(value for _, value in entry.top), *(value for _, value in entry.others)])
        torch.testing.assert_close(told, torch.cat([line.topk(3).values, line[list(others)]]), atol=1e-5, rtol=0)


def test_what_may_follow_a_prompt_is_scored_by_any_token_behind_it(model: Any, adapters: Any, root: Path) -> None:
    prompt_ids, answers = prompt(4, 20), (5, 6)
    with serving(model, root) as collector:
        request_id = collector.submit([*prompt_ids, 5], "a2", max_tokens=0, scoring=Scoring(last=1, token_ids=answers))
        collector.wait()
    wanted = Alone(model, adapters, torch.float32).logprobs([*prompt_ids, 5], "a2")[-1][list(answers)]
    told = torch.tensor([value for _, value in only(collector, request_id)[0].others])
    torch.testing.assert_close(told, wanted, atol=1e-5, rtol=0)


def test_a_prompt_of_one_token_and_one_of_which_nothing_is_scored(model: Any, root: Path) -> None:
    with serving(model, root) as collector:
        ids = [
            collector.submit(prompt(0, 1), "a0", max_tokens=0, scoring=Scoring()),
            collector.submit(prompt(0, 9), "a0", max_tokens=0, scoring=Scoring(last=0)),
        ]
        collector.wait()
    assert [collector.last(one).finish for one in ids] == [FinishReason.LENGTH] * 2
    assert not any(only(collector, one) for one in ids)


def test_adapters_of_the_last_layer_are_seen_in_scores(model: Any, tmp_path: Path) -> None:
    theta, alpha = (torch.randn(64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layers = {"lm_head": LayerParameters(theta, alpha, Variant.ROAD_1, 128)}
    adapters = {"head": Adapter(layers, {"peft_type": "ROAD", "variant": "road_1", "group_size": 128})}
    save_all(adapters, tmp_path)
    with serving(model, tmp_path) as collector:
        asked = {}
        for place, wish in enumerate((None, "head", "head")):
            prompt_ids = prompt(place, 10 + place)
            asked[collector.submit(prompt_ids, wish, max_tokens=0, scoring=Scoring())] = (prompt_ids, wish)
            collector.wait()
    assert_right(model, adapters, collector, asked)


@pytest.mark.parametrize(
    ("scoring", "rules", "words"),
    [
        (None, {"max_tokens": 0}, "got max_tokens=0 for a prompt that is not to be scored; wanted 1"),
        (Scoring(last=10), {}, "got the last 10 tokens to score of a prompt of 10; wanted at most 9"),
        (Scoring(token_ids=(4000,)), {}, "got token 4000 in scoring"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: Any, root: Path, scoring: Scoring | None, rules: dict[str, int], words: str
) -> None:
    with serving(model, root) as collector:
        with pytest.raises(ConfigError, match=words):
            collector.submit(prompt(0, 10), scoring=scoring, **rules)
        assert not collector.outputs


@pytest.mark.parametrize("value", [{"last": -1}, {"top": 21}, {"top": -1}, {"last": 1.5}])
def test_scoring_out_of_range_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(value))):
        Scoring(**value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_how_many_places_come_at_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt_ids = tuple(torch.randint(0, 50, (3 * CHUNK,), generator=generator).tolist())
    logits = (torch.randn(len(prompt_ids) - 1, 50, generator=generator) * 4).to(dtype)
    scoring = Scoring(top=2, token_ids=(1,))
    whole, parts = (PromptScorer(prompt_ids, scoring, reads_all=False) for _ in range(2))
    whole.take(0, logits)
    for begin, end in ((0, 7), (7, 7 + CHUNK), (7 + CHUNK, len(logits))):
        parts.take(begin, logits[begin:end])
    assert whole.logprobs == parts.logprobs
    wanted = torch.log_softmax(logits.double(), -1).gather(-1, torch.tensor(prompt_ids[1:])[:, None])[:, 0]
    got = torch.tensor([entry.logprob for entry in whole.logprobs], dtype=torch.float64)
    assert float((got - wanted).abs().max()) < 1e-5  # float32 of numbers up to 32, whatever the dtype of the logits


def test_equal_tokens_share_the_better_rank() -> None:
    entries = score(torch.tensor([[2.0, 1.0, 2.0, 0.0]]).repeat(3, 1), [0, 1, 2], Scoring())
    assert [entry.rank for entry in entries] == [1, 3, 1]
    assert sum(torch.tensor(entry.logprob).exp().item() for entry in entries) == pytest.approx(
        (2 * torch.tensor(2.0).exp() + torch.tensor(1.0).exp()).item()
        / (2 * torch.tensor(2.0).exp() + torch.tensor(1.0).exp() + 1).item()
    )


def test_salts_are_in_the_first_block_alone() -> None:
    salted = Salted([1, 2, 3, 4], 0x0004_0003_0002_0001)
    assert salted[2:4] == [3, 4]
    assert (salted[0], len(salted), salted.is_told) == (1, 4, False)
    assert salted[0:2] == [1, 2, 1, 2, 3, 4]
    assert salted.is_told
