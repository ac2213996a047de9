"""One engine on one device: many adapters in a batch, a thousand of them in slots, and adapters that change."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import shutil
from pathlib import Path
from statistics import median
from typing import Any

from tests.vllm import cases, measured

from roadie.errors import AdapterError


@pytest.mark.smoke
def test_a_mixed_batch_is_right_token_by_token(llm: Any, requests: Any, kinds: dict[str, Path]) -> None:
    """The base and 15 adapters of all variants, group sizes and targets, 64 requests at once."""
    verdict = cases.judged(cases.generate(llm, requests, cases.mixture(kinds, 4), tokens=16))
    print(f"\nmixed batch: {verdict}")
    assert verdict.tokens == 64 * 16
    assert verdict.wrong == 0
    assert verdict.ties <= verdict.tokens // 100
    assert verdict.like_base <= 4 + 4  # the base's own, and few others: a wrong adapter would be seen


def test_rotations_in_a_row_and_of_inputs_are_right_token_by_token(
    llm: Any, requests: Any, kinds: dict[str, Path], tmp_path: Path
) -> None:
    """Beside plain adapters and the base; an engine that does not compile makes room for them when they come."""
    adapters = [*cases.write_chains(tmp_path), kinds["all-2"], kinds["q-1"], None]
    verdict = cases.judged_by_bank(cases.generate(llm, requests, adapters * 3, tokens=16))
    print(f"\nrotations in a row and of inputs: {verdict}")
    assert verdict.wrong == 0
    assert verdict.ties <= verdict.tokens // 100
    assert verdict.like_base <= 3 + 3


def test_a_blend_is_right_token_by_token(llm: Any, requests: Any, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    config = {"stages": [64, 4], "input_stages": [8, 64]}
    parts = [cases.save_random(tmp_path / name, config, seed=len(name), scale=0.2) for name in ("one", "other")]
    measured.seconds_to_load(llm, [requests(path) for path in parts])
    mix = LoRARequest("mix", 77, "blend:one=1.5+other=0.5")
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], cases.greedy(16), lora_request=mix, use_tqdm=False)
    blend = tuple(zip(parts, (1.5, 0.5), strict=True))
    verdict = cases.judged_by_bank([cases.Generated(blend, (5, 6, 7), tuple(output.outputs[0].token_ids))])
    assert (verdict.wrong, verdict.like_base) == (0, 0)
    with pytest.raises(AdapterError, match="got a blend of 'nothing', which is no adapter that is loaded"):
        llm.generate(
            [{"prompt_token_ids": [5]}], lora_request=LoRARequest("bad", 78, "blend:nothing=0.5"), use_tqdm=False
        )


def test_slots_that_nothing_was_written_to_are_the_identity(llm: Any) -> None:
    assert llm.collective_rpc(measured.is_identity_where_empty) == [True]


def test_128_adapters_in_one_batch(llm: Any, requests: Any, tmp_path: Path) -> None:
    adapters = cases.write_many(tmp_path, 128)
    measured.seconds_to_load(
        llm, [requests(adapter) for adapter in adapters]
    )  # or the first would be done before the last
    llm.collective_rpc(measured.count_adapters_of_steps)
    answers = cases.generate(llm, requests, adapters, tokens=8)
    assert llm.collective_rpc(measured.most_adapters_of_a_step) == [128]
    verdict = cases.judged_by_bank(answers)
    print(f"\n128 adapters: {verdict}")
    assert verdict.wrong == 0
    assert verdict.ties <= verdict.tokens // 100
    assert len({answer.tokens for answer in answers}) == 128


def test_the_cost_of_activation_is_linear_in_a_thousand_adapters(llm: Any, requests: Any, tmp_path: Path) -> None:
    """And loading the thousandth takes no longer than loading the first."""
    adapters = cases.write_many(tmp_path, 1000, ("q_proj",))
    seconds = measured.seconds_to_load(llm, [requests(adapter) for adapter in adapters])
    ours, theirs = (
        {n: llm.collective_rpc(measured.seconds_to_apply, args=(n, which))[0] for n in (125, 250, 500, 1000)}
        for which in ("ours", "vllm's")
    )
    first, last = (median(part) * 1e3 for part in (seconds[:100], seconds[-100:]))
    print(f"\nloading: {first:.2f} ms each of the first 100, {last:.2f} ms each of the last 100 (medians)")
    for n in ours:
        print(f"{n} adapters active: {ours[n] * 1e3:.3f} ms a step; vLLM's own way {theirs[n] * 1e3:.3f} ms")
    assert len(llm.llm_engine.list_loras()) >= 1000
    assert ours[1000] < 2 * 8 * ours[125]  # quadratic would be 64
    assert ours[1000] < theirs[1000] / 20
    assert last < 2 * first
    several = cases.judged_by_bank(cases.generate(llm, requests, adapters[::40], tokens=4))
    assert several.wrong == 0


def with_prompt_of(llm: Any, request: Any, adapter: Path, number: int = 8) -> tuple[cases.Generated, int]:
    """An answer to a prompt of 3 full blocks, and how many of its tokens came out of the prefix cache."""
    long = tuple(range(1, 97))
    (output,) = llm.generate(
        [{"prompt_token_ids": list(long)}], cases.greedy(number), lora_request=request, use_tqdm=False
    )
    return cases.Generated(adapter, long, tuple(output.outputs[0].token_ids)), output.num_cached_tokens


def test_an_adapter_that_changes_in_place_is_read_again_and_its_cache_is_not_used(
    llm: Any, requests: Any, tmp_path: Path
) -> None:
    first, second = cases.write_many(tmp_path / "contents", 2)
    place = tmp_path / "place"
    shutil.copytree(first, place)
    before, _ = with_prompt_of(llm, requests(place), first)
    again, cached = with_prompt_of(llm, requests(place), first)
    assert again == before
    assert cached >= 64  # so that a stale cache would be used, were there one
    shutil.copytree(second, place, dirs_exist_ok=True)
    unchanged, _ = with_prompt_of(llm, requests(place), first)
    assert unchanged == before
    after, cached = with_prompt_of(llm, requests(place, load_inplace=True), second)
    assert cached == 0
    later, cached = with_prompt_of(llm, requests(place), second)
    assert later == after
    assert cached >= 64
    shutil.copytree(first, place, dirs_exist_ok=True)
    back, cached = with_prompt_of(llm, requests(place, load_inplace=True), first)
    assert back == before
    assert cached >= 64  # content that was there before finds its own cache
    verdict = cases.judged_by_bank([before, after])
    assert verdict.wrong == 0
    assert before.tokens != after.tokens


def test_a_request_goes_on_with_the_adapter_it_began_with(llm: Any, requests: Any, tmp_path: Path) -> None:
    first, second = cases.write_many(tmp_path / "contents", 2)
    place = tmp_path / "running"
    shutil.copytree(first, place)
    engine, started = llm.llm_engine, cases.prompt(3)
    engine.add_request("old", {"prompt_token_ids": list(started)}, cases.greedy(24), lora_request=requests(place))
    for _ in range(5):
        engine.step()
    shutil.copytree(second, place, dirs_exist_ok=True)
    changed = requests(place, load_inplace=True)
    engine.add_request("new", {"prompt_token_ids": list(started)}, cases.greedy(24), lora_request=changed)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    answers = [
        cases.Generated(adapter, started, tuple(finished[name].outputs[0].token_ids))
        for name, adapter in (("old", first), ("new", second))
    ]
    assert cases.judged_by_bank(answers).wrong == 0
    assert answers[0].tokens != answers[1].tokens
