"""Likelihoods from few and short prompts are those of each continuation alone; a queue that is full is waited for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.harness import SMALL, adapters_of, prompt, save_all
from tests.serving.http.fake_engine import FakeEngine
from tests.versions import NO_ENGINE
from typer.testing import CliRunner

from roadie.bank import AdapterBank
from roadie.cli.app import app
from roadie.errors import CheckpointError, UnknownAdapter
from roadie.evaluation.asking import Asking
from roadie.evaluation.likelihoods import Pair, Question, in_waves, questions_of, truncated
from roadie.serving import ContinuousBatchingEngine, GenerationRequest, Registry, Sampling, TokenLogprob
from roadie.testing import tiny_llama

A, B = (1, 2, 3), (4, 5)


def test_continuations_that_differ_in_their_last_token_are_one_question() -> None:
    pairs: list[Pair] = [(A, (7,)), (A, (8,)), (B, (7,)), (A, (7, 8)), (A, (7, 9)), (A, (7,))]
    questions = questions_of(pairs)
    assert questions == [Question(A, (), (7, 8)), Question(B, (), (7,)), Question(A, (7,), (8, 9))]
    assert sorted(pair for question in questions for pair in question.pairs) == sorted(set(pairs))
    assert [question.prompt_ids for question in questions] == [(1, 2, 3, 7), (4, 5, 7), (1, 2, 3, 7, 8)]
    assert [question.scoring.last for question in questions] == [1, 1, 2]


def test_the_answers_are_sums_and_greedy_where_every_token_is() -> None:
    question = Question(A, (7,), (8, 9))
    last = TokenLogprob(8, -2.0, ((9, -0.5),), 3, ((8, -2.0), (9, -0.5)))
    assert question.answers([TokenLogprob(7, -1.0, ((7, -1.0),), 1), last]) == ((-3.0, False), (-1.5, True))
    assert question.answers([TokenLogprob(7, -1.0, ((6, -0.1),), 2), last]) == ((-3.0, False), (-1.5, False))


def test_equal_contexts_lie_apart_in_waves() -> None:
    questions = [Question((context,), (middle,), (0,)) for context in range(4) for middle in range(context + 1)]
    order = [(question.context[0], question.middle[0]) for question in in_waves(questions, 6)]
    assert order == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2), (3, 3)]
    assert list(in_waves([], 6)) == []


def test_what_is_too_long_loses_the_beginning_of_its_context() -> None:
    assert truncated(((1, 2, 3, 4), (5, 6)), 4) == ((2, 3, 4), (5, 6))
    assert truncated(((1, 2), (5, 6)), 4) == ((1, 2), (5, 6))
    assert truncated(((1, 2), (5, 6)), 1) == ((2,), (5, 6))


def requests(number: int, adapter: str | None = None) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{place}", (5, 6), adapter, Sampling(max_tokens=2)) for place in range(number)]


def test_all_are_answered_in_order_though_the_queue_is_short() -> None:
    engine, told = FakeEngine(max_queued=3), []
    engine.start()
    try:
        asking = Asking(engine, lambda: told.append(1))
        asked = [
            GenerationRequest(f"r{place}", (5,) * (place + 1), None, Sampling(max_tokens=2)) for place in range(20)
        ]
        assert [answer.text for answer in asking.ask(asked)] == [f" base {place + 1}" for place in range(20)]
        assert len(told) == 20
    finally:
        engine.stop()


@pytest.mark.parametrize(("adapter", "kind"), [("nobody", UnknownAdapter), ("legal", CheckpointError)])
def test_what_fails_is_raised_and_nothing_goes_on(adapter: str, kind: type[Exception]) -> None:
    engine = FakeEngine(broken=("legal",))
    engine.start()
    try:
        with pytest.raises(kind):
            Asking(engine).ask([*requests(1), GenerationRequest("bad", (5, 6), adapter, Sampling(max_tokens=2))])
        assert not [job for job in list(engine._jobs.values()) if not job.is_cancelled]
    finally:
        engine.stop()


@pytest.mark.skipif(NO_ENGINE, reason="the engine needs a newer transformers")
def test_likelihoods_of_many_adapters_are_those_of_each_alone(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    adapters = adapters_of(model, 3)
    save_all(adapters, tmp_path)
    contexts = [tuple(prompt(seed, 20)) for seed in range(4)]
    pairs = [(context, (*middle, end)) for context in contexts for middle in ((), (3,), (3, 4)) for end in (5, 6)]
    engine = ContinuousBatchingEngine(model, None, Registry.open(tmp_path), SMALL)
    engine.start()
    try:
        questions = list(in_waves(questions_of(pairs), 64))
        asked = [
            GenerationRequest(f"{place}-{name}", one.prompt_ids, name, Sampling(max_tokens=0), scoring=one.scoring)
            for place, one in enumerate(questions)
            for name in adapters
        ]
        answers = iter(Asking(engine).ask(asked))
        got: dict[tuple[str, Pair], tuple[float, bool]] = {}
        for question in questions:
            for name in adapters:
                found = question.answers(next(answers).prompt_logprobs)
                got |= {(name, pair): each for pair, each in zip(question.pairs, found, strict=True)}
        assert len(questions) == len(pairs) // 2
        assert engine.statistics().num_cached_prompt_tokens > 0
    finally:
        engine.stop()
    with AdapterBank(model, 4) as bank:
        for name, adapter in adapters.items():
            bank.admit(name, adapter)
            for pair in pairs:
                wanted, is_greedy = _alone(bank, name, pair)
                assert got[name, pair][0] == pytest.approx(wanted, abs=1e-4)
                assert got[name, pair][1] == is_greedy


def _alone(bank: Any, name: str, pair: Pair) -> tuple[float, bool]:
    context, continuation = pair
    with torch.no_grad(), bank.rows([name]):
        logits = bank.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    tokens = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()), bool((logits.argmax(-1) == tokens).all())


def test_the_verb_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    refused = CliRunner().invoke(app, ["eval", "arc_easy"])
    assert refused.exit_code == 2
    assert 'pip install "roadie[eval]"' in refused.output
