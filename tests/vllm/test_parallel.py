"""Two processes: tensor parallel and pipeline parallel engines give the same tokens as everything else."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.vllm import cases, measured

from roadie.errors import AdapterError


@pytest.fixture(scope="module", params=["tensor", "pipeline"])
def two(base: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """The way of dividing the model, and an engine of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with cases.engine(base, 32, **{f"{request.param}_parallel_size": 2}) as running:
            running.collective_rpc(measured.make_room_for_the_stage_before)
            yield request.param, running


def test_a_mixed_batch_is_right_token_by_token(two: tuple[str, Any], kinds: dict[str, Path]) -> None:
    way, llm = two
    verdict = cases.judged(cases.generate(llm, cases.Requests(), cases.mixture(kinds, 2), tokens=12))
    layers = llm.collective_rpc(measured.kinds_of_layers)
    print(f"\n{way} parallel: {verdict}")
    assert layers == [["RotatedMergedColumn", "RotatedMergedQKV", "RotatedRow"]] * 2
    assert verdict.tokens == 32 * 12
    assert verdict.wrong == 0
    assert verdict.ties <= verdict.tokens // 100
    assert verdict.like_base <= 2 + 4


def test_rotations_in_a_row_and_of_inputs_are_right_token_by_token(two: tuple[str, Any], tmp_path: Path) -> None:
    """Also where each rank has a part of the inputs."""
    way, llm = two
    adapters = [*cases.write_chains(tmp_path), None]
    verdict = cases.judged_by_bank(cases.generate(llm, cases.Requests(), adapters * 2, tokens=12))
    print(f"\n{way} parallel, rotations in a row and of inputs: {verdict}")
    assert verdict.wrong == 0
    assert verdict.like_base <= 2 + 2


def test_what_does_not_fit_is_an_exception_and_the_engine_lives(
    two: tuple[str, Any], kinds: dict[str, Path], tmp_path: Path
) -> None:
    """Tensor parallel ranks hold 64 of k's outputs, which would tear groups of 128 apart; stages know their own layers."""
    way, llm = two
    requests = cases.Requests()
    good = [None, kinds["all-4"], kinds["q-1"]]
    before = cases.generate(llm, requests, good)
    wide = cases.write_adapter(tmp_path / "wide", "road_2", 128, ("k_proj",))
    foreign = cases.write_adapter(tmp_path / "foreign", "road_2", 64, ("k_proj",), base=cases.deeper_model())
    if way == "tensor":
        with pytest.raises(AdapterError, match="got group_size=128 for a layer with 64 outputs on each of 2 ranks"):
            cases.generate(llm, requests, [wide])
    else:
        assert cases.judged(cases.generate(llm, requests, [wide])).wrong == 0
    with pytest.raises(AdapterError, match=r"model\.layers\.2\.self_attn\.k_proj \(not in the model\)"):
        cases.generate(llm, requests, [foreign])
    assert cases.generate(llm, requests, good) == before
