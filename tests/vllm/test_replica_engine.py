"""vLLM as the engine of a replica (`roadie.ray.vllm_engine`): the contract of roadie's engines, over vLLM. Needs no Ray."""

from __future__ import annotations

import pytest
from tests.patience import HANG_S

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.vllm import cases

from roadie.errors import ConfigError, PromptTooLong, RoadieError, UnknownAdapter
from roadie.ray.vllm_engine import VllmEngine
from roadie.serving.engine import (
    AdapterWish,
    EngineSettings,
    FinishReason,
    GenerationRequest,
    Output,
    Sampling,
    Unload,
)
from roadie.training.models import ModelSource

OPTIONS = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "block_size": 32}


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[VllmEngine]:
    running = VllmEngine(ModelSource(str(base)), EngineSettings(num_slots=8, max_running=16), OPTIONS)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def generate(engine: Any, wish: AdapterWish, prompt: Sequence[int], **rules: Any) -> list[Output]:
    outputs: list[Output] = []
    over = threading.Event()

    def take(output: Output) -> None:
        outputs.append(output)
        if output.finish is not None:
            over.set()

    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, **rules})
    engine.submit(GenerationRequest(f"r{id(outputs)}", tuple(prompt), wish, sampling), take)
    assert over.wait(HANG_S)
    return outputs


def test_requests_of_the_base_and_of_adapters_end_as_the_contract_says(engine: Any, kinds: dict[str, Path]) -> None:
    generated = []
    for number, (name, path) in enumerate([("base", None), *list(kinds.items())[:3]]):
        if path is not None:
            assert engine.load_adapter(name, str(path)).result(HANG_S).name == name
        outputs = generate(engine, None if path is None else name, cases.prompt(number), logprobs=2)
        tokens = tuple(token for output in outputs for token in output.token_ids)
        assert (outputs[-1].finish, outputs[-1].usage.completion_tokens, len(tokens)) == (FinishReason.LENGTH, 10, 10)
        assert [len(output.logprobs) for output in outputs] == [len(output.token_ids) for output in outputs]
        assert all(len(entry.top) == 2 and entry.top[0][1] == entry.logprob for o in outputs for entry in o.logprobs)
        generated.append(cases.Generated(path, cases.prompt(number), tokens))
    assert cases.judged(generated).wrong == 0


def test_a_bad_adapter_is_refused_and_the_old_one_stays(engine: Any, kinds: dict[str, Path], tmp_path: Path) -> None:
    first, second = list(kinds.values())[:2]
    engine.load_adapter("it", str(first)).result(HANG_S)
    before = [output.token_ids for output in generate(engine, "it", cases.prompt(3))]
    with pytest.raises(RoadieError):
        engine.load_adapter("it", str(tmp_path), replace=True).result(HANG_S)
    with pytest.raises(ConfigError, match="loaded already"):
        engine.load_adapter("it", str(second)).result(HANG_S)
    assert [output.token_ids for output in generate(engine, "it", cases.prompt(3))] == before
    engine.load_adapter("it", str(second), replace=True).result(HANG_S)
    tokens = tuple(token for output in generate(engine, "it", cases.prompt(3)) for token in output.token_ids)
    assert cases.judged([cases.Generated(second, cases.prompt(3), tokens)]).wrong == 0
    engine.unload_adapter("it", Unload.WAIT).result(HANG_S)
    with pytest.raises(UnknownAdapter):
        generate(engine, "it", cases.prompt(3))


def test_blends_and_strengths_are_served(engine: Any, tmp_path: Path) -> None:
    sizes = {"a": 32, "b": 32, "c": 16}
    paths = {
        name: cases.save_random(tmp_path / name, {"group_size": size}, seed=seed, scale=0.2)
        for seed, (name, size) in enumerate(sizes.items())
    }
    for name, path in paths.items():
        engine.load_adapter(name, str(path)).result(HANG_S)
    generated = []
    for wish in ({"a": 0.5, "b": 0.7}, {"b": -1.0}):
        tokens = tuple(token for output in generate(engine, wish, cases.prompt(4)) for token in output.token_ids)
        blend = tuple((paths[name], weight) for name, weight in wish.items())
        generated.append(cases.Generated(blend, cases.prompt(4), tokens))
    assert cases.judged_by_bank(generated).wrong == 0
    (last,) = generate(engine, {"a": 0.5, "c": 0.5}, cases.prompt(4))
    assert isinstance(last.error, ConfigError)
    assert "layer model.layers.0" in str(last.error)
    with pytest.raises(UnknownAdapter, match="'nothing'"):
        generate(engine, {"a": 0.5, "nothing": 0.5}, cases.prompt(0))


def test_what_vllm_cannot_do_is_refused_at_once(engine: Any) -> None:
    with pytest.raises(PromptTooLong):
        generate(engine, None, cases.prompt(0), max_tokens=500)


def test_a_request_that_is_cancelled_ends_as_such(engine: Any) -> None:
    outputs: list[Output] = []
    begun, over = threading.Event(), threading.Event()

    def take(output: Output) -> None:
        outputs.append(output)
        begun.set()
        if output.finish is not None:
            over.set()

    rules = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)
    engine.submit(GenerationRequest("long", tuple(cases.prompt(0)[:8]), None, rules), take)
    assert begun.wait(HANG_S)
    assert engine.cancel("long")
    assert over.wait(HANG_S)
    assert outputs[-1].finish is FinishReason.CANCELLED
    assert not engine.cancel("long")
