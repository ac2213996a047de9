"""What calls cost the host: counts are those of known calls, and one command prints all of it."""

from __future__ import annotations

import pytest
import torch
from benchmarks import host_cost
from benchmarks.harness import Budget
from benchmarks.host_cost import BANK_ROWS_ONCE, MODES, ROWS_ONCE, Setting
from benchmarks.rivals import FROZEN, PEFT_LORA, PEFT_ROAD, RIVALS, ROADIE
from benchmarks.workloads.adapters import BMM_LORA

from roadie.testing import relative_error

FEW = Setting("cpu", "fp32", 64, 1, 2, Budget(0, min_rounds=2, max_rounds=2, warm_up_calls=1), profiled_calls=2)
X = torch.ones(3)


def inner() -> torch.Tensor:
    return X + X


def outer() -> list[float]:
    return (inner() * inner()).tolist()


def test_functions_are_counted_each_time_they_run() -> None:
    assert [code.co_name for code in host_cost.functions_run_by(outer)] == ["inner", "inner"]


def test_operations_are_those_that_torch_dispatches() -> None:
    counts = host_cost.counts_of(lambda: inner() * inner(), "cpu")
    assert (counts.functions, counts.of_library, counts.operations, counts.kernels) == (2, 0, 3, 0)
    assert (
        host_cost.counts_of(lambda: torch.outer(X, X), "cpu").operations == 2
    )  # a view and a product, called by two others


def test_without_a_gpu_kernels_are_the_operations_that_write() -> None:
    assert host_cost.counts_of(lambda: inner().view(1, 3).t() * X[0], "stand-in").kernels == 2


def test_values_that_are_read_are_said_with_their_place() -> None:
    ((where, count),) = host_cost.values_read(outer, "cpu").items()
    assert where.startswith("tolist in test_host_cost.py:")
    assert count == 1
    assert not host_cost.values_read(inner, "cpu")


def test_parts_are_what_ran_for_each_call() -> None:
    functions = {part.what: part.calls for part in host_cost.functions_by_time(outer, 4)}
    operations = {part.what: part.calls for part in host_cost.operations_by_time(outer, 4)}
    assert next(calls for what, calls in functions.items() if what.endswith("inner")) == 2
    assert (operations["aten::add"], operations["aten::mul"]) == (2, 1)


@pytest.mark.parametrize("mode", MODES)
def test_every_rival_has_a_layer_in_every_mode(mode: str) -> None:
    runs = host_cost.layer_runs(mode, FEW)
    assert tuple(runs) == RIVALS
    for name, run in runs.items():
        counts = host_cost.counts_of(run, "cpu")
        assert (counts.of_library > 0) == (name != FROZEN)
        outputs = run()
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        assert (len(given) > 1) == (mode == host_cost.TRAINING and name != FROZEN)


@pytest.mark.parametrize("mode", MODES)
def test_every_rival_has_a_model_in_every_mode(mode: str) -> None:
    runs = host_cost.whole_runs(mode, FEW)
    assert tuple(runs) == RIVALS
    for name, run in runs.items():
        given = run()
        logits = given[0] if isinstance(given, tuple) else given
        assert (isinstance(given, tuple) and len(given) > 1) == (mode == host_cost.TRAINING and name != FROZEN)
        assert bool(logits.isfinite().all())


def test_rows_that_are_in_force_around_all_steps_are_those_that_are_named_in_each() -> None:
    with host_cost.model_steps(FEW) as (steps, layers):
        assert set(steps) == {FROZEN, ROADIE, PEFT_ROAD, PEFT_LORA, BMM_LORA, ROWS_ONCE, BANK_ROWS_ONCE}
        assert layers == 7
        named, in_force, banked, frozen = (steps[name]() for name in (ROADIE, ROWS_ONCE, BANK_ROWS_ONCE, FROZEN))
    assert named.shape == in_force.shape == (2, 1, 256)
    assert relative_error(banked, named) < 1e-5
    assert relative_error(in_force, named) < 1e-5
    assert relative_error(in_force, frozen) > 1e-3


def test_one_command_prints_tables_of_layers_of_a_model_and_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert host_cost.main(["--quick", "--width", "64", "--layers", "1", "--rows", "2", "--parts", "3"]) == 0
    text = capsys.readouterr().out
    for words in ("## One layer, 64 wide", "## A step of decoding, 2 rows", "## roadie's parts: a step of decoding"):
        assert words in text
    for name in (*RIVALS, BMM_LORA, ROWS_ONCE):
        assert f"| {name} " in text


def test_sizes_that_no_group_fits_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_cost.main(["--width", "100"])
    assert "multiple of 64" in capsys.readouterr().err
